"""Focal and global distillation: separate foreground and background losses, and global relations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tempering.methods.detection.base import NeckMethod, over_levels, summed
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, Positive, TermWeight


class FGD(NeckMethod):
    """Focal and global distillation: foreground * sum M A_S A_C (F_s - F_t)^2 + background * the same sum outside boxes
    + attention * (|A_S - A_S'| + |A_C - A_C'|) + relation * |R(F_s) - R'(F_t)|^2, summed over positions, channels and
    levels, plus hard * the task's own loss.

    M is 1 / (cells of the box) inside boxes (of the smallest box if they overlap) and 1 / (cells outside all boxes)
    elsewhere. A_S = HW softmax(mean over channels of |F| / tau) and A_C = C softmax(mean over positions of |F| / tau)
    are the teacher's in the first two terms; A' are the student's. R adds the output of a global context block to a
    map; the blocks of the student and of the teacher are both trained.

    Sums are per image, and ``total`` computes their mean over images, which is the released code's sum / N. The cells
    of a box are those from floor to ceil of its edges, inclusive, as released. Boxes are clipped to the image, and
    boxes outside it are ignored; an image without boxes is all background.

    Args:
        foreground, background, attention, relation: weights; default: the released values for RetinaNet.
        hard: weight of the task's own loss.
        tau: temperature of the attention maps.
        names: feature names; () for the levels "p0", "p1", .... Boxes are the feature "boxes": (N, M, 4) as xyxy in
            [0, 1] of the image, padded with rows of -1.

    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837.
    """

    paper = "arXiv:2111.11837"
    weighs = ("foreground", "background", "attention", "relation")

    def __init__(
        self,
        *,
        foreground: TermWeight = 1e-3,
        background: TermWeight = 5e-4,
        attention: TermWeight = 5e-4,
        relation: TermWeight = 5e-6,
        hard: NonNegative = 1.0,
        tau: Positive = 0.5,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=1.0, hard=hard, names=names)  # unused: FGD has four weights of its own
        self.foreground, self.background = foreground, background
        self.attention, self.relation, self.tau = attention, relation, tau
        self.relations = nn.ModuleList()

    @classmethod
    def example(cls) -> Self:
        return cls(foreground=1.0, background=1.0, attention=1.0, relation=1.0, names=("map",))

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As for all neck methods, and as long as the context blocks, which are initialized to 0, are not trained."""
        return super().zero_when_equal and not any(p.any() for r in self.relations for p in last(r))

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        self.relations.extend(Relation(t.shape[1]) for _, t in pairs)
        return super().build(pairs)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> dict[str, Tensor]:
        boxes = self.teacher_feature(rows, "boxes", "the boxes of each image")
        terms: dict[str, list[Tensor]] = {name: [] for name in self.weighs}
        for relate, (s, t) in zip(self.relations, self.aligned(pairs), strict=True):
            inside, outside = focus(boxes, (t.shape[-2], t.shape[-1]))
            (spatial_s, channel_s), (spatial_t, channel_t) = attentions(s, self.tau), attentions(t, self.tau)
            error = (spatial_t.unsqueeze(1) * channel_t[:, :, None, None] * (s - t).square()).sum(1)
            terms["foreground"].append(summed(inside * error))
            terms["background"].append(summed(outside * error))
            terms["attention"].append(summed((spatial_s - spatial_t).abs()) + summed((channel_s - channel_t).abs()))
            terms["relation"].append(summed(relate(s, t).square()))
        return {name: over_levels(values) for name, values in terms.items()}


class Relation(nn.Module):
    """Difference of two maps (N, C, H, W), each with the output of its own global context block added.

    Reference: Cao et al., "GCNet", 2019, arXiv:1904.11492, which introduced the block.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student, self.teacher = Context(channels), Context(channels)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return s + self.student(s) - (t + self.teacher(t))


class Context(nn.Module):
    """Global context block: attention pooling and a bottleneck, (N, C, 1, 1); initialized to return 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, kernel_size=1)
        self.change = nn.Sequential(
            nn.Conv2d(channels, narrow, kernel_size=1),
            nn.LayerNorm([narrow, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(narrow, channels, kernel_size=1),
        )
        nn.init.kaiming_normal_(self.attend.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.attend.bias)  # pyright: ignore[reportArgumentType]
        for parameter in last(self):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attend(x).flatten(2).softmax(-1)  # (N, 1, HW)
        pooled = (x.flatten(2) * attention).sum(-1)
        return self.change(pooled[:, :, None, None])


def last(module: nn.Module) -> list[nn.Parameter]:
    """Return the zero-initialized parameters of all context blocks in a module."""
    blocks = [m for m in module.modules() if isinstance(m, Context)]
    return [p for block in blocks for p in block.change[3].parameters()]


def attentions(x: Tensor, tau: float) -> tuple[Float[Tensor, "N H W"], Float[Tensor, "N C"]]:
    """Return the spatial and channel attention of a map (N, C, H, W), each with mean 1."""
    strength = x.abs()
    spatial = (strength.mean(1).flatten(1) / tau).softmax(-1).view(len(x), *x.shape[2:])
    return spatial * spatial[0].numel(), x.shape[1] * (strength.mean((2, 3)) / tau).softmax(-1)


@torch.no_grad()
def focus(
    boxes: Float[Tensor, "N M 4"], size: tuple[int, int]
) -> tuple[Float[Tensor, "N H W"], Float[Tensor, "N H W"]]:
    """Return foreground and background masks of a (height, width) grid, each cell weighted by an inverse cell count.

    A cell in boxes has 1 / (cells of the smallest of them), a cell in no box 1 / (cells in no box); 0 elsewhere. Boxes
    are xyxy in [0, 1] of the image; inverted boxes and boxes outside the image are ignored.
    """
    (left, top, right, bottom), (height, width) = boxes.unbind(-1), size
    valid = (right > 0) & (bottom > 0) & (left < 1) & (top < 1) & (right >= left) & (bottom >= top)
    in_columns, columns = _span(left, right, width)
    in_rows, rows = _span(top, bottom, height)
    inside = in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2) & valid[..., None, None]
    share = inside / (columns * rows)[..., None, None]
    foreground = share.amax(1) if boxes.shape[1] else share.sum(1)
    outside = (foreground == 0).to(share.dtype)
    return foreground, outside / outside.sum((1, 2), keepdim=True).clamp_min(1)


def _span(low: Tensor, high: Tensor, cells: int) -> tuple[Bool[Tensor, "N M cells"], Float[Tensor, "N M"]]:
    """Return the mask of the cells between two edges in [0, 1], and their number."""
    first, last = (low.clamp(0, 1) * cells).floor(), (high.clamp(0, 1) * cells).ceil()
    cell = torch.arange(cells, device=low.device)
    return (cell >= first.unsqueeze(-1)) & (cell <= last.unsqueeze(-1)), last - first + 1
