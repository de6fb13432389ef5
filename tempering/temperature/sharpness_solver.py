"""The solver of ``Sharpness``: the root of LSE(u / (tau + delta)) = LSE(v / (tau - delta)), in one look at most rows.

A *look* evaluates both sides at one delta, with two exp() per entry, and is what the solver costs. Three parts keep
their number at one in float32:

- The start solves the equation on a model of each row (``Model``) that knows its count, mean, standard deviation and
  maximum, which a pass without exp() gives. Only a few numbers per row take part.
- A look also gives the second and third cumulants of the logits under the softmax, and so three derivatives. The step
  is Householder's of the third order, whose error is of the fourth.
- The same numbers bound the step's error (``_advance``). Rows for which it may exceed the rounding error of the
  equation itself are evaluated again, inside a bracket.

``docs/decisions/017-one-look.md`` has the reasons and the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HUGE = 2.0**60  # logits whose square may overflow in float32
LOOKS = 12  # at most, for rows evaluated again; no row of millions took more than six
FEW = 512  # classes up to which the model of a row takes longer than a look at a few rows on a CPU, in eager mode
FIXED = 2  # on a device in eager mode, where selecting rows would synchronize; one more in float64


class Statistics(NamedTuple):
    """What a pass without exp() says of each row's valid classes (those above minus infinity), (N, 1) each."""

    n: Tensor
    """number of valid classes, at least 1"""
    mean: Tensor
    peak: Tensor
    """maximum"""
    top: Tensor
    """maximum minus mean; the minimum of the type's range if all classes are masked"""
    std: Tensor
    """standard deviation, bounded away from zero so that its gradient is finite"""
    flat: Tensor
    """whether the row is constant"""


def statistics(z: Tensor, *, is_masked: bool | None = None) -> Statistics:
    """Return the statistics of each row, with gradient.

    Args:
        z: (N, C), or (N, K, C / K) and then the statistics are (N, 1, 1); see ``in_pieces``.
        is_masked: False if all classes of all rows are known to be valid; by default a CPU looks for itself.
    """
    info, whole, dims, total = torch.finfo(z.dtype), float(z[0].numel()) if len(z) else 1.0, (-1, -2)[: z.ndim - 1], SUM
    if z.ndim > 2:
        total = in_pieces
    peak, bottom = z.amax(dims, keepdim=True), z.amin(dims, keepdim=True)
    if is_masked is None:
        is_masked = z.device.type != "cpu" or bool(torch.isneginf(bottom).any())
    if is_masked:
        valid = ~torch.isneginf(z)
        bottom = torch.where(valid, z, torch.inf).amin(dims, keepdim=True)
        n = total(valid.to(z.dtype)).clamp_min(1.0)
        mean = total(torch.where(valid, z, 0.0)) / n
        off = torch.where(valid, z - mean, 0.0)
    else:
        n, mean = torch.full_like(peak, whole), total(z) / whole
        off = z - mean
    size = torch.maximum(peak.abs(), bottom.abs())
    flat = ~(peak - bottom > 4 * info.eps * size)
    # an exact power of 2, and 1 for all but enormous logits, whose square is not finite
    unit = torch.where(size > HUGE, 1 / HUGE, 1.0).to(z.dtype)
    std = (total((off * unit).square()) / n).clamp_min(info.tiny).sqrt() / unit
    return Statistics(n, mean, peak, torch.where(torch.isneginf(peak), info.min, peak - mean), std, flat)


SUM = functools.partial(torch.sum, dim=-1, keepdim=True)


def in_pieces(x: Tensor) -> Tensor:
    """Sum (N, K, C / K) to (N, 1, 1) in two steps.

    Inductor sums up to 4,096 numbers in registers, and more of them through memory, at twice the time of an exp().
    """
    return SUM(x).sum(-2, keepdim=True)


class Model(NamedTuple):
    """A row as its maximum and a bulk of n - 1 draws of a normal distribution cut off at the maximum, (N, 1) each.

    LSE(z / T) = log(exp(top / T) + (n - 1) E exp(x / T)), whose expectation is known in closed form.
    """

    top: Tensor
    sigma: Tensor
    """standard deviation of the normal distribution before it is cut off"""
    cut: Tensor
    """where it is cut off, in units of sigma from its mean"""
    offset: Tensor
    """log(n - 1) - tail(cut)"""
    wrong: tuple[Tensor, Tensor]
    """by how much the model's mean and variance differ from those of the row"""


def _tail(x: Tensor) -> tuple[Tensor, Tensor]:
    """log Phi(x), plus x^2 / 2 where x < 0, Phi the normal distribution function; and Phi'(x) / Phi(x)."""
    erfcx = cast(Tensor, cast(Any, torch.special).erfcx(x.abs() * math.sqrt(0.5)))  # torch has no types for it
    bell = (-0.5 * x.square()).exp()
    phi = 1.0 - 0.5 * erfcx * bell
    below = x < 0
    value = torch.where(below, 0.5 * erfcx, phi).log()
    hazard = torch.where(below, math.sqrt(2 / math.pi) / erfcx, bell / (math.sqrt(2 * math.pi) * phi))
    return value, hazard


def fit(row: Statistics) -> Model:
    """Return the model with the row's count and maximum, and its mean and variance where such a model exists."""
    others = (row.n - 1.0).clamp_min(1.0)
    ratio = row.top / row.std  # in units of std: nothing overflows
    mean = -ratio / others
    variance = ((row.n - ratio.square()) / others - mean.square()).clamp_min(1e-6)
    center, sigma = mean, variance.sqrt()
    for _ in range(2):
        cut = (ratio - center) / sigma
        hazard = _tail(cut)[1]
        sigma = (variance / (1.0 - cut * hazard - hazard.square()).clamp_min(0.3)).sqrt()
        center = mean + sigma * hazard
    cut = (ratio - center) / sigma
    value, hazard = _tail(cut)
    share = others / row.n
    wrong_mean = (center - sigma * hazard - mean).abs() * share
    wrong_variance = (sigma.square() * (1.0 - cut * hazard - hazard.square()) - variance).abs() * share
    wrong = wrong_mean * row.std, wrong_variance * row.std.square()
    return Model(row.top, sigma * row.std, cut, others.log() - value, wrong)


def _of_model(model: Model, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """LSE(z / T) of the model, and its derivative in 1 / T, at ``inverse`` = 1 / T."""
    shift = model.sigma * inverse
    x = model.cut - shift
    value, hazard = _tail(x)
    # (max(x, 0)^2 - max(cut, 0)^2) / 2, without cancellation
    positive = model.cut.clamp_min(0.0)
    shift = torch.minimum(shift, positive)
    bulk = model.offset + value - shift * (positive - 0.5 * shift)
    # softplus() and sigmoid() of torch round the last rows of a tensor otherwise than the first
    less = (-bulk.abs()).exp()
    lse = model.top * inverse + bulk.clamp_min(0.0) + (1.0 + less).log()
    share = torch.where(bulk > 0, 1.0, less) / (1.0 + less)
    return lse, model.top - share * model.sigma * (x + hazard)


def start_of(u: Statistics, v: Statistics, tau: Tensor, end: Tensor) -> Tensor:
    """Return the delta to look at first, (N, 1): the root for the models or, if that is better, the ratio of spreads.

    The ratio of spreads is exact to the second order in 1 / T. The model has all orders, but where its mean or variance
    is wrong (rows of a few classes) it is worse at large T. It is used where this error, in the logsumexp, is below a
    third of what the model adds to the second order.
    """
    by_spread = (tau * (u.std - v.std) / (u.std + v.std)).clamp(-end, end)
    inverse = 1.0 / (tau + by_spread), 1.0 / (tau - by_spread)
    # at least half of these temperatures
    low = (0.5 * (by_spread - tau)).clamp_min(-end)
    high = (0.5 * (by_spread + tau)).clamp_max(end)
    models, delta = (fit(u), fit(v)), by_spread
    wrong = added = torch.zeros_like(delta)
    for step in range(2):
        (f_u, by_u), (f_v, by_v) = (_of_model(m, b) for m, b in zip(models, inverse, strict=True))
        if not step:
            for row, model, b, lse in zip((u, v), models, inverse, (f_u, f_v), strict=True):
                wrong = wrong + model.wrong[0] * b + 0.5 * model.wrong[1] * b.square()
                added = added + (lse - row.n.log() - 0.5 * (row.std * b).square()).abs()
        f, slope = f_u - f_v, by_u * inverse[0].square() + by_v * inverse[1].square()
        newton = slope + 2.0 * delta * f * inverse[0] * inverse[1]
        delta = delta + f / torch.where(newton > 0, newton, slope)
        delta = torch.maximum(torch.minimum(delta, high), low)
        inverse = 1.0 / (tau + delta), 1.0 / (tau - delta)
    return torch.where(wrong < 0.3 * added, delta, by_spread)


class Look(NamedTuple):
    """LSE of a side's centered logits over T, and mean and cumulants of these under the softmax, (N, 1) each."""

    lse: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor


def look(z: Tensor, T: Tensor, row: Statistics) -> Look:
    """Evaluate one side at its temperature; ``z`` are the logits themselves, minus infinity where masked."""
    total = SUM if z.ndim == 2 else in_pieces
    # exp() is 0 at the bound, which keeps 0 * inf out
    x = ((z - row.peak) / T).clamp_min(-1000.0)
    e = x.exp()
    mass, e = total(e), e * x
    first, e = total(e) / mass, e * x
    second, e = total(e) / mass, e * x
    variance = second - first.square()
    third = total(e) / mass - first * (second + 2.0 * variance)
    at = row.top / T
    return Look(at + mass.log(), at + first, variance, third)


class Search(NamedTuple):
    """The rows' search for their roots so far, (N, 1) each; it begins with the whole range as its bracket."""

    delta: Tensor
    low: Tensor
    high: Tensor
    done: Tensor
    clamped: Tensor

    def advance(self, sides: Sides, bounds: Bounds) -> Search:
        """Return the search after a look at ``delta``: Householder's step of the third order on F = T_t T_s f.

        F has the root of f = LSE_t - LSE_s and is nearly linear; f grows like 1 / T at the ends. A row is done where
        |f| is at rounding error, and after a step whose error is. With h Newton's step, a2 = h F2 / (2 F1) and a3 = h^2
        F3 / (6 F1), this error is h (-a2^3 + 2 a2 a3 - a4); a4 is taken to be at most of the size of the others.

        A step outside the bracket is replaced by its end, or by its midpoint if the end was looked at.
        """
        delta, eps, (tau, end) = self.delta, torch.finfo(self.delta.dtype).eps, bounds
        T, S = tau + delta, tau - delta
        u, v = look(sides.u, T, sides.of_u), look(sides.v, S, sides.of_v)
        f, product = u.lse - v.lse, T * S
        slope = u.mean / T + v.mean / S
        noise = 2.0 * eps * (1.0 + u.lse.abs() + v.lse.abs() + tau * slope)
        bend = (u.variance + 2.0 * u.mean) / T.square() - (v.variance + 2.0 * v.mean) / S.square()
        twist = -(u.third + 6.0 * (u.variance + u.mean)) / (T.square() * T)
        twist = twist - (v.third + 6.0 * (v.variance + v.mean)) / (S.square() * S)
        is_root = f.abs() <= noise
        at_low, at_high = (delta <= -end) & (f < 0), (delta >= end) & (f > 0)
        clamped = self.clamped | (~self.done & ~is_root & (at_low | at_high))
        done = self.done | is_root | clamped

        # derivatives of F over T_t T_s; F' < 0 near the root, where it is that of f
        by_one = -slope - 2.0 * delta * f / product
        by_one = torch.where(by_one < 0, by_one, -slope)
        by_two = bend + (4.0 * delta * slope - 2.0 * f) / product
        by_three = twist + 6.0 * (slope - delta * bend) / product
        h = -f / by_one
        a2, a3 = 0.5 * h * by_two / by_one, h.square() * by_three / (6.0 * by_one)
        above, below = 1.0 + a2, 1.0 + 2.0 * a2 + a3
        step = h * torch.where((above > 0) & (below > 0), above / below, 1.0)
        smaller = torch.minimum(T, S)
        size = torch.maximum(torch.maximum(a2.abs(), a3.abs().sqrt()), 0.3 * h.abs() / smaller)
        error = h.abs() * size * size.square()
        allowed = 0.25 * noise / slope + 2.0 * eps * smaller

        low, high = torch.where(f > 0, delta, self.low), torch.where(f < 0, delta, self.high)
        to, middle = delta + step, 0.5 * (low + high)
        outside = (to <= low) | (to >= high)
        to = torch.where(to <= low, torch.where(low > -end, middle, low), to)
        to = torch.where(to >= high, torch.where(high < end, middle, high), to)
        return Search(torch.where(done, delta, to), low, high, done | (~outside & (error <= allowed)), clamped)


class Solution(NamedTuple):
    """The result of a solver: delta (N, 1), and masks (N, 1) of the rows set to 0 and of those clamped at the reach."""

    delta: Float[Tensor, "N 1"]
    fallback: Bool[Tensor, "N 1"]
    clamped: Bool[Tensor, "N 1"]


class Sides(NamedTuple):
    """Both sides' logits, (N, C), and their statistics."""

    u: Tensor
    v: Tensor
    of_u: Statistics
    of_v: Statistics


class Bounds(NamedTuple):
    """tau and the largest |delta|, () each, in the type and on the device of the logits."""

    tau: Tensor
    end: Tensor


FirstLook = Callable[..., tuple[Statistics, Statistics, Search]]


def exact(u: Tensor, v: Tensor, tau: float, reach: float, first_look: FirstLook | None = None) -> Solution:
    """Return the roots of all rows, without gradient; on a CPU only rows that are not done are looked at again.

    Args:
        u: the teacher's logits, (N, C), of the type of the student's.
        v: the student's logits, (N, C).
        tau: half the sum of the temperatures.
        reach: the largest |delta| / tau.
        first_look: does the same as ``first_look_of``, compiled.
    """
    is_cpu, is_double = u.device.type == "cpu", u.dtype == torch.float64
    bounds = Bounds(u.new_full((), tau), u.new_full((), min(reach, 1.0 - 16 * torch.finfo(u.dtype).eps) * tau))
    if first_look is None and is_cpu and u.shape[1] <= FEW:
        sides = Sides(u, v, statistics(u), statistics(v))
        a, b = sides.of_u.std, sides.of_v.std
        flat = sides.of_u.flat | sides.of_v.flat
        start = (tau * (a - b) / (a + b)).clamp(-bounds.end, bounds.end)
        search = Search(torch.where(flat, 0.0, start), -bounds.end, bounds.end, flat, flat & False)
        search = search.advance(sides, bounds)
    else:
        *rows, search = (first_look or first_look_of)(u, v, *bounds)
        sides = Sides(u, v, *rows)
        flat = sides.of_u.flat | sides.of_v.flat
    if not is_cpu:
        for _ in range(FIXED + is_double - 1):
            search = search.advance(sides, bounds)
        return Solution(search.delta, flat, search.clamped)
    delta, clamped, rows = search.delta, search.clamped, None
    for _ in range(LOOKS - 1):
        is_open = (~search.done).squeeze(1).nonzero().squeeze(1)
        if not len(is_open):
            break
        rows, search = is_open if rows is None else rows[is_open], Search(*(x[is_open] for x in search))
        of_u, of_v = (Statistics(*(x[rows] for x in side)) for side in sides[2:])
        search = search.advance(Sides(u[rows], v[rows], of_u, of_v), bounds)
        delta, clamped = delta.index_copy(0, rows, search.delta), clamped.index_copy(0, rows, search.clamped)
    return Solution(delta, flat, clamped)


def first_look_of(
    u: Tensor, v: Tensor, tau: Tensor, end: Tensor, is_masked: bool | None = None
) -> tuple[Statistics, Statistics, Search]:
    """Return the statistics and the search after a look at the models' root; ``u`` and ``v`` as in ``statistics``."""
    sides = Sides(u, v, statistics(u, is_masked=is_masked), statistics(v, is_masked=is_masked))
    flat = sides.of_u.flat | sides.of_v.flat
    start = torch.where(flat, 0.0, start_of(sides.of_u, sides.of_v, tau, end))
    search = Search(start, -end, end, flat, flat & False).advance(sides, Bounds(tau, end))
    of_u, of_v = (Statistics(*(x.flatten(1) for x in side)) for side in sides[2:])
    return of_u, of_v, Search(*(x.flatten(1) for x in search))
