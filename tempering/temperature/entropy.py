"""Equal entropies: T_t + T_s = 2 tau such that both softened sides have the same entropy."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.sharpness import statistics
from tempering.temperature.standardized import spread
from tempering.utils.search_space import Tau


class Entropy(Policy):
    """T_t = tau + delta and T_s = tau - delta, (N, 1) each, with H(softmax(u / T_t)) = H(softmax(v / T_s)) per row.

    The entropy of a softened row increases with its temperature, so there is one root, found to rounding error by
    safeguarded Newton steps in the ratio of the entropies' logarithms; converged rows are frozen. |delta| <= reach *
    tau: rows whose root is beyond are clamped. Rows that are constant on either side get tau. ``report`` counts the
    rows that fell back and the clamped rows.

    Equals Sharpness(tau) with entropy instead of logsumexp. Computed in at least float32, without gradient.

    Reference: no publication of this policy; the objective is that of Wei & Bai, 2024, arXiv:2404.12711, equation 3,
    with another measure of sharpness.
    """

    paper = "none: arXiv:2404.12711 with the entropy as its measure"

    def __init__(self, tau: Tau = 4.0, *, reach: float = 0.9) -> None:
        super().__init__()
        if not 0.0 < reach <= 1.0:
            raise ValueError(f"Entropy needs reach in (0, 1], the largest |delta| / tau; got {reach!r}.")
        self.tau, self.reach = tau, reach
        self.counts: dict[str, Tensor] = {}

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.with_reference(self.tau, rows, progress)

    @torch.no_grad()
    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        u, v = upcast_to_float32(rows.teacher), upcast_to_float32(rows.student)
        dtype = torch.promote_types(u.dtype, v.dtype)
        u, v = u.to(dtype), v.to(dtype)
        std = spread(u, ddof=0), spread(v, ddof=0)
        is_constant = statistics(u).flat | statistics(v).flat
        start = torch.where(is_constant, 0.0, tau * (std[0] - std[1]) / (std[0] + std[1]))
        delta, clamped = _solve(u, v, start, is_constant, tau, self.reach)
        has_weight = True if rows.weight is None else (rows.weight > 0).unsqueeze(1)
        self.counts = {"fallback": (is_constant & has_weight).sum(), "clamped": (clamped & has_weight).sum()}
        return Temperatures(tau - delta, tau + delta)

    def report(self) -> dict[str, Tensor]:
        """Numbers of rows in the last call that fell back to tau, and of rows clamped at the reach."""
        return dict(self.counts)


def _solve(
    u: Tensor, v: Tensor, start: Tensor, is_constant: Tensor, tau: float, reach: float, steps: int = 12
) -> tuple[Tensor, Tensor]:
    """Return delta (N, 1) and a mask of the rows clamped at the reach, (N, 1)."""
    eps = torch.finfo(u.dtype).eps
    u, v = _subtract_max(u), _subtract_max(v)
    end = min(reach, 1.0 - 16 * eps) * tau
    low, high = torch.full_like(start, -end), torch.full_like(start, end)
    low_done, high_done = torch.zeros_like(is_constant), torch.zeros_like(is_constant)
    delta, done, clamped = start.clamp(-end, end), is_constant.clone(), torch.zeros_like(is_constant)
    for _ in range(steps):
        (h_u, by_u), (h_v, by_v) = _entropy(u, tau + delta), _entropy(v, tau - delta)
        gap = h_u - h_v
        noise = 4.0 * eps * (1.0 + h_u + h_v + (tau + delta) * by_u + (tau - delta) * by_v)
        done = done | (gap.abs() <= noise)
        clamped = clamped | (~done & (((delta <= -end) & (gap > 0)) | ((delta >= end) & (gap < 0))))
        done = done | clamped
        if u.device.type == "cpu" and bool(done.all()):
            break
        low, high = torch.where(gap < 0, delta, low), torch.where(gap > 0, delta, high)
        low_done, high_done = low_done | (gap < 0), high_done | (gap > 0)
        f, slope = h_u.log() - h_v.log(), by_u / h_u + by_v / h_v
        newton_slope = slope - 2.0 * delta * f / ((tau + delta) * (tau - delta))
        step = delta - f / torch.where(newton_slope > 0, newton_slope, slope)
        done = done | ((step - delta).abs() <= 2.0 * eps * tau)
        midpoint = 0.5 * (low + high)
        in_bracket = (step > low) & (step < high)
        # a step outside the bracket is replaced by an end that was not evaluated yet, else by the midpoint
        fallback = torch.where(gap > 0, torch.where(low_done, midpoint, low), torch.where(high_done, midpoint, high))
        delta = torch.where(done, delta, torch.where(in_bracket, step, fallback))
    return delta, clamped


def _subtract_max(z: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Subtract each row's maximum, before dividing by the temperature, to keep precision under a shift."""
    return z - z.amax(-1, keepdim=True)


def _entropy(z: Float[Tensor, "N C"], T: Float[Tensor, "N 1"]) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
    """The entropy of softmax(z / T) in nats and its derivative in T, (N, 1) each, for logits with maximum 0."""
    x = z / T
    e = x.exp()
    mass = e.sum(-1, keepdim=True)
    p = e / mass
    x = torch.where(p > 0, x, 0.0)
    mean = (p * x).sum(-1, keepdim=True)
    return mass.log() - mean, (p * (x - mean).square()).sum(-1, keepdim=True) / T
