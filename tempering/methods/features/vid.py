"""Variational information distillation: a Gaussian model of the teacher's map with one variance per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import Projected, fitted, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class VID(Projected):
    """Variational information distillation: feature * mean of [(F_t - r(F_s))^2 / var_c + log var_c] / 2, summed over
    the pairs, with r three 1x1 convolutions.

    The term is the negative log-likelihood without its constant, so it can be negative. var_c = softplus(scale_c) +
    1e-5 is learned, starting at ``variance``; mdistiller keeps the scales in a plain list, outside the optimizer, so
    there they do not change.

    Reference: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv:1904.05835,
    equation 6.
    """

    paper = "arXiv:1904.05835"
    relational = False
    non_negative = False

    def __init__(
        self, *, feature: TermWeight = 1.0, hard: NonNegative = 1.0, variance: float = 5.0, names: Sequence[str] = ()
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if not variance > 1e-5:
            raise ValueError(f"VID needs variance > 1e-5, the first guess of every channel's; got {variance!r}.")
        self.variance = variance

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [GaussianModel(s.shape[1], t.shape[1], self.variance) for s, t in pairs]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        values = [per_row(model(*fitted(s, t))) for model, (s, t) in zip(self.projectors, pairs, strict=True)]
        return sum(values[1:], values[0])


class GaussianModel(nn.Module):
    """Pointwise negative log-likelihood of the teacher's map given the student's."""

    def __init__(self, student: int, teacher: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - 1e-5))))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        variance = (F.softplus(self.scale) + 1e-5).view(1, -1, 1, 1)
        return 0.5 * ((self.mean(s) - t).square() / variance + variance.log())
