"""The KL family with closed-form gradients, and the functions that Inductor or Triton can replace within a chunk.

For constant temperatures, the gradient of L = scale KL(p || q), p = softmax(u / T_t) and q = softmax(v / T_s), is dL/dv
= scale / T_s (q - p). Value and gradient are computed in one pass over both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempering.objectives import cross_entropy, kl, log_softmax, require_labels
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature import sharpness
from tempering.temperature.base import Temperatures
from tempering.utils.registry import override_with

Fast = dict[str, Callable[..., Any]]


class _ClosedForm(torch.autograd.Function):
    """A value per row with a precomputed gradient in the logits. Backward consumes the gradient, so it runs once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, student: Tensor) -> Tensor:
        ctx.slope = slope
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:  # pyright: ignore
        slope, ctx.slope = ctx.slope, None
        return None, None, slope.mul_(grads[0].unsqueeze(1))


def divergence_and_slope(u: Tensor, v: Tensor, T_t: Tensor, T_s: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """scale KL(p || q), (n,), and its gradient in ``v``, (n, C); masks are handled as in ``objectives.kl``."""
    (et, mt, lt), (es, ms, ls) = _exponents(u / T_t), _exponents(v / T_s)
    p, q = et / mt, es / ms
    logp, logq = lt - mt.log(), ls - ms.log()
    is_masked = p == 0
    value = torch.where(is_masked, 0.0, p * (logp - logq)).sum(-1)
    # rows with all classes masked have no gradient, as in objectives.masked
    empty = torch.isneginf(v.amax(-1, keepdim=True))
    factor = torch.where(empty, 0.0, scale.unsqueeze(1) / T_s)
    return scale * value.clamp_min(0.0), (q - p) * factor


def _exponents(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - max), its sum over the classes, (n, 1), and z - max, shared by softmax and log softmax.

    Rows with all classes masked are uniform.
    """
    top = z.amax(-1, keepdim=True)
    shifted = torch.where(torch.isneginf(top), 0.0, z - top)
    e = shifted.exp()
    return e, e.sum(-1, keepdim=True), shifted


def cross_entropy_and_slope(v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(v)[target], (n,), and its gradient in ``v``, (n, C); both 0 where the target is negative.

    NaN for a target >= C, which is not checked on a device.
    """
    logq = log_softmax(v)
    has_label = (target >= 0).unsqueeze(1)
    is_label = torch.arange(v.shape[1], device=v.device) == target.unsqueeze(1)
    value = torch.where(target < v.shape[1], -torch.where(is_label, logq, 0.0).sum(-1), torch.nan)
    empty = torch.isneginf(v.amax(-1, keepdim=True))
    return value, torch.where(has_label & ~empty, logq.exp() - is_label.to(logq.dtype), 0.0)


class FastFunctions:
    """The overriding functions for one pass over chunks; records which of them were used.

    Args:
        compiled: Inductor's or Triton's functions by name, {} for none; the others run in eager mode.
        double: whether they compute float64 in float64; Triton's kernels sum in float32.
    """

    def __init__(self, compiled: Fast, *, double: bool = True) -> None:
        self.compiled, self.double = compiled, double
        self.used: set[str] = set()
        self.plain: set[str] = set()

    def functions(self) -> Fast:
        """The functions for ``override_with``."""
        solvers = {"solve_delta": self._solve_delta} if "exact" in self.compiled else {}
        return {"kl": self._kl, "cross_entropy": self._cross_entropy, **solvers}

    def _kl(self, rows: Rows, T: Temperatures) -> Tensor:
        if any(x is not None and x.requires_grad for x in T) or not _has_logits(rows):
            self.plain.add("kl")
            with override_with({}):
                return kl(rows, T)
        self.used.add("kl")
        n = len(rows)
        u, v = upcast_to_float32(rows.teacher), upcast_to_float32(rows.student)
        fast = self._fast("kl", divergence_and_slope, torch.promote_types(u.dtype, v.dtype))
        T_t, T_s, scale = T.teacher.expand(n, 1), T.student.expand(n, 1), T.scale.expand(n)
        return _differentiable(rows.student, *fast(u, v.detach(), T_t, T_s, scale))

    def _cross_entropy(self, rows: Rows) -> Tensor:
        is_plain = rows.label_smoothing or (rows.target is not None and rows.target.ndim == 2)
        if not _has_logits(rows) or is_plain:
            self.plain.add("cross_entropy")
            with override_with({}):
                return cross_entropy(rows)
        target = require_labels(rows, "cross_entropy").long()
        self.used.add("cross_entropy")
        fast = self._fast("cross_entropy", cross_entropy_and_slope, rows.student.dtype)
        return _differentiable(rows.student, *fast(upcast_to_float32(rows.student).detach(), target))

    def _fast(self, name: str, plain: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        return plain if dtype == torch.float64 and not self.double else self.compiled.get(name, plain)

    def _solve_delta(self, u: Tensor, v: Tensor, *, tau: float, solve: sharpness.Solve, reach: float) -> Any:
        with_grad = v.requires_grad and torch.is_grad_enabled()
        is_wide = not self.double and torch.float64 in (u.dtype, v.dtype)
        if solve != "exact" or not v.numel() or with_grad or is_wide:
            with override_with({}):
                return sharpness.solve_delta(u, v, tau=tau, solve=solve, reach=reach)
        self.used.add("temperature")
        return self.compiled["exact"](u.detach(), v.detach(), tau, reach)


def _has_logits(rows: Rows) -> bool:
    return len(rows) > 0 and rows.student.shape[1] > 0


def _differentiable(student: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    if not (student.requires_grad and torch.is_grad_enabled()):
        return value
    return _ClosedForm.apply(value, slope.to(student.dtype), student)  # pyright: ignore[reportReturnType]
