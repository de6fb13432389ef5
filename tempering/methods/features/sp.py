"""Similarity-preserving KD: match the pairwise similarities of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tempering.methods.features.base import FeatureMethod
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class SP(FeatureMethod):
    """Similarity-preserving KD: feature * mean over pairs of rows of (G_s - G_t)^2, summed over the pairs of features,
    with G the row-normalized Gram matrix of the block.

    The released code compares the last stage only; recipes do the same if ``names`` is empty.

    Reference: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, equation 4.
    """

    paper = "arXiv:1907.09682"
    wants = "vectors"

    def __init__(self, *, feature: TermWeight = 3000.0, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)

    def usual(self, stages: Sequence[str]) -> tuple[str, ...]:
        return tuple(stages[-1:])

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        distances = [(F.normalize(s @ s.T) - F.normalize(t @ t.T)).square().mean() for s, t in pairs]
        return sum(distances[1:], distances[0])
