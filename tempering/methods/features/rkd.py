"""Relational KD: match the pairwise distances of samples and the angles of triplets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.methods.features.base import FeatureMethod
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class RKD(FeatureMethod):
    """Relational KD: feature * (distance * smooth-L1 of mean-normalized pairwise distances + angle * smooth-L1 of the
    cosines of triplets).

    Angles cost O(N^2 D + N^3) per block.

    Reference: Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, equations 5 to 9.
    """

    paper = "arXiv:1904.05068"
    wants = "vectors"

    def __init__(
        self,
        *,
        feature: TermWeight = 1.0,
        distance: NonNegative = 25.0,
        angle: NonNegative = 50.0,
        hard: NonNegative = 1.0,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.distance, self.angle = distance, angle

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        values: list[Tensor] = []
        for s, t in pairs:
            d_s, d_t = _distances(s), _distances(t)
            value = self.distance * F.smooth_l1_loss(_relative(d_s), _relative(d_t))
            values.append(value + self.angle * F.smooth_l1_loss(_angles(s), _angles(t)))
        return sum(values[1:], values[0])


def _distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Return (N, N) Euclidean distances; exactly 0, with gradient 0, on the diagonal."""
    square = x.square().sum(1)
    squared = (square[:, None] + square[None, :] - 2.0 * x @ x.T).clamp_min(eps)
    return squared.sqrt() * (1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def _relative(d: Tensor) -> Tensor:
    """Divide distances by the mean of the positive ones."""
    positive = d > 0
    mean = d.sum() / positive.sum().clamp_min(1)
    return d / torch.where(mean > 0, mean, torch.ones_like(mean))


def _angles(x: Tensor) -> Tensor:
    """Return (N, N, N) cosines of the angle at one row between two others."""
    unit = F.normalize(x[None, :, :] - x[:, None, :], dim=2)
    return unit @ unit.transpose(1, 2)
