"""Probabilistic knowledge transfer: match the similarity distributions over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from tempering.methods.features.base import FeatureMethod
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class PKT(FeatureMethod):
    """Probabilistic knowledge transfer: feature * mean over pairs of rows of p_t log(p_t / p_s), summed over the pairs
    of features, with p the row-normalized (1 + cosine) / 2.

    The mean is over all N^2 pairs, as in the released code.

    Reference: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
    arXiv:1803.10837, equation 6.
    """

    paper = "arXiv:1803.10837"
    wants = "vectors"

    def __init__(self, *, feature: TermWeight = 30000.0, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        eps = 1e-7
        distances: list[Tensor] = []
        for s, t in pairs:
            p_s, p_t = _neighbors(s, eps), _neighbors(t, eps)
            distances.append((p_t * ((p_t + eps) / (p_s + eps)).log()).mean())
        return sum(distances[1:], distances[0])


def _neighbors(x: Tensor, eps: float) -> Tensor:
    """Return (N, N) conditional probabilities of a row being a neighbor of another."""
    # the released code divides by norm + eps, not by max(norm, eps)
    norm = cast("Tensor", x.norm(dim=1, keepdim=True))  # pyright: ignore[reportUnknownMemberType]
    unit = x / (norm + eps)
    unit = unit.nan_to_num(0.0)
    similarity = (unit @ unit.T + 1.0) / 2.0
    return similarity / similarity.sum(1, keepdim=True)
