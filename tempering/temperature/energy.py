"""EnergyKD: three temperatures, chosen by the energy of the teacher's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.search_space import Positive, Tau


class Energy(Policy):
    """T = low_energy, tau or high_energy for rows of low, middle or high energy -4 logsumexp(u / 4), on both sides.

    Args:
        tau: temperature of rows between the bounds.
        low_energy: temperature of rows whose energy is below the lower bound, of which the teacher is confident.
        high_energy: temperature of rows whose energy is above the upper bound. The released code uses 2 and 6; the
            paper's text states the opposite, a higher temperature for rows of low energy:
            ``Energy(low_energy=6.0, high_energy=2.0)``.
        tail_fraction: fraction of the rows beyond either bound.
        bounds: (lower, upper) energies. As published, they are computed once over the training set:
            ``Energy.bounds_of(logits)``. None computes them over the block's rows that have weight, so that each
            temperature depends on the other rows.
        centered: subtract the mean over classes from the logits first. Softmax is invariant to a shift and the energy
            is not; the released code does not center.

    Reference: Kim et al., "Maximizing Discrimination Capability of Knowledge Distillation with Energy Function",
    Knowledge-Based Systems 2024, arXiv:2311.14334.
    """

    paper = "arXiv:2311.14334"

    def __init__(
        self,
        tau: Tau = 4.0,
        *,
        low_energy: Positive = 2.0,
        high_energy: Positive = 6.0,
        tail_fraction: float = 0.2,
        bounds: Sequence[float] | None = None,
        centered: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= tail_fraction <= 0.5:
            raise ValueError(
                f"Energy needs tail_fraction in [0, 0.5], of the rows beyond either bound; got {tail_fraction!r}."
            )
        if bounds is not None and (len(bounds) != 2 or not bounds[0] <= bounds[1]):
            raise ValueError(
                f"Energy needs bounds (lower, upper), such as Energy.bounds_of(teacher_logits) returns; got {bounds!r}."
            )
        self.tau, self.low_energy, self.high_energy, self.tail_fraction = tau, low_energy, high_energy, tail_fraction
        self.bounds = None if bounds is None else tuple(bounds)
        self.centered = self.shift_invariant = centered
        self.relational = bounds is None

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        energies = energy(rows.teacher, centered=self.centered)
        if not len(rows):
            return Temperatures(energies, energies)
        has_weight = None if rows.weight is None else rows.weight > 0
        low, high = _bounds(energies, has_weight, self.tail_fraction) if self.bounds is None else self.bounds
        not_low = torch.where(energies > high, self.high_energy, self.tau)
        T = torch.where(energies < low, self.low_energy, not_low).to(energies.dtype)
        return Temperatures(T, T)

    @staticmethod
    def bounds_of(
        logits: Float[Tensor, "N C"], *, tail_fraction: float = 0.2, centered: bool = True
    ) -> tuple[float, float]:
        """Return the energies below and above which ``tail_fraction`` of the rows are, for ``bounds``."""
        if not len(logits):
            raise ValueError("Energy.bounds_of needs the teacher's logits of at least one row; got none.")
        low, high = _bounds(energy(logits, centered=centered), None, tail_fraction)
        return float(low), float(high)


def energy(logits: Float[Tensor, "N C"], *, centered: bool, softness: float = 4.0) -> Float[Tensor, "N 1"]:
    """-softness * logsumexp(z / softness) over the unmasked classes, (N, 1); 0 if all are masked."""
    z = upcast_to_float32(logits)
    is_masked = torch.isneginf(z)
    if centered:
        z = z - z.masked_fill(is_masked, 0.0).sum(-1, keepdim=True) / (~is_masked).sum(-1, keepdim=True).clamp_min(1)
    value = -softness * torch.logsumexp(z / softness, -1, keepdim=True)
    return value.masked_fill(is_masked.all(-1, keepdim=True), 0.0)


def _bounds(energies: Float[Tensor, "N 1"], has_weight: Tensor | None, tail_fraction: float) -> tuple[Tensor, Tensor]:
    """The values at rank tail_fraction * n from either end, where n rows have weight; ranks as in the released code."""
    if has_weight is None:
        has_weight = torch.ones_like(energies[:, 0], dtype=torch.bool)
    sorted_energies = energies[:, 0].masked_fill(~has_weight, torch.inf).sort().values
    n = has_weight.sum()
    rank = (n.double() * tail_fraction).long()
    last = (n - 1).clamp_min(0)
    ranks = torch.stack((rank.clamp_max(last), (last - rank).clamp_min(0)))
    low, high = sorted_energies.index_select(0, ranks).unbind()  # 0-dim indices would be read by the host
    return low, high
