"""DTKD's cooperative temperatures: T_t + T_s = 2 tau such that both sides are equally sharp."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import MASK_AT, Policy, Temperatures, mask_constants
from tempering.utils.registry import OVERRIDES
from tempering.utils.search_space import Tau

Solve = Literal["exact", "std", "max", "absmax", "published"]
MASKED = -1e30  # replaces minus infinity where 0 * inf would give NaN; its exp is 0 in float32 and float64
HUGE = 2.0**60  # logits whose square may overflow in float32


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
            if u.device.type != "cpu" or bool((u <= MASK_AT).any() | (v <= MASK_AT).any()):
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
    a, b = centered(u), centered(v)
    flat = a.flat | b.flat
    if solve == "max":
        return _ratio(a.top, b.top, flat, tau, reach)
    start = _ratio(a.std, b.std, flat, tau, reach)
    if solve == "std":
        return start
    return _exact(a, b, start.delta, flat, tau, reach)


class Centered(NamedTuple):
    """Logits minus their mean over the valid classes, with statistics per row, (N, 1) each."""

    z: Float[Tensor, "N C"]
    """centered logits; masked classes are MASKED"""
    n: Tensor
    """number of valid classes, at least 1"""
    top: Tensor
    """maximum"""
    std: Tensor
    """standard deviation over the valid classes, bounded away from zero so that its gradient is finite"""
    flat: Tensor
    """whether the row is constant"""


def centered(z: Float[Tensor, "N C"]) -> Centered:
    """Subtract the mean of each row's valid logits; classes of minus infinity are not valid."""
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("centered")):
        return fast(z)
    valid = ~torch.isneginf(z)
    n = valid.to(z.dtype).sum(-1, keepdim=True).clamp_min(1.0)
    finite = torch.where(valid, z, 0.0)
    top = z.amax(-1, keepdim=True)
    bottom = torch.where(valid, z, torch.inf).amin(-1, keepdim=True)
    info = torch.finfo(z.dtype)
    flat = ~(top - bottom > 4 * info.eps * torch.maximum(top.abs(), bottom.abs()))
    mean = finite.sum(-1, keepdim=True) / n
    off = torch.where(valid, z - mean, 0.0)
    # an exact power of 2, and 1 for all but enormous logits, whose square is not finite
    unit = torch.where(torch.maximum(top.abs(), bottom.abs()) > HUGE, 1 / HUGE, 1.0).to(z.dtype)
    std = ((off * unit).square().sum(-1, keepdim=True) / n).clamp_min(info.tiny).sqrt() / unit
    top = torch.where(torch.isneginf(top), MASKED, top - mean)
    return Centered(torch.where(valid, off, MASKED), n, top, std, flat)


def _ratio(x: Tensor, y: Tensor, bad: Tensor, tau: float, reach: float) -> Solution:
    """delta such that T_t / T_s = x / y, clamped at the reach; 0 on bad rows."""
    x, y = torch.where(bad, 1.0, x), torch.where(bad, 1.0, y)
    delta = tau * (x - y) / (x + y)
    return Solution(delta.clamp(-reach * tau, reach * tau), bad, delta.abs() > reach * tau)


def _exact(
    teacher: Centered, student: Centered, start: Tensor, flat: Tensor, tau: float, reach: float, steps: int = 12
) -> Solution:
    """Safeguarded Newton for f(delta) = LSE(u / (tau + delta)) - LSE(v / (tau - delta)), strictly decreasing.

    Newton's step is computed for T_t T_s f, which has the same root and is nearly linear: f itself grows like 1 / T at
    the ends, where its Newton step only doubles T. Two to four steps are typical; no row of millions took more than
    eight.

    Rows are frozen once |f| or the change of delta is at rounding error: otherwise noise flips the bracket's sign and
    the next step bisects away from the root. A step outside the bracket is replaced by the bracket's end the first time
    and by its midpoint after that.
    """
    v, eps = student.z, torch.finfo(student.z.dtype).eps
    end, close = min(reach, 1.0 - 16 * eps) * tau, 0.25 * eps**0.5
    with torch.no_grad():
        a, b, top_a, top_b = teacher.z.detach(), v.detach(), teacher.top.detach(), student.top.detach()
        low, high = torch.full_like(start, -end), torch.full_like(start, end)
        low_done, high_done = torch.zeros_like(flat), torch.zeros_like(flat)
        delta, done, clamped = start.detach().clamp(-end, end), flat.clone(), torch.zeros_like(flat)
        for _ in range(steps):
            f_u, slope_u = logsumexp_and_slope(a, tau + delta, top_a)
            f_v, slope_v = logsumexp_and_slope(b, tau - delta, top_b)
            f, slope = f_u - f_v, slope_u + slope_v
            noise = 2.0 * eps * (1.0 + f_u.abs() + f_v.abs() + tau * slope)
            done = done | (f.abs() <= noise)
            at_low, at_high = delta <= -end, delta >= end
            clamped = clamped | (~done & ((at_low & (f < 0)) | (at_high & (f > 0))))
            done = done | clamped
            if v.device.type == "cpu" and bool(done.all()):
                break
            low, high = torch.where(f > 0, delta, low), torch.where(f < 0, delta, high)
            low_done, high_done = low_done | (f > 0), high_done | (f < 0)
            newton_slope = slope + 2.0 * delta * f / ((tau + delta) * (tau - delta))
            step = delta + f / torch.where(newton_slope > 0, newton_slope, slope)
            midpoint = 0.5 * (low + high)
            below, above = step <= low, step >= high
            step = torch.where(below, torch.where(low_done, midpoint, low), step)
            step = torch.where(above, torch.where(high_done, midpoint, high), step)
            step = torch.where(done, delta, step)
            # Newton squares the error: after such a small step only rounding error is left
            done = done | (((step - delta).abs() <= close * (tau - delta.abs())) & (step.abs() < end))
            delta = step
    if v.requires_grad and torch.is_grad_enabled():
        delta = _implicit(a, student, delta, ~flat & ~clamped, tau, top_a)
    return Solution(delta, flat, clamped)


def logsumexp_and_slope(z: Tensor, T: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp(z / T) and its negative derivative in T, E_p[z] / T^2, (N, 1) each; ``top`` is the maximum of z."""
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("logsumexp_and_slope")):
        return fast(z, T, top)
    e = ((z - top) / T).exp()
    mass = e.sum(-1, keepdim=True)
    return top / T + mass.log(), (e * z).sum(-1, keepdim=True) / (mass * T.square())


def _implicit(a: Tensor, student: Centered, delta: Tensor, is_free: Tensor, tau: float, top: Tensor) -> Tensor:
    """Add a term of value zero to delta that gives it its implicit derivative in the student's logits."""
    T_s, v = tau - delta, student.z
    b, valid = v.detach(), v > MASKED
    slope = logsumexp_and_slope(a, tau + delta, top)[1] + logsumexp_and_slope(b, T_s, student.top.detach())[1]
    q = torch.softmax(b / T_s, -1)
    by_v = torch.where(is_free & valid, -(q - 1.0 / student.n) / (T_s * slope), 0.0)
    shift = torch.where(valid, v - b, 0.0)
    return delta + (by_v * shift).sum(-1, keepdim=True)
