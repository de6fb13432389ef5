"""DTKD's cooperative temperatures: T_t + T_s = 2 tau such that both sides are equally sharp."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import MASK_AT, Policy, Temperatures, mask_constants
from tempering.temperature.sharpness_solver import Solution, exact, look, statistics
from tempering.utils.registry import OVERRIDES
from tempering.utils.search_space import Tau

Solve = Literal["exact", "std", "max", "published"]


class Sharpness(Policy):
    """T_t = tau + delta and T_s = tau - delta, (N, 1) each, with one delta per row, |delta| <= reach * tau.

    The sharper side (the larger logsumexp) gets the higher temperature. ``solve`` selects how delta is computed:

    - "exact": the one root in (-tau, tau) of logsumexp(u / (tau + delta)) = logsumexp(v / (tau - delta)), u and v the
      teacher's and the student's *centered* logits. Centering matters: softmax is invariant to a shift and logsumexp is
      not. For centered logits that are not constant the root exists and is unique. As tau -> 0 it tends to "max", as
      tau -> infinity to "std".
    - "std": T_t / T_s = std(u) / std(v).
    - "max": T_t / T_s = max(u) / max(v), both centered: the paper's closed form without its dependence on shifts.
    - "published": T_t = 2x / (x + y) tau, x and y the maxima of the logits without centering, as in the released code
      (the text says the maximum of |logits|). It depends on shifts of the logits. Where the released code divides by
      zero or gives a negative temperature, the row falls back to tau on both sides.

    Classes of minus infinity are masked, and so are those that a constant such as -1e4, -1e9 or finfo.min marks (see
    ``mask_constants``): they count neither in the mean nor in the spread.

    Rows that are constant on either side (including those with a single unmasked class) fall back to tau. ``report``
    counts the rows that fell back and the rows clamped at ``reach``.

    Computed in at least float32. In float32 the root of "exact" is as accurate as the difference of the two logsumexps:
    1e-5 at tau 4 for logits with a spread of a few units, 1e-2 for logits with a spread of a tenth, whose sharpness is
    log C up to its last digits and whose temperatures hardly matter.

    The temperatures carry no gradient, unless ``differentiable``: then "published" uses the released code's gradient,
    "max" and "std" the analogous one, and "exact" the implicit derivative d delta / d v = -(softmax(v / T_s) - 1/C) /
    (T_s (E_p[u] / T_t^2 + E_q[v] / T_s^2)); first order only.

    Reference: Wei & Bai, "Dynamic Temperature Knowledge Distillation", 2024, arXiv:2404.12711, equations 2 to 5, and
    the author's erratum to 4 and 5: no single delta solves equation 4 unless u is a multiple of v, so "exact" solves
    equation 3, the objective itself.
    """

    paper = "arXiv:2404.12711"

    def __init__(
        self, tau: Tau = 4.0, *, solve: Solve = "exact", reach: float = 0.9, differentiable: bool = False
    ) -> None:
        super().__init__()
        if solve not in ("exact", "std", "max", "published"):
            raise ValueError(f"Sharpness needs solve 'exact', 'std', 'max' or 'published'; got {solve!r}.")
        if not 0.0 < reach <= 1.0:
            raise ValueError(f"Sharpness needs reach in (0, 1], the largest |delta| / tau; got {reach!r}.")
        self.tau, self.reach, self.differentiable = tau, reach, differentiable
        self.solve: Solve = solve
        self.shift_invariant = solve != "published"
        self.counts: dict[str, Tensor] = {}
        self.warned = False

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.with_reference(self.tau, rows, progress)

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        with_grad = self.differentiable and rows.student.requires_grad and torch.is_grad_enabled()
        with torch.autocast(rows.student.device.type, enabled=False), torch.set_grad_enabled(with_grad):
            u, v = upcast_to_float32(rows.teacher), upcast_to_float32(rows.student)
            # a minimum is one pass without a copy; NaN compares as no mask, here as there
            if u.device.type != "cpu" or any(z.numel() and bool(z.detach().amin() <= MASK_AT) for z in (u, v)):
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


def solve_delta(
    teacher: Float[Tensor, "N C"], student: Float[Tensor, "N C"], *, tau: float, solve: Solve, reach: float
) -> Solution:
    """Return delta per row, by which the temperatures differ from tau, with masks of the special cases."""
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("solve_delta")):
        return fast(teacher, student, tau=tau, solve=solve, reach=reach)
    u, v = upcast_to_float32(teacher), upcast_to_float32(student)
    if solve == "published":
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
