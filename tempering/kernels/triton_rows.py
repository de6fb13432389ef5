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

from tempering.temperature.sharpness import LOOKS, Solution

LARGEST = 4096  # maximum block size, in classes


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
    """Over one row's valid classes: number, mean, maximum, standard deviation, whether all are equal."""
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
    return count, mean, top, tl.sqrt(tl.maximum(square / count, 1.1754944e-38)) / unit, flat


@triton.jit
def _look(row, top, T, n, BLOCK: tl.constexpr):
    """``sharpness.look``, of logits with this maximum; ``top / T`` is not added to the first two results."""
    mass, first, second, third = 0.0, 0.0, 0.0, 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < n, other=-float("inf")).to(tl.float32)
        # exp() is 0 at the bound, which keeps 0 * inf out
        x = tl.maximum((z - top) / T, -1000.0)
        e = tl.exp(x)
        once = e * x
        twice = once * x
        mass += tl.sum(e, 0)
        first += tl.sum(once, 0)
        second += tl.sum(twice, 0)
        third += tl.sum(twice * x, 0)
    first, second, third = first / mass, second / mass, third / mass
    variance = second - first * first
    return tl.log(mass), first, variance, third - first * (second + 2.0 * variance)


@triton.jit
def _tail(x):
    """``sharpness._tail``; erfcx by Chebyshev's polynomial, relative error 1.2e-7 (Numerical Recipes, 6.2)."""
    y = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * y)
    p = -0.82215223 + t * 0.17087277
    p = 1.48851587 + t * p
    p = -1.13520398 + t * p
    p = 0.27886807 + t * p
    p = -0.18628806 + t * p
    p = 0.09678418 + t * p
    p = 0.37409196 + t * p
    p = 1.00002368 + t * p
    erfcx = t * tl.exp(-1.26551223 + t * p)
    bell = tl.exp(-0.5 * x * x)
    phi = 1.0 - 0.5 * erfcx * bell
    value = tl.log(tl.where(x < 0, 0.5 * erfcx, phi))
    return value, tl.where(x < 0, 0.7978845608028654 / erfcx, 0.3989422804014327 * bell / phi)


@triton.jit
def _fit(count, top, std):
    """``sharpness.fit``."""
    others = tl.maximum(count - 1.0, 1.0)
    ratio = top / std
    mean = -ratio / others
    variance = tl.maximum((count - ratio * ratio) / others - mean * mean, 1e-6)
    center, sigma = mean, tl.sqrt(variance)
    for _ in tl.static_range(2):
        cut = (ratio - center) / sigma
        value, hazard = _tail(cut)
        sigma = tl.sqrt(variance / tl.maximum(1.0 - cut * hazard - hazard * hazard, 0.3))
        center = mean + sigma * hazard
    cut = (ratio - center) / sigma
    value, hazard = _tail(cut)
    share = others / count
    wrong_mean = tl.abs(center - sigma * hazard - mean) * share * std
    wrong_variance = tl.abs(sigma * sigma * (1.0 - cut * hazard - hazard * hazard) - variance) * share * std * std
    return sigma * std, cut, tl.log(others) - value, wrong_mean, wrong_variance


@triton.jit
def _of_model(top, sigma, cut, offset, inverse):
    """``sharpness._of_model``."""
    shift = sigma * inverse
    x = cut - shift
    value, hazard = _tail(x)
    positive = tl.maximum(cut, 0.0)
    shift = tl.minimum(shift, positive)
    bulk = offset + value - shift * (positive - 0.5 * shift)
    small = tl.exp(-tl.abs(bulk))
    lse = top * inverse + tl.maximum(bulk, 0.0) + tl.log(1.0 + small)
    share = tl.where(bulk > 0, 1.0, small) / (1.0 + small)
    return lse, top - share * sigma * (x + hazard)


@triton.jit
def _start(count_u, top_u, std_u, count_v, top_v, std_v, tau, end):
    """``sharpness.start_of``."""
    by_spread = tl.minimum(tl.maximum(tau * (std_u - std_v) / (std_u + std_v), -end), end)
    low = tl.maximum(0.5 * (by_spread - tau), -end)
    high = tl.minimum(0.5 * (by_spread + tau), end)
    sigma_u, cut_u, offset_u, mean_u, variance_u = _fit(count_u, top_u, std_u)
    sigma_v, cut_v, offset_v, mean_v, variance_v = _fit(count_v, top_v, std_v)
    delta, wrong, added = by_spread, 0.0, 0.0
    for step in tl.static_range(2):
        a, b = 1.0 / (tau + delta), 1.0 / (tau - delta)
        lse_u, by_u = _of_model(top_u, sigma_u, cut_u, offset_u, a)
        lse_v, by_v = _of_model(top_v, sigma_v, cut_v, offset_v, b)
        if step == 0:
            wrong = mean_u * a + 0.5 * variance_u * a * a + mean_v * b + 0.5 * variance_v * b * b
            added = tl.abs(lse_u - tl.log(count_u) - 0.5 * (std_u * a) * (std_u * a))
            added += tl.abs(lse_v - tl.log(count_v) - 0.5 * (std_v * b) * (std_v * b))
        f = lse_u - lse_v
        slope = by_u * a * a + by_v * b * b
        newton = slope + 2.0 * delta * f * a * b
        delta = tl.minimum(tl.maximum(delta + f / tl.where(newton > 0, newton, slope), low), high)
    return tl.where(wrong < 0.3 * added, delta, by_spread)


@triton.jit
def _exact_rows(u, v, delta_to, flat_to, clamped_to, n, tau, reach, eps, LOOKS: tl.constexpr, BLOCK: tl.constexpr):
    """``sharpness.exact``: all of a row before the next, which stays in cache; most rows take one look."""
    row = tl.program_id(0).to(tl.int64)
    u += row * n
    v += row * n
    count_u, mean_u, most_u, std_u, flat_u = _spread(u, n, eps, BLOCK)
    count_v, mean_v, most_v, std_v, flat_v = _spread(v, n, eps, BLOCK)
    top_u, top_v = most_u - mean_u, most_v - mean_v
    flat = tl.maximum(flat_u, flat_v)
    end = tl.minimum(reach, 1.0 - 16.0 * eps) * tau
    start = _start(count_u, top_u, std_u, count_v, top_v, std_v, tau, end)
    delta = tl.where(flat == 1, 0.0, start)
    low, high = -end, end
    # flags are integers, 0 or 1
    clamped, done, looks = 0, flat, 0
    while looks < LOOKS:
        if done == 0:
            T, S = tau + delta, tau - delta
            log_u, first_u, variance_u, third_u = _look(u, most_u, T, n, BLOCK)
            log_v, first_v, variance_v, third_v = _look(v, most_v, S, n, BLOCK)
            lse_u, first_u = log_u + top_u / T, first_u + top_u / T
            lse_v, first_v = log_v + top_v / S, first_v + top_v / S
            f = lse_u - lse_v
            slope = first_u / T + first_v / S
            noise = 2.0 * eps * (1.0 + tl.abs(lse_u) + tl.abs(lse_v) + tau * slope)
            bend = (variance_u + 2.0 * first_u) / (T * T) - (variance_v + 2.0 * first_v) / (S * S)
            twist = -(third_u + 6.0 * (variance_u + first_u)) / (T * T * T)
            twist -= (third_v + 6.0 * (variance_v + first_v)) / (S * S * S)
            at_end = tl.where(delta <= -end, tl.where(f < 0, 1, 0), 0)
            at_end = tl.where(delta >= end, tl.where(f > 0, 1, 0), at_end)
            is_root = tl.where(tl.abs(f) <= noise, 1, 0)
            clamped = tl.where(is_root == 1, 0, at_end)

            by_one = -slope - 2.0 * delta * f / (T * S)
            by_one = tl.where(by_one < 0, by_one, -slope)
            by_two = bend + (4.0 * delta * slope - 2.0 * f) / (T * S)
            by_three = twist + 6.0 * (slope - delta * bend) / (T * S)
            h = -f / by_one
            a2, a3 = 0.5 * h * by_two / by_one, h * h * by_three / (6.0 * by_one)
            above, below = 1.0 + a2, 1.0 + 2.0 * a2 + a3
            step = h * tl.where(above > 0, tl.where(below > 0, above / below, 1.0), 1.0)
            smaller = tl.minimum(T, S)
            size = tl.maximum(tl.maximum(tl.abs(a2), tl.sqrt(tl.abs(a3))), 0.3 * tl.abs(h) / smaller)
            error = tl.abs(h) * size * size * size
            allowed = 0.25 * noise / slope + 2.0 * eps * smaller

            low = tl.where(f > 0, delta, low)
            high = tl.where(f < 0, delta, high)
            raw = delta + step
            middle = 0.5 * (low + high)
            to = tl.where(raw <= low, tl.where(low > -end, middle, low), raw)
            to = tl.where(raw >= high, tl.where(high < end, middle, high), to)
            outside = tl.where(raw > low, tl.where(raw < high, 0, 1), 1)
            # a root by its noise moves once more, since f is known no better than here
            stays = tl.maximum(clamped, is_root * outside)
            delta = tl.where(stays == 1, delta, to)
            done = tl.maximum(is_root, clamped)
            done = tl.where(error <= allowed, tl.maximum(done, 1 - outside), done)
        looks += 1
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
    )
    _exact_rows[(n,)](*inputs, LOOKS=LOOKS, **_sizes(student))
    return Solution(delta, flat.bool(), clamped.bool())


def _empty_outputs(v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(len(v), device=v.device), torch.empty(v.shape, device=v.device)


def _sizes(z: Tensor) -> dict[str, int]:
    block = min(LARGEST, triton.next_power_of_2(z.shape[1]))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4 if block >= 256 else 1}
