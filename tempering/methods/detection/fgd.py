"""FGD: what the teacher's neck holds of objects and of the rest, apart, and how all of it hangs together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tempering.methods.base import check_weights
from tempering.methods.detection.base import NeckMethod, over_levels, summed
from tempering.rows import Rows
from tempering.temperature.base import check_positive
from tempering.utils.search_space import Weight


class FGD(NeckMethod):
    """foreground * sum M A_S A_C (F_s - F_t)^2 + background * the same outside boxes + attention * (|A_S - A_S'| +
    |A_C - A_C'|) + relation * |R(F_s) - R'(F_t)|^2, summed over positions, channels and levels, plus hard * the task's.

    M is 1 / (a box's cells) within boxes, of the smallest where they overlap, and outside them 1 / (the cells outside).
    A_S = HW softmax(mean over channels of |F| / tau) and A_C = C softmax(mean over positions of |F| / tau) are the
    teacher's in the first two terms; A' are the student's. R adds to a map what a global context block makes of it; the
    student's and the teacher's block are both trained.

    All sums are an image's own, and ``total`` takes their mean over images, which is the released code's sum / N. The
    cells of a box go from floor to ceil of its edges, both included, as released. Boxes are cut to the image first, and
    those outside it are none; an image without boxes is all background.

    Args:
        foreground, background, attention, relation: weights; the released values of RetinaNet.
        hard: weight of the task's own loss.
        tau: temperature of the attentions.
        names: which features; () for the levels "p0", "p1", .... The boxes are the feature "boxes": (N, M, 4) as xyxy
            in [0, 1] of the image, rows of -1 where an image has fewer.

    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv:2111.11837.
    """

    paper = "arXiv:2111.11837"
    weighs = ("foreground", "background", "attention", "relation")

    def __init__(
        self,
        *,
        foreground: Annotated[float, Weight()] = 1e-3,
        background: Annotated[float, Weight()] = 5e-4,
        attention: Annotated[float, Weight()] = 5e-4,
        relation: Annotated[float, Weight()] = 5e-6,
        hard: float = 1.0,
        tau: float = 0.5,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=1.0, hard=hard, names=names)  # its own four weights are in its place
        check_weights("FGD", foreground=foreground, background=background, attention=attention, relation=relation)
        check_positive("FGD", tau=tau)
        self.foreground, self.background = foreground, background
        self.attention, self.relation, self.tau = attention, relation, tau
        self.relations = nn.ModuleList()

    @classmethod
    def example(cls) -> Self:
        return cls(foreground=1.0, background=1.0, attention=1.0, relation=1.0, names=("map",))

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As for all necks, and until the context blocks, which begin by adding nothing, have learned."""
        return super().zero_when_equal and not any(p.any() for r in self.relations for p in last(r))

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        self.relations.extend(Relation(t.shape[1]) for _, t in pairs)
        return super().build(pairs)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> dict[str, Tensor]:
        boxes = self.beside(rows, "boxes", "the boxes of each image")
        found: dict[str, list[Tensor]] = {name: [] for name in self.weighs}
        for relate, (s, t) in zip(self.relations, self.aligned(pairs), strict=True):
            inside, outside = focus(boxes, (t.shape[-2], t.shape[-1]))
            (where_s, what_s), (where_t, what_t) = attentions(s, self.tau), attentions(t, self.tau)
            error = (where_t.unsqueeze(1) * what_t[:, :, None, None] * (s - t).square()).sum(1)
            found["foreground"].append(summed(inside * error))
            found["background"].append(summed(outside * error))
            found["attention"].append(summed((where_s - where_t).abs()) + summed((what_s - what_t).abs()))
            found["relation"].append(summed(relate(s, t).square()))
        return {name: over_levels(values) for name, values in found.items()}


class Relation(nn.Module):
    """What two maps (N, C, H, W) differ by once each has its own global context added.

    Reference: Cao et al., "GCNet", 2019, arXiv:1904.11492, whose block FGD takes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student, self.teacher = Context(channels), Context(channels)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return s + self.student(s) - (t + self.teacher(t))


class Context(nn.Module):
    """A map's average under an attention of its own, through a bottleneck, (N, C, 1, 1); 0 at first."""

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
        where = self.attend(x).flatten(2).softmax(-1)  # (N, 1, HW)
        pooled = (x.flatten(2) * where).sum(-1)
        return self.change(pooled[:, :, None, None])


def last(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all context blocks in it that are 0 until something is learned."""
    blocks = [m for m in module.modules() if isinstance(m, Context)]
    return [p for block in blocks for p in block.change[3].parameters()]


def attentions(x: Tensor, tau: float) -> tuple[Float[Tensor, "N H W"], Float[Tensor, "N C"]]:
    """Where a map (N, C, H, W) is strong, and in which channels, with a mean of 1 each."""
    strength = x.abs()
    where = (strength.mean(1).flatten(1) / tau).softmax(-1).view(len(x), *x.shape[2:])
    return where * where[0].numel(), x.shape[1] * (strength.mean((2, 3)) / tau).softmax(-1)


@torch.no_grad()
def focus(
    boxes: Float[Tensor, "N M 4"], size: tuple[int, int]
) -> tuple[Float[Tensor, "N H W"], Float[Tensor, "N H W"]]:
    """Of each cell of a (height, width) grid: 1 / cells of the smallest box it is in, and 1 / cells in no box.

    Boxes are xyxy in [0, 1] of the image. Those that end before they begin, or do not touch the image, are none.
    """
    (left, top, right, bottom), (height, width) = boxes.unbind(-1), size
    there = (right > 0) & (bottom > 0) & (left < 1) & (top < 1) & (right >= left) & (bottom >= top)
    across, columns = _span(left, right, width)
    down, rows = _span(top, bottom, height)
    inside = down.unsqueeze(-1) & across.unsqueeze(-2) & there[..., None, None]
    share = inside / (columns * rows)[..., None, None]
    foreground = share.amax(1) if boxes.shape[1] else share.sum(1)
    outside = (foreground == 0).to(share.dtype)
    return foreground, outside / outside.sum((1, 2), keepdim=True).clamp_min(1)


def _span(low: Tensor, high: Tensor, cells: int) -> tuple[Bool[Tensor, "N M cells"], Float[Tensor, "N M"]]:
    """Which of so many cells lie between two edges in [0, 1], and how many there are."""
    first, last = (low.clamp(0, 1) * cells).floor(), (high.clamp(0, 1) * cells).ceil()
    at = torch.arange(cells, device=low.device)
    return (at >= first.unsqueeze(-1)) & (at <= last.unsqueeze(-1)), last - first + 1
