"""ReviewKD: match the teacher's features with fused features of several student stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.base import linear_warmup
from tempering.methods.features.base import Projected, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class ReviewKD(Projected):
    """Knowledge review: feature * hierarchical context loss of the fused student maps and the teacher's maps, summed
    over the stages.

    Features are ordered from shallow to deep. Fusion runs from deep to shallow: two attention maps weigh a stage's map
    and the fused map of the next deeper stage. The context loss is the squared error at full size and pooled to 4, 2
    and 1, with weights 1, 1/2, 1/4, 1/8 divided by their sum.

    Args:
        middle: maximum number of channels of the fused maps.
        warmup: fraction of the run over which the term rises linearly from 0; released: 20 of 240 epochs.

    Reference: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044, sections 3.3, 3.4.
    """

    paper = "arXiv:2104.09044"

    def __init__(
        self,
        *,
        feature: TermWeight = 5.0,
        hard: NonNegative = 1.0,
        middle: int = 512,
        warmup: RunFraction = 20 / 240,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if middle < 1:
            raise ValueError(f"ReviewKD needs middle >= 1, a number of channels; got {middle!r}.")
        self.middle, self.warmup = middle, warmup

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        middle = min(self.middle, pairs[-1][0].shape[1])
        deepest = len(pairs) - 1
        return [Fuse(s.shape[1], middle, t.shape[1], fuse=i < deepest) for i, (s, t) in enumerate(pairs)]

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        terms = super().forward(rows, progress)
        terms["feature"] = terms["feature"] * linear_warmup(progress, self.warmup)
        return terms

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        deeper: Tensor | None = None
        losses: list[Tensor] = []
        for fuse, (s, t) in zip(reversed(self.projectors), reversed(pairs), strict=True):
            fused, deeper = fuse(s, deeper, t.shape[-2:])
            losses.append(context_loss(fused, t))
        return sum(losses[1:], losses[0])


class Fuse(nn.Module):
    """Attention-based fusion of a stage's map with the fused map of the next deeper stage."""

    def __init__(self, student: int, middle: int, teacher: int, *, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher))
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        for module in (*self.reduce, *self.expand):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, s: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.reduce(s)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            weight, weight_deeper = self.attend(torch.cat((x, deeper), 1)).split(1, dim=1)
            x = x * weight + deeper * weight_deeper
        fused = self.expand(x)
        if fused.shape[-2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return fused, x


def context_loss(s: Tensor, t: Tensor) -> Tensor:
    """Return the squared error at full size and pooled to 4, 2, 1, weighted 1, 1/2, 1/4, 1/8 over their sum, (N,)."""
    weight, total_weight = 1.0, 1.0
    loss = per_row((s - t).square())
    for size in (4, 2, 1):
        if size >= s.shape[-1]:
            continue
        weight /= 2.0
        pooled = F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)
        loss, total_weight = loss + weight * per_row(pooled.square()), total_weight + weight
    return loss / total_weight
