"""PKD: match feature maps by their Pearson correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tempering.methods.detection.base import NeckMethod, over_levels
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight

CONSTANT = 1e-6  # maximum standard deviation, relative to 1 + |mean|, of a constant channel


class PKD(NeckMethod):
    """PKD: feature * (1 - Pearson correlation of F_s and F_t), averaged over channels, summed over levels, plus hard *
    the task's own loss.

    This equals half the mean squared error of maps standardized to mean 0 and variance 1. The released code uses the
    unbiased variance (n - 1 in the denominator), so that its value is smaller by the factor (n - 1) / n for n
    positions, and adds 1e-6 to the standard deviation; here a constant channel becomes 0. The term is a mean, so the
    weight is independent of the size of the maps.

    Args:
        feature: weight; released for RetinaNet: 10 per level.
        hard: weight of the task's own loss.
        standardize_over: "batch", as published: standardize a channel over all images, so that the loss depends on
            the batch; "image": over each image separately.
        names: feature names; () for the levels "p0", "p1", ....

    Reference: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, arXiv:2207.02039; values as in open-mmlab/mmrazor.
    """

    paper = "arXiv:2207.02039"

    def __init__(
        self,
        *,
        feature: TermWeight = 10.0,
        hard: NonNegative = 1.0,
        standardize_over: Literal["batch", "image"] = "batch",
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if standardize_over not in ("batch", "image"):
            raise ValueError(f"PKD needs standardize_over 'batch' or 'image'; got {standardize_over!r}.")
        self.standardize_over = standardize_over
        self.relational = standardize_over == "batch"  # pyright: ignore[reportAttributeAccessIssue]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        dims = (0, 2, 3) if self.standardize_over == "batch" else (2, 3)
        return over_levels([self._distance(s, t, dims) for s, t in self.aligned(pairs)])

    def _distance(self, s: Tensor, t: Tensor, dims: tuple[int, ...]) -> Tensor:
        error = (standardized(s, dims) - standardized(t, dims)).square() / 2
        return error.mean() if self.standardize_over == "batch" else error.mean((1, 2, 3))


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return (x - mean) / standard deviation over ``dims``; 0 where the standard deviation is 0."""
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    variance = centered.square().mean(dims, keepdim=True)
    is_constant = variance.detach() <= (CONSTANT * (1 + mean.detach().abs())).square()
    return torch.where(is_constant, 0.0, centered / torch.where(is_constant, 1.0, variance).sqrt())
