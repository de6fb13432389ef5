"""DTKD's cooperative temperatures: T_t + T_s = 2 tau such that both sides are equally sharp.

A *look* of the exact solver evaluates both sides at one delta, with two exp() per entry, and is what the solver costs:

- It starts at the root of a model of each row (``Model``) or, where that takes longer than a look, at the ratio of
  the standard deviations.
- A look also gives the second and third cumulants of the logits under the softmax, and so three derivatives. The step
  is Householder's of the third order, whose error is of the fourth.
- The same numbers bound the step's error. Rows for which it may exceed the rounding error of the equation are looked at
  again, inside a bracket.

``docs/decisions/017-one-look.md`` has the reasons and the measurements.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import MASK_AT, Policy, Temperatures, mask_constants
from tempering.utils.registry import OVERRIDES
from tempering.utils.search_space import Tau

Solve = Literal["exact", "std", "max", "absmax", "published"]
HUGE = 2.0**60  # logits whose square may overflow in float32
LOOKS = 12  # at most, for rows evaluated again; no row of millions took more than six
ROUNDING = 0.25  # the error that a step may have, in units of the equation's noise and twice the temperature's
FEW = 512  # classes up to which the model of a row takes longer than a look at a few rows on a CPU, in eager mode
FIXED = 2  # on a device in eager mode, where selecting rows would synchronize; one more in float64


class Sharpness(Policy):
    """T_t = tau + delta and T_s = tau - delta, (N, 1) each, with one delta per row, |delta| <= reach * tau.

    The sharper side (the larger logsumexp) gets the higher temperature. ``solve`` selects how delta is computed:

    - "exact": the one root in (-tau, tau) of logsumexp(u / (tau + delta)) = logsumexp(v / (tau - delta)), u and v the
      teacher's and the student's *centered* logits. Centering matters: softmax is invariant to a shift and logsumexp is
      not. For centered logits that are not constant the root exists and is unique. As tau -> 0 it tends to "max", as
      tau -> infinity to "std".
    - "std": T_t / T_s = std(u) / std(v).
    - "max": T_t / T_s = max(u) / max(v), both centered: the paper's closed form without its dependence on shifts.
    - "published": T_t = 2x / (x + y) tau, x and y the maxima of the logits without centering, as in the released code.
      It depends on shifts of the logits. Where the released code divides by zero or gives a negative temperature, the
      row falls back to tau on both sides.
    - "absmax": as "published", with the maxima of |logits|, as the paper's text has it.

    Classes of minus infinity are masked, and so are those that a constant such as -1e4, -1e9 or finfo.min marks (see
    ``mask_constants``): they count neither in the mean nor in the spread.

    Rows that are constant on either side (including those with a single unmasked class) fall back to tau. ``report``
    counts the rows that fell back and the rows clamped at ``reach``.

    Computed in at least float32. In float32 the root of "exact" is as accurate as the difference of the two logsumexps:
    1e-5 at tau 4 for logits with a spread of a few units, 1e-2 for logits with a spread of a tenth, whose sharpness is
    log C up to its last digits and whose temperatures hardly matter.

    The temperatures carry no gradient, unless ``differentiable``: then "published" uses the released code's gradient,
    "absmax", "max" and "std" the analogous one, and "exact" the implicit derivative d delta / d v = -(softmax(v / T_s)
    - 1/C) / (T_s (E_p[u] / T_t^2 + E_q[v] / T_s^2)); first order only.

    Reference: Wei & Bai, "Dynamic Temperature Knowledge Distillation", 2024, arXiv:2404.12711, equations 2 to 5, and
    the author's erratum to 4 and 5: no single delta solves equation 4 unless u is a multiple of v, so "exact" solves
    equation 3, the objective itself.
    """

    paper = "arXiv:2404.12711"

    def __init__(
        self, tau: Tau = 4.0, *, solve: Solve = "exact", reach: float = 0.9, differentiable: bool = False
    ) -> None:
        super().__init__()
        if solve not in get_args(Solve):
            raise ValueError(f"Sharpness needs solve 'exact', 'std', 'max', 'absmax' or 'published'; got {solve!r}.")
        if not 0.0 < reach <= 1.0:
            raise ValueError(f"Sharpness needs reach in (0, 1], the largest |delta| / tau; got {reach!r}.")
        self.tau, self.reach, self.differentiable = tau, reach, differentiable
        self.solve: Solve = solve
        self.shift_invariant = solve not in ("published", "absmax")
        self.counts: dict[str, Tensor] = {}
        self.warned = False

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.with_reference(self.tau, rows, progress)

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        with_grad = self.differentiable and rows.student.requires_grad and torch.is_grad_enabled()
        with torch.autocast(rows.student.device.type, enabled=False), torch.set_grad_enabled(with_grad):
            u, v = upcast_to_float32(rows.teacher), upcast_to_float32(rows.student)
            # a minimum is one pass without a copy; it is NaN where any logit is, and then says nothing of the others
            if u.device.type != "cpu" or (
                u.numel() and not bool(torch.minimum(u.detach().amin(), v.detach().amin()) > MASK_AT)
            ):
                u, v = mask_constants(u), mask_constants(v)
            solution = solve_delta(u, v, tau=tau, solve=self.solve, reach=self.reach)
        has_weight = True if rows.weight is None else (rows.weight > 0).unsqueeze(1)
        self.counts = {
            "fallback": (solution.fallback & has_weight).sum(),
            "clamped": (solution.clamped & has_weight).sum(),
        }
        if self.solve == "published" and not self.warned:
            self._warn_once(len(rows))
        return Temperatures(tau - solution.delta, tau + solution.delta)

    def report(self) -> dict[str, Tensor]:
        """Numbers of rows in the last call that fell back to tau, and of rows clamped at the reach."""
        return dict(self.counts)

    def _warn_once(self, rows: int) -> None:
        # checked on the CPU only: on a device it would synchronize, and report() is logged anyway
        fallback = self.counts["fallback"]
        if fallback.device.type != "cpu" or not int(fallback):
            return
        self.warned = True
        warnings.warn(
            f"Sharpness(solve='published'): {int(fallback)} of {rows} rows have a maximum logit that is not positive, "
            "where the released code gives NaN or a negative temperature; they use tau. solve='exact' handles them.",
            stacklevel=5,
        )


class Solution(NamedTuple):
    """The result of a solver: delta (N, 1), and masks (N, 1) of the rows set to 0 and of those clamped at the reach."""

    delta: Float[Tensor, "N 1"]
    fallback: Bool[Tensor, "N 1"]
    clamped: Bool[Tensor, "N 1"]


def solve_delta(
    teacher: Float[Tensor, "N C"], student: Float[Tensor, "N C"], *, tau: float, solve: Solve, reach: float
) -> Solution:
    """Return delta per row, by which the temperatures differ from tau, with masks of the special cases."""
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("solve_delta")):
        return fast(teacher, student, tau=tau, solve=solve, reach=reach)
    u, v = upcast_to_float32(teacher), upcast_to_float32(student)
    if solve in ("published", "absmax"):
        if solve == "absmax":
            u, v = (torch.where(torch.isneginf(z), 0.0, z.abs()) for z in (u, v))
        x, y = u.amax(-1, keepdim=True), v.amax(-1, keepdim=True)
        # a maximum below this fraction of the other gives a temperature near zero, NaN in the released code
        floor = 1e-4
        bad = (x <= floor * y.abs().clamp_min(1.0)) | (y <= floor * x.abs().clamp_min(1.0))
        return _ratio(x, y, bad, tau, reach)
    u, v = u.to(torch.promote_types(u.dtype, v.dtype)), v.to(torch.promote_types(u.dtype, v.dtype))
    if solve != "exact":
        a, b = statistics(u), statistics(v)
        flat = a.flat | b.flat
        return _ratio(a.top, b.top, flat, tau, reach) if solve == "max" else _ratio(a.std, b.std, flat, tau, reach)
    with torch.no_grad():
        solution = exact(u, v, tau, reach)
    if v.requires_grad and torch.is_grad_enabled():
        delta = _implicit(u, v, solution.delta, ~solution.fallback & ~solution.clamped, tau)
        solution = solution._replace(delta=delta)
    return solution


def _ratio(x: Tensor, y: Tensor, bad: Tensor, tau: float, reach: float) -> Solution:
    """delta such that T_t / T_s = x / y, clamped at the reach; 0 on bad rows."""
    x, y = torch.where(bad, 1.0, x), torch.where(bad, 1.0, y)
    delta = tau * (x - y) / (x + y)
    return Solution(delta.clamp(-reach * tau, reach * tau), bad, delta.abs() > reach * tau)


def _implicit(u: Tensor, v: Tensor, delta: Tensor, is_free: Tensor, tau: float) -> Tensor:
    """Add a term of value zero to delta that gives it its implicit derivative in the student's logits."""
    T_t, T_s, fixed = tau + delta, tau - delta, v.detach()
    of_v = statistics(fixed)
    slope = look(u, T_t, statistics(u)).mean / T_t + look(fixed, T_s, of_v).mean / T_s
    q = torch.softmax(fixed / T_s, -1)
    is_free = is_free & ~torch.isneginf(fixed)
    by_v = torch.where(is_free, -(q - 1.0 / of_v.n) / (T_s * slope), 0.0)
    shift = torch.where(is_free, v - fixed, 0.0)
    return delta + (by_v * shift).sum(-1, keepdim=True)


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


def statistics(z: Tensor, *, is_tame: bool | None = None) -> Statistics:
    """Return the statistics of each row, with gradient.

    Args:
        z: (N, C), or (N, K, C / K) and then the statistics are (N, 1, 1); see ``in_pieces``.
        is_tame: whether no |logit| is known to be above ``HUGE``, and so none masked; by default a CPU finds out.
    """
    info, dims, total = torch.finfo(z.dtype), (-1, -2)[: z.ndim - 1], SUM if z.ndim == 2 else in_pieces
    peak, bottom = z.amax(dims, keepdim=True), z.amin(dims, keepdim=True)
    size = torch.maximum(peak.abs(), bottom.abs())
    if is_tame is None:
        is_tame = z.device.type == "cpu" and bool((size <= HUGE).all())
    if is_tame:
        n = torch.full_like(peak, z[:1].numel() if len(z) else 1)
        mean = total(z) / n
        std = (total((z - mean).square()) / n).clamp_min(info.tiny).sqrt()
        return Statistics(n, mean, peak, peak - mean, std, ~(peak - bottom > 4 * info.eps * size))
    valid = ~torch.isneginf(z)
    bottom = torch.where(valid, z, torch.inf).amin(dims, keepdim=True)
    size = torch.maximum(peak.abs(), bottom.abs())
    n = total(valid.to(z.dtype)).clamp_min(1.0)
    mean = total(torch.where(valid, z, 0.0)) / n
    # an exact power of 2, and 1 for all but enormous logits, whose square is not finite
    unit = torch.where(size > HUGE, 1 / HUGE, 1.0).to(z.dtype)
    off = torch.where(valid, z - mean, 0.0) * unit
    std = (total(off.square()) / n).clamp_min(info.tiny).sqrt() / unit
    top = torch.where(torch.isneginf(peak), info.min, peak - mean)
    return Statistics(n, mean, peak, top, std, ~(peak - bottom > 4 * info.eps * size))


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


SUM = functools.partial(torch.sum, dim=-1, keepdim=True)


def in_pieces(x: Tensor) -> Tensor:
    """Sum (N, K, C / K) to (N, 1, 1) in two steps.

    Inductor sums up to 4,096 numbers in registers, and more of them through memory, at twice the time of an exp().
    """
    return SUM(x).sum(-2, keepdim=True)


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
        f, slope = u.lse - v.lse, u.mean / T + v.mean / S  # slope is -f', both logsumexps are at least log n
        noise = 2.0 * eps * (1.0 + u.lse + v.lse + tau * slope)
        is_root = f.abs() <= noise
        done = self.done | is_root
        ended = (delta.abs() >= end) & (f * delta > 0) & ~done
        clamped, done = self.clamped | ended, done | ended

        T2, S2 = T.square(), S.square()
        bend = torch.add(u.variance, u.mean, alpha=2) / T2 - torch.add(v.variance, v.mean, alpha=2) / S2
        twist = torch.add(u.third, u.variance + u.mean, alpha=6) / (T2 * T)
        twist = twist + torch.add(v.third, v.variance + v.mean, alpha=6) / (S2 * S)
        # minus the first, and the second and minus the third derivative of F, over T_t T_s; -F' > 0 near the root
        weight = 2.0 / (T * S)
        lean = weight * delta
        by_one = slope + lean * f
        by_one = torch.where(by_one > 0, by_one, slope)
        by_two = torch.add(bend - weight * f, lean * slope, alpha=2)
        by_three = torch.sub(twist, weight * (slope - delta * bend), alpha=3)
        h = f / by_one
        by_h = h / by_one
        a2, a3 = -0.5 * by_h * by_two, by_h * h * by_three / 6.0
        above, below = 1.0 + a2, 1.0 + 2.0 * a2 + a3
        to = delta + h * torch.where((above > 0) & (below > 0), above / below, 1.0)
        smaller, h = torch.minimum(T, S), h.abs()
        size = torch.maximum(torch.maximum(a2.abs(), a3.abs().sqrt()), 0.3 * h / smaller)
        error = h * size * size.square()
        allowed = ROUNDING * noise / slope + 2.0 * ROUNDING * eps * smaller

        low, high = torch.where(f > 0, delta, self.low), torch.where(f < 0, delta, self.high)
        is_below, is_above, middle = to <= low, to >= high, 0.5 * (low + high)
        to = torch.where(is_below, torch.where(low > -end, middle, low), to)
        to = torch.where(is_above, torch.where(high < end, middle, high), to)
        outside = is_below | is_above
        # a root by its noise moves once more, since f is known no better than here
        to = torch.where(self.done | ended | (is_root & outside), delta, to)
        return Search(to, low, high, done | (~outside & (error <= allowed)), clamped)


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
        rows, search = is_open if rows is None else rows[is_open], Search(*(x.index_select(0, is_open) for x in search))
        # a look needs no more of the statistics
        of_u, of_v = (
            side._replace(peak=side.peak.index_select(0, rows), top=side.top.index_select(0, rows))
            for side in sides[2:]
        )
        search = search.advance(Sides(u.index_select(0, rows), v.index_select(0, rows), of_u, of_v), bounds)
        delta, clamped = delta.index_copy(0, rows, search.delta), clamped.index_copy(0, rows, search.clamped)
    return Solution(delta, flat, clamped)


def first_look_of(
    u: Tensor, v: Tensor, tau: Tensor, end: Tensor, is_tame: bool | None = None
) -> tuple[Statistics, Statistics, Search]:
    """Return the statistics and the search after a look at the models' root; ``u`` and ``v`` as in ``statistics``."""
    sides = Sides(u, v, statistics(u, is_tame=is_tame), statistics(v, is_tame=is_tame))
    flat = sides.of_u.flat | sides.of_v.flat
    start = torch.where(flat, 0.0, start_of(sides.of_u, sides.of_v, tau, end))
    search = Search(start, -end, end, flat, flat & False).advance(sides, Bounds(tau, end))
    of_u, of_v = (Statistics(*(x.flatten(1) for x in side)) for side in sides[2:])
    return of_u, of_v, Search(*(x.flatten(1) for x in search))
