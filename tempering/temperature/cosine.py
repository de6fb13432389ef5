"""Cosine-similarity weighted temperatures: lower temperatures for rows on which student and teacher agree."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.search_space import Positive, Tau


class Cosine(Policy):
    """T = low + (high - low) (c_max - c) / (c_max - c_min), one temperature per row for both sides, (N, 1).

    c is the cosine similarity of the row's two predictions at temperature 1, c_max and c_min its bounds over the rows
    of the block that have weight, so each temperature depends on the other rows. If all rows are equally similar (as
    in a block of one row), every row gets ``tau``; the source divides by zero there. Rows of weight 0 are clamped to
    [low, high].

    Args:
        tau: used if the rows do not differ, and the reference temperature for methods with a plain softened term.
        low: temperature of the most similar row.
        high: temperature of the least similar row.
        eps: added to the product of the norms; 1e-8 in the source, default: 0.

    Reference: Ham et al., "Cosine Similarity Knowledge Distillation for Individual Class Information Transfer", 2023,
    arXiv:2311.14307.
    """

    paper = "arXiv:2311.14307"
    relational = True

    def __init__(self, tau: Tau = 4.0, *, low: Positive = 2.0, high: Positive = 6.0, eps: float = 0.0) -> None:
        super().__init__()
        if low > high:
            raise ValueError(f"Cosine needs low <= high; got low={low!r} and high={high!r}.")
        if not 0.0 <= eps < 1.0:
            raise ValueError(f"Cosine needs eps in [0, 1); got {eps!r}. The source uses 1e-8.")
        self.tau, self.low, self.high, self.eps = tau, low, high, eps

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        has_weight = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.student.device)
        if rows.weight is not None:
            has_weight = (rows.weight > 0).unsqueeze(1)
        c = self._cosine(rows, has_weight)
        if not len(rows):
            return Temperatures(c, c)
        largest = c.masked_fill(~has_weight, -torch.inf).amax()
        span = largest - c.masked_fill(~has_weight, torch.inf).amin()
        differs = span > 8.0 * torch.finfo(c.dtype).eps
        distance = ((largest - c) / torch.where(differs, span, 1.0)).clamp(0.0, 1.0)
        T = torch.where(differs, self.low + (self.high - self.low) * distance, self.tau)
        return Temperatures(T, T)

    def _cosine(self, rows: Rows, has_weight: Tensor) -> Tensor:
        """The cosine similarity of each row's predictions at temperature 1, (N, 1)."""
        sides: list[Tensor] = []
        for z in (upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)):
            z = z.masked_fill(~has_weight, 0.0)
            empty = torch.isneginf(z).all(-1, keepdim=True)
            sides.append(z.masked_fill(empty, 0.0).softmax(-1))
        p, q = sides
        product = _norm(p) * _norm(q)
        return (p * q).sum(-1, keepdim=True) / (product + self.eps)


def _norm(x: Tensor) -> Tensor:
    return cast(Tensor, x.norm(dim=-1, keepdim=True))  # pyright: ignore[reportUnknownMemberType]
