"""PKD: what rises and falls together in two maps, whatever their means and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from tempering.methods.detection.base import NeckMethod, over_levels
from tempering.rows import Rows
from tempering.utils.search_space import Weight

FLAT = 1e-6  # a spread below that, against 1 + the mean, is none


class PKD(NeckMethod):
    """feature * (1 - Pearson correlation of F_s and F_t), the mean over channels, summed over levels, plus hard * the
    task's own loss.

    That is half the mean squared error of maps brought to mean 0 and variance 1. The released code divides by the
    sample's variance (one less in the denominator), so that it is smaller by the factor (n - 1) / n of n positions, and
    adds 1e-6 to the standard deviation; here a channel without spread is 0 in all places. A mean is no sum / N: the
    weight does not depend on the size of the maps.

    Args:
        feature: weight; the released one is 10 a level for RetinaNet.
        hard: weight of the task's own loss.
        over: "batch", as published: a channel is standardized over all images together, so the loss depends on the
            batch. "image": each image by itself.
        names: which features; () for the levels "p0", "p1", ....

    Reference: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, arXiv:2207.02039; values as in open-mmlab/mmrazor.
    """

    paper = "arXiv:2207.02039"

    def __init__(
        self,
        *,
        feature: Annotated[float, Weight()] = 10.0,
        hard: float = 1.0,
        over: Literal["batch", "image"] = "batch",
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if over not in ("batch", "image"):
            raise ValueError(f"PKD needs over 'batch' or 'image'; got {over!r}.")
        self.over = over
        self.relational = over == "batch"  # pyright: ignore[reportAttributeAccessIssue]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        dims = (0, 2, 3) if self.over == "batch" else (2, 3)
        return over_levels([self._apart(s, t, dims) for s, t in self.aligned(pairs)])

    def _apart(self, s: Tensor, t: Tensor, dims: tuple[int, ...]) -> Tensor:
        error = (standardized(s, dims) - standardized(t, dims)).square() / 2
        return error.mean() if self.over == "batch" else error.mean((1, 2, 3))


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(x - mean) / standard deviation over ``dims``; 0 where there is no spread."""
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    variance = centered.square().mean(dims, keepdim=True)
    flat = variance.detach() <= (FLAT * (1 + mean.detach().abs())).square()
    return torch.where(flat, 0.0, centered / torch.where(flat, 1.0, variance).sqrt())
