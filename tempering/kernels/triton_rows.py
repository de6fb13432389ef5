"""The KL family, the cross entropy and DTKD's exact solver in Triton: one program a row, the row read in blocks.

The same functions as ``analytic`` and ``temperature.sharpness`` have, for float32 and half precision; each sums in
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

from tempering.temperature.sharpness import Solution

LARGEST = 4096  # classes that a program holds at once
STEPS = 12  # of Newton, as sharpness._exact has them


@triton.jit
def _tempered_lse(row, T, n, BLOCK: tl.constexpr):
    """The largest z / T of a row, taken as 0 where the row has no class left, and the logsumexp; one pass."""
    top = -float("inf")
    mass = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32) / T
        found = tl.maximum(top, tl.max(z, 0))
        base = tl.where(found == -float("inf"), 0.0, found)
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)
        top = found
    # a row with no class left is uniform, as where its logits were replaced by 0
    lse = tl.where(top == -float("inf"), tl.log(n * 1.0), top + tl.log(mass))
    return top, lse


@triton.jit
def _kl_rows(u, v, T_t, T_s, scale, value, slope, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    u += row * n
    v += row * n
    slope += row * n
    by_t, by_s, by = tl.load(T_t + row), tl.load(T_s + row), tl.load(scale + row)
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
        gone = logp == -float("inf")
        total += tl.sum(tl.where(gone, 0.0, p * (tl.where(gone, 0.0, logp) - tl.where(gone, 0.0, logq))), 0)
        tl.store(slope + at, tl.where(empty_s, 0.0, (tl.exp(logq) - p) * (by / by_s)), mask=inside)
    tl.store(value + row, by * tl.where(total < 0.0, 0.0, total))


@triton.jit
def _label_rows(v, target, value, slope, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    v += row * n
    slope += row * n
    label = tl.load(target + row)
    top, lse = _tempered_lse(v, 1.0, n, BLOCK)
    empty = top == -float("inf")
    keep = tl.where(empty, 0, tl.where(label >= 0, 1, 0))
    found = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        z = tl.load(v + at, mask=inside, other=-float("inf")).to(tl.float32)
        logq = tl.where(inside, tl.where(empty, 0.0, z), -float("inf")) - lse
        hit = at == label
        found += tl.sum(tl.where(hit, -logq, 0.0), 0)
        tl.store(slope + at, tl.where(keep == 1, tl.exp(logq) - hit.to(tl.float32), 0.0), mask=inside)
    tl.store(value + row, tl.where(label < n, found, float("nan")))


@triton.jit
def _spread(row, n, eps, BLOCK: tl.constexpr):
    """Of a row's valid classes: mean, largest less the mean, standard deviation, and whether they are constant."""
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
    square = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
        square += tl.sum(tl.where(z != -float("inf"), (z - mean) * (z - mean), 0.0), 0)
    return mean, top - mean, tl.sqrt(tl.maximum(square / count, 1.1754944e-38)), flat


@triton.jit
def _sharpness(row, mean, top, T, n, BLOCK: tl.constexpr):
    """logsumexp((z - mean) / T) and minus its derivative in T."""
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
def _exact_rows(u, v, delta_to, flat_to, held_to, n, tau, reach, eps, close, STEPS: tl.constexpr, BLOCK: tl.constexpr):
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
    # flags are numbers here, 0 or 1
    low_seen, high_seen, held, done, step = 0, 0, 0, flat, 0
    while step < STEPS:
        if done == 0:
            f_u, slope_u = _sharpness(u, mean_u, top_u, tau + delta, n, BLOCK)
            f_v, slope_v = _sharpness(v, mean_v, top_v, tau - delta, n, BLOCK)
            f = f_u - f_v
            slope = slope_u + slope_v
            noise = 2.0 * eps * (1.0 + tl.abs(f_u) + tl.abs(f_v) + tau * slope)
            outside = tl.where(delta <= -end, tl.where(f < 0, 1, 0), 0)
            outside = tl.where(delta >= end, tl.where(f > 0, 1, 0), outside)
            done = tl.where(tl.abs(f) <= noise, 1, 0)
            held = tl.where(done == 1, 0, outside)
            low = tl.where(f > 0, delta, low)
            high = tl.where(f < 0, delta, high)
            low_seen = tl.where(f > 0, 1, low_seen)
            high_seen = tl.where(f < 0, 1, high_seen)
            straight = slope + 2.0 * delta * f / ((tau + delta) * (tau - delta))
            straight = tl.where(straight > 0, straight, slope)
            raw = delta + f / straight
            middle = 0.5 * (low + high)
            moved = tl.where(raw <= low, tl.where(low_seen == 1, middle, low), raw)
            moved = tl.where(raw >= high, tl.where(high_seen == 1, middle, high), moved)
            done = tl.maximum(done, held)
            moved = tl.where(done == 1, delta, moved)
            near = tl.where(tl.abs(moved) < end, tl.abs(moved - delta), tau)
            done = tl.where(near <= close * (tau - tl.abs(delta)), 1, done)
            delta = moved
        step += 1
    tl.store(delta_to + row, delta)
    tl.store(flat_to + row, flat)
    tl.store(held_to + row, held)


def divergence_and_slope(u: Tensor, v: Tensor, T_t: Tensor, T_s: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``analytic.divergence_and_slope``, in float32."""
    value, slope = _room(v)
    T_t, T_s, scale = (x.expand(len(v), *x.shape[1:]).float().contiguous() for x in (T_t, T_s, scale))
    _kl_rows[(len(v),)](u.contiguous(), v.contiguous(), T_t, T_s, scale, value, slope, v.shape[1], **_sizes(v))
    return value, slope


def cross_entropy_and_slope(v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``analytic.cross_entropy_and_slope``, in float32."""
    value, slope = _room(v)
    _label_rows[(len(v),)](v.contiguous(), target.contiguous(), value, slope, v.shape[1], **_sizes(v))
    return value, slope


def exact(teacher: Tensor, student: Tensor, tau: float, reach: float) -> Solution:
    """The root of ``Sharpness(solve="exact")``, without its gradient."""
    n = len(student)
    delta = torch.empty(n, 1, device=student.device, dtype=torch.float32)
    flat, held = (torch.empty(n, 1, device=student.device, dtype=torch.int8) for _ in range(2))
    eps = torch.finfo(torch.float32).eps
    inputs = (
        teacher.contiguous(),
        student.contiguous(),
        delta,
        flat,
        held,
        student.shape[1],
        tau,
        reach,
        eps,
        0.25 * eps**0.5,
    )
    _exact_rows[(n,)](*inputs, STEPS=STEPS, **_sizes(student))
    return Solution(delta, flat.bool(), held.bool())


def _room(v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(len(v), device=v.device), torch.empty(v.shape, device=v.device)


def _sizes(z: Tensor) -> dict[str, int]:
    block = min(LARGEST, triton.next_power_of_2(z.shape[1]))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4 if block >= 256 else 1}
