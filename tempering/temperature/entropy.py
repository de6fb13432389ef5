"""Equal entropies: T_t + T_s = 2 tau, set so that both softened sides have one entropy."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive
from tempering.temperature.sharpness import centered
from tempering.temperature.standardized import spread
from tempering.utils.search_space import Temperature


class Entropy(Policy):
    """T_t = tau + delta and T_s = tau - delta, (N, 1) each: H(softmax(u / T_t)) = H(softmax(v / T_s)) a row.

    The entropy of a softened row rises with its temperature, so there is one root, found to rounding by safeguarded
    Newton steps in the ratio of the entropies' logarithms; rows that are there are frozen. |delta| <= reach * tau: a
    row whose root lies beyond is held at the end. A row that is constant on either side keeps tau. ``report`` counts
    the rows that fell back and the rows held.

    It is Sharpness(tau) with entropy for logsumexp. Computed in float32 at least, without gradient.

    Reference: none of its own; the objective is that of Wei & Bai, 2024, arXiv:2404.12711, equation 3, with another
    measure of sharpness.
    """

    paper = "none: arXiv:2404.12711 with the entropy as its measure"

    def __init__(self, tau: Annotated[float, Temperature()] = 4.0, *, reach: float = 0.9) -> None:
        super().__init__()
        check_positive("Entropy", tau=tau)
        if not 0.0 < reach <= 1.0:
            raise ValueError(f"Entropy needs reach in (0, 1], the largest |delta| / tau; got {reach!r}.")
        self.tau, self.reach = tau, reach
        self.counts: dict[str, Tensor] = {}

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.with_reference(self.tau, rows, progress)

    @torch.no_grad()
    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        u, v = upcast_to_float32(rows.teacher), upcast_to_float32(rows.student)
        kind = torch.promote_types(u.dtype, v.dtype)
        u, v = u.to(kind), v.to(kind)
        spreads = spread(u, ddof=0), spread(v, ddof=0)
        flat = centered(u).flat | centered(v).flat
        start = torch.where(flat, 0.0, tau * (spreads[0] - spreads[1]) / (spreads[0] + spreads[1]))
        delta, held = _solve(u, v, start, flat, tau, self.reach)
        counted = True if rows.weight is None else (rows.weight > 0).unsqueeze(1)
        self.counts = {"fallback": (flat & counted).sum(), "clamped": (held & counted).sum()}
        return Temperatures(tau - delta, tau + delta)

    def report(self) -> dict[str, Tensor]:
        """Rows of the last call that fell back to tau, and rows held at the reach."""
        return dict(self.counts)


def _solve(
    u: Tensor, v: Tensor, start: Tensor, flat: Tensor, tau: float, reach: float, steps: int = 12
) -> tuple[Tensor, Tensor]:
    """delta (N, 1), and which rows are held at an end of the reach."""
    eps = torch.finfo(u.dtype).eps
    u, v = _topped(u), _topped(v)
    end = min(reach, 1.0 - 16 * eps) * tau
    low, high = torch.full_like(start, -end), torch.full_like(start, end)
    low_seen, high_seen = torch.zeros_like(flat), torch.zeros_like(flat)
    delta, done, held = start.clamp(-end, end), flat.clone(), torch.zeros_like(flat)
    for _ in range(steps):
        (h_u, by_u), (h_v, by_v) = _entropy(u, tau + delta), _entropy(v, tau - delta)
        gap = h_u - h_v
        noise = 4.0 * eps * (1.0 + h_u + h_v + (tau + delta) * by_u + (tau - delta) * by_v)
        done = done | (gap.abs() <= noise)
        held = held | (~done & (((delta <= -end) & (gap > 0)) | ((delta >= end) & (gap < 0))))
        done = done | held
        if u.device.type == "cpu" and bool(done.all()):
            break
        low, high = torch.where(gap < 0, delta, low), torch.where(gap > 0, delta, high)
        low_seen, high_seen = low_seen | (gap < 0), high_seen | (gap > 0)
        f, slope = h_u.log() - h_v.log(), by_u / h_u + by_v / h_v
        straight = slope - 2.0 * delta * f / ((tau + delta) * (tau - delta))
        step = delta - f / torch.where(straight > 0, straight, slope)
        done = done | ((step - delta).abs() <= 2.0 * eps * tau)
        middle = 0.5 * (low + high)
        inside = (step > low) & (step < high)
        # a step that leaves the bracket goes to an end that was not looked at yet, else to the middle
        beyond = torch.where(gap > 0, torch.where(low_seen, middle, low), torch.where(high_seen, middle, high))
        delta = torch.where(done, delta, torch.where(inside, step, beyond))
    return delta, held


def _topped(z: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """The logits less their largest: before they are divided, so that nothing is lost to a shift."""
    return z - z.amax(-1, keepdim=True)


def _entropy(z: Float[Tensor, "N C"], T: Float[Tensor, "N 1"]) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
    """The entropy of softmax(z / T) in nats and its derivative in T, (N, 1) each, of logits whose largest is 0."""
    x = z / T
    e = x.exp()
    mass = e.sum(-1, keepdim=True)
    p = e / mass
    x = torch.where(p > 0, x, 0.0)
    mean = (p * x).sum(-1, keepdim=True)
    return mass.log() - mean, (p * (x - mean).square()).sum(-1, keepdim=True) / T
