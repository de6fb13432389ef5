"""EnergyKD: three temperatures, by how sure the teacher is of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive
from tempering.utils.search_space import Temperature


class Energy(Policy):
    """T = sure, tau or unsure for rows of low, middle or high energy -4 logsumexp(u / 4), both sides alike, (N, 1).

    Args:
        tau: of the rows between the bounds.
        sure: of rows whose energy is below the lower bound: the teacher is sure of them.
        unsure: of rows whose energy is above the upper bound. The released code has 2 and 6; the paper's text has it
            the other way round, a higher temperature for rows of low energy: ``Energy(sure=6.0, unsure=2.0)``.
        share: of the rows that lie beyond either bound.
        bounds: (lower, upper) energies. As published they are taken once over the training set:
            ``Energy.bounds_of(logits)``. None takes them over the block's rows that have weight, so that a row's
            temperature depends on the others.
        centered: take the mean over the classes off the logits first. Softmax ignores a shift and the energy does not;
            the released code does not center.

    Reference: Kim et al., "Maximizing Discrimination Capability of Knowledge Distillation with Energy Function",
    Knowledge-Based Systems 2024, arXiv:2311.14334.
    """

    paper = "arXiv:2311.14334"

    def __init__(
        self,
        tau: Annotated[float, Temperature()] = 4.0,
        *,
        sure: float = 2.0,
        unsure: float = 6.0,
        share: float = 0.2,
        bounds: Sequence[float] | None = None,
        centered: bool = True,
    ) -> None:
        super().__init__()
        check_positive("Energy", tau=tau, sure=sure, unsure=unsure)
        if not 0.0 <= share <= 0.5:
            raise ValueError(f"Energy needs share in [0, 0.5], of the rows beyond either bound; got {share!r}.")
        if bounds is not None and (len(bounds) != 2 or not bounds[0] <= bounds[1]):
            raise ValueError(
                f"Energy needs bounds (lower, upper), as Energy.bounds_of(teacher's logits) finds them; got {bounds!r}."
            )
        self.tau, self.sure, self.unsure, self.share = tau, sure, unsure, share
        self.bounds = None if bounds is None else tuple(bounds)
        self.centered = self.shift_invariant = centered
        self.relational = bounds is None  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        found = energy(rows.teacher, centered=self.centered)
        if not len(rows):
            return Temperatures(found, found)
        kept = None if rows.weight is None else rows.weight > 0
        low, high = _bounds(found, kept, self.share) if self.bounds is None else self.bounds
        T = torch.where(found < low, self.sure, torch.where(found > high, self.unsure, self.tau)).to(found.dtype)
        return Temperatures(T, T)

    @staticmethod
    def bounds_of(logits: Float[Tensor, "N C"], *, share: float = 0.2, centered: bool = True) -> tuple[float, float]:
        """The energies that ``share`` of the rows lie below and above, for ``bounds``."""
        if not len(logits):
            raise ValueError("Energy.bounds_of needs the teacher's logits of at least one row; got none.")
        low, high = _bounds(energy(logits, centered=centered), None, share)
        return float(low), float(high)


def energy(logits: Float[Tensor, "N C"], *, centered: bool, softness: float = 4.0) -> Float[Tensor, "N 1"]:
    """-softness * logsumexp(z / softness) over the classes that are not masked, (N, 1); 0 where none is left."""
    z = upcast_to_float32(logits)
    gone = torch.isneginf(z)
    if centered:
        z = z - z.masked_fill(gone, 0.0).sum(-1, keepdim=True) / (~gone).sum(-1, keepdim=True).clamp_min(1)
    found = -softness * torch.logsumexp(z / softness, -1, keepdim=True)
    return found.masked_fill(gone.all(-1, keepdim=True), 0.0)


def _bounds(found: Float[Tensor, "N 1"], kept: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """The values at rank share * n from either end, n the rows that are kept: as the released code picks them."""
    if kept is None:
        kept = torch.ones_like(found[:, 0], dtype=torch.bool)
    ranked = found[:, 0].masked_fill(~kept, torch.inf).sort().values
    n = kept.sum()
    rank = (n.double() * share).long()
    last = (n - 1).clamp_min(0)
    return ranked[rank.clamp_max(last)], ranked[(last - rank).clamp_min(0)]
