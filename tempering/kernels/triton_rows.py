"""Triton kernels of the KL family, the cross entropy and DTKD's exact solver: one program per row, read in blocks.

The functions match those of ``analytic`` and ``temperature.sharpness``, for float32 and half precision; all sum in
float32. Triton's interpreter (TRITON_INTERPRET=1 before the first import) runs them on a CPU.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempering.temperature.sharpness_solver import Solution

LARGEST = 4096  # maximum block size, in classes
STEPS = 12  # Newton steps, as in sharpness._exact


@triton.jit
def _tempered_lse(row, T, n, BLOCK: tl.constexpr):
    """The maximum of z / T of one row and its logsumexp (log n if all classes are masked), in one pass."""
    top = -float("inf")
    mass = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32) / T
        new_top = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)
        top = new_top
    # rows with all classes masked are uniform, as in objectives.masked
    lse = tl.where(top == -float("inf"), tl.log(n * 1.0), top + tl.log(mass))
    return top, lse


@triton.jit
def _kl_rows(u, v, T_t, T_s, scale, value, slope, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    u += row * n
    v += row * n
    slope += row * n
    by_t, by_s, factor = tl.load(T_t + row), tl.load(T_s + row), tl.load(scale + row)
    top_t, lse_t = _tempered_lse(u, by_t, n, BLOCK)
    top_s, lse_s = _tempered_lse(v, by_s, n, BLOCK)
    empty_t = top_t == -float("inf")
    empty_s = top_s == -float("inf")
    total = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        zt = tl.load(u + at, mask=inside, other=-float("inf")).to(tl.float32) / by_t
        zs = tl.load(v + at, mask=inside, other=-float("inf")).to(tl.float32) / by_s
        logp = tl.where(inside, tl.where(empty_t, 0.0, zt), -float("inf")) - lse_t
        logq = tl.where(inside, tl.where(empty_s, 0.0, zs), -float("inf")) - lse_s
        p = tl.exp(logp)
        masked = p == 0.0
        total += tl.sum(tl.where(masked, 0.0, p * (tl.where(masked, 0.0, logp) - tl.where(masked, 0.0, logq))), 0)
        tl.store(slope + at, tl.where(empty_s, 0.0, (tl.exp(logq) - p) * (factor / by_s)), mask=inside)
    tl.store(value + row, factor * tl.where(total < 0.0, 0.0, total))


@triton.jit
def _label_rows(v, target, value, slope, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    v += row * n
    slope += row * n
    label = tl.load(target + row)
    top, lse = _tempered_lse(v, 1.0, n, BLOCK)
    empty = top == -float("inf")
    keep = tl.where(empty, 0, tl.where(label >= 0, 1, 0))
    loss = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        z = tl.load(v + at, mask=inside, other=-float("inf")).to(tl.float32)
        logq = tl.where(inside, tl.where(empty, 0.0, z), -float("inf")) - lse
        hit = at == label
        loss += tl.sum(tl.where(hit, -logq, 0.0), 0)
        tl.store(slope + at, tl.where(keep == 1, tl.exp(logq) - hit.to(tl.float32), 0.0), mask=inside)
    tl.store(value + row, tl.where(label < n, loss, float("nan")))


@triton.jit
def _spread(row, n, eps, BLOCK: tl.constexpr):
    """Over one row's valid classes: mean, maximum minus mean, standard deviation, whether all are equal."""
    count = 0.0
    top = -float("inf")
    bottom = float("inf")
    total = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
        valid = z != -float("inf")
        count += tl.sum(valid.to(tl.float32), 0)
        total += tl.sum(tl.where(valid, z, 0.0), 0)
        top = tl.maximum(top, tl.max(z, 0))
        bottom = tl.minimum(bottom, tl.min(tl.where(valid, z, float("inf")), 0))
    count = tl.maximum(count, 1.0)
    mean = total / count
    largest = tl.maximum(tl.abs(top), tl.abs(bottom))
    flat = tl.where(top - bottom > 4.0 * eps * largest, 0, 1)
    # 2^-60 for logits above 2^60, whose square is not finite
    unit = tl.where(largest > 1152921504606846976.0, 8.673617379884035e-19, 1.0)
    square = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
        off = (z - mean) * unit
        square += tl.sum(tl.where(z != -float("inf"), off * off, 0.0), 0)
    return mean, top - mean, tl.sqrt(tl.maximum(square / count, 1.1754944e-38)) / unit, flat


@triton.jit
def _logsumexp_and_slope(row, mean, top, T, n, BLOCK: tl.constexpr):
    """logsumexp((z - mean) / T) and its negative derivative in T."""
    mass = 0.0
    first = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
        valid = z != -float("inf")
        e = tl.where(valid, tl.exp((z - mean - top) / T), 0.0)
        mass += tl.sum(e, 0)
        first += tl.sum(tl.where(valid, e * (z - mean), 0.0), 0)
    return top / T + tl.log(mass), first / (mass * T * T)


@triton.jit
def _exact_rows(
    u, v, delta_to, flat_to, clamped_to, n, tau, reach, eps, close, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    u += row * n
    v += row * n
    mean_u, top_u, std_u, flat_u = _spread(u, n, eps, BLOCK)
    mean_v, top_v, std_v, flat_v = _spread(v, n, eps, BLOCK)
    flat = tl.maximum(flat_u, flat_v)
    end = tl.minimum(reach, 1.0 - 16.0 * eps) * tau
    start = tl.where(flat == 1, 0.0, tau * (std_u - std_v) / (std_u + std_v))
    delta = tl.minimum(tl.maximum(start, -end), end)
    low, high = -end, end
    # flags are integers, 0 or 1
    low_done, high_done, clamped, done, step = 0, 0, 0, flat, 0
    while step < STEPS:
        if done == 0:
            f_u, slope_u = _logsumexp_and_slope(u, mean_u, top_u, tau + delta, n, BLOCK)
            f_v, slope_v = _logsumexp_and_slope(v, mean_v, top_v, tau - delta, n, BLOCK)
            f = f_u - f_v
            slope = slope_u + slope_v
            noise = 2.0 * eps * (1.0 + tl.abs(f_u) + tl.abs(f_v) + tau * slope)
            at_end = tl.where(delta <= -end, tl.where(f < 0, 1, 0), 0)
            at_end = tl.where(delta >= end, tl.where(f > 0, 1, 0), at_end)
            done = tl.where(tl.abs(f) <= noise, 1, 0)
            clamped = tl.where(done == 1, 0, at_end)
            low = tl.where(f > 0, delta, low)
            high = tl.where(f < 0, delta, high)
            low_done = tl.where(f > 0, 1, low_done)
            high_done = tl.where(f < 0, 1, high_done)
            newton_slope = slope + 2.0 * delta * f / ((tau + delta) * (tau - delta))
            newton_slope = tl.where(newton_slope > 0, newton_slope, slope)
            raw = delta + f / newton_slope
            midpoint = 0.5 * (low + high)
            moved = tl.where(raw <= low, tl.where(low_done == 1, midpoint, low), raw)
            moved = tl.where(raw >= high, tl.where(high_done == 1, midpoint, high), moved)
            done = tl.maximum(done, clamped)
            moved = tl.where(done == 1, delta, moved)
            change = tl.where(tl.abs(moved) < end, tl.abs(moved - delta), tau)
            done = tl.where(change <= close * (tau - tl.abs(delta)), 1, done)
            delta = moved
        step += 1
    tl.store(delta_to + row, delta)
    tl.store(flat_to + row, flat)
    tl.store(clamped_to + row, clamped)


def divergence_and_slope(u: Tensor, v: Tensor, T_t: Tensor, T_s: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``analytic.divergence_and_slope``, in float32."""
    value, slope = _empty_outputs(v)
    T_t, T_s, scale = (x.expand(len(v), *x.shape[1:]).float().contiguous() for x in (T_t, T_s, scale))
    _kl_rows[(len(v),)](u.contiguous(), v.contiguous(), T_t, T_s, scale, value, slope, v.shape[1], **_sizes(v))
    return value, slope


def cross_entropy_and_slope(v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``analytic.cross_entropy_and_slope``, in float32."""
    value, slope = _empty_outputs(v)
    _label_rows[(len(v),)](v.contiguous(), target.contiguous(), value, slope, v.shape[1], **_sizes(v))
    return value, slope


def exact(teacher: Tensor, student: Tensor, tau: float, reach: float) -> Solution:
    """The root of ``Sharpness(solve="exact")``, without gradient."""
    n = len(student)
    delta = torch.empty(n, 1, device=student.device, dtype=torch.float32)
    flat, clamped = (torch.empty(n, 1, device=student.device, dtype=torch.int8) for _ in range(2))
    eps = torch.finfo(torch.float32).eps
    inputs = (
        teacher.contiguous(),
        student.contiguous(),
        delta,
        flat,
        clamped,
        student.shape[1],
        tau,
        reach,
        eps,
        0.25 * eps**0.5,
    )
    _exact_rows[(n,)](*inputs, STEPS=STEPS, **_sizes(student))
    return Solution(delta, flat.bool(), clamped.bool())


def _empty_outputs(v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(len(v), device=v.device), torch.empty(v.shape, device=v.device)


def _sizes(z: Tensor) -> dict[str, int]:
    block = min(LARGEST, triton.next_power_of_2(z.shape[1]))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4 if block >= 256 else 1}
