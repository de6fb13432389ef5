"""Cosine-similarity weighted temperatures: rows on which student and teacher agree are softened less."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive
from tempering.utils.search_space import Temperature


class Cosine(Policy):
    """T = low + (high - low) (c_max - c) / (c_max - c_min), one temperature for both sides of a row, (N, 1).

    c is the cosine of the row's two predictions at temperature 1, c_max and c_min its bounds over the rows of the block
    that have weight, so a row's temperature depends on the others. Where all are equally similar (a block of one row,
    too) every row has ``tau``; the source divides by zero there. Rows of weight 0 are held within [low, high].

    Args:
        tau: where no row differs, and the temperature that methods soften plainly at.
        low: of the most similar row.
        high: of the least similar row.
        eps: the source adds 1e-8 to the product of the norms; 0 leaves it out.

    Reference: Ham et al., "Cosine Similarity Knowledge Distillation for Individual Class Information Transfer", 2023,
    arXiv:2311.14307.
    """

    paper = "arXiv:2311.14307"
    relational = True

    def __init__(
        self, tau: Annotated[float, Temperature()] = 4.0, *, low: float = 2.0, high: float = 6.0, eps: float = 0.0
    ) -> None:
        super().__init__()
        check_positive("Cosine", tau=tau, low=low, high=high)
        if low > high:
            raise ValueError(f"Cosine needs low <= high; got low={low!r} and high={high!r}.")
        if not 0.0 <= eps < 1.0:
            raise ValueError(f"Cosine needs eps in [0, 1); got {eps!r}. The source's is 1e-8.")
        self.tau, self.low, self.high, self.eps = tau, low, high, eps

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        kept = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.student.device)
        if rows.weight is not None:
            kept = (rows.weight > 0).unsqueeze(1)
        c = self._cosine(rows, kept)
        if not len(rows):
            return Temperatures(c, c)
        top = c.masked_fill(~kept, -torch.inf).amax()
        span = top - c.masked_fill(~kept, torch.inf).amin()
        differ = span > 8.0 * torch.finfo(c.dtype).eps
        share = ((top - c) / torch.where(differ, span, 1.0)).clamp(0.0, 1.0)
        T = torch.where(differ, self.low + (self.high - self.low) * share, self.tau)
        return Temperatures(T, T)

    def _cosine(self, rows: Rows, kept: Tensor) -> Tensor:
        """The cosine of each row's predictions at temperature 1, (N, 1)."""
        sides = []
        for z in (upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)):
            z = z.masked_fill(~kept, 0.0)
            empty = torch.isneginf(z).all(-1, keepdim=True)
            sides.append(z.masked_fill(empty, 0.0).softmax(-1))
        p, q = sides
        product = p.norm(dim=-1, keepdim=True) * q.norm(dim=-1, keepdim=True)
        return (p * q).sum(-1, keepdim=True) / (product + self.eps)
