"""What methods over a detector's neck share: its levels, boxes and scores, and the projectors between two widths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.base import zero_term
from tempering.methods.features.base import Projected
from tempering.rows import Rows, upcast_to_float32

LEVEL = re.compile(r"p(\d+)")
WITHOUT = ("classes", "sides")  # a detector's blocks of anchors and of sides, which have no maps


class NeckMethod(Projected):
    """A feature method over the levels of two necks, plus hard * the task's own loss.

    The levels are the features "p0", "p1", ... of the block of images, where ``names`` says nothing else. On a
    detector's other blocks all terms are 0. Where channels differ a 1x1 convolution of its own brings the student's map
    to the teacher's; where sizes differ it is interpolated to the teacher's, which the released codes do not.

    A term is a sum over an image's channels and positions where its docstring says so. The released codes' "sum / N" is
    the mean of such terms over the images, as ``total`` gives it: their weights carry over as they are.
    """

    relational = False
    hint = "tasks.Detection gives the levels of both necks as 'p0', 'p1', ...; for other maps say names=."

    @classmethod
    def example(cls) -> Self:
        return cls(feature=1.0, names=("map",))

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        return ()  # levels are not tapped: they come with the task

    def chosen(self, rows: Rows) -> tuple[str, ...]:
        found = sorted((int(m[1]), name) for name in rows.features if (m := LEVEL.fullmatch(name)))
        return self.names or tuple(name for _, name in found)

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it vanishes for a student equal to the teacher: once it is known that nothing stands between."""
        return bool(len(self.projectors)) and all(isinstance(p, nn.Identity) for p in self.projectors)

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [between(s, t) for s, t in pairs]

    def setup(self, rows: Rows) -> None:
        if rows.name not in WITHOUT and not len(self.projectors):
            super().setup(rows)
            pairs = self.pairs(rows)
            self.to(pairs[0][0])

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if rows.name in WITHOUT:
            return dict.fromkeys(self.weighs, zero_term(rows))
        return super().forward(rows, progress)

    def aligned(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The pairs with the student's maps like the teacher's.

        Raises:
            ValueError: for another number of levels than it was prepared for.
        """
        if len(pairs) != len(self.projectors):
            raise ValueError(
                f"{type(self).__name__} was prepared for {len(self.projectors)} levels; got {len(pairs)}. Make a new "
                "one for another neck."
            )
        return [(resized(project(s), t), t) for project, (s, t) in zip(self.projectors, pairs, strict=True)]

    def beside(self, rows: Rows, name: str, what: str) -> Tensor:
        """The teacher's side of a feature that is no map, in rows of weight > 0.

        Raises:
            ValueError: where it is not there.
        """
        if name not in rows.features:
            raise ValueError(
                f"{type(self).__name__} looks at {what}, and Rows(name={rows.name!r}) has no feature {name!r}. "
                f"tasks.Detection gives it; in a loop of your own, add it to features, the same on both sides."
            )
        value = upcast_to_float32(rows.features[name][1]).detach()
        return value if rows.weight is None else value[rows.weight > 0]


def between(s: Tensor, t: Tensor) -> nn.Module:
    """A 1x1 convolution from the channels of ``s`` to those of ``t``; nothing where they agree."""
    return nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], kernel_size=1)


def resized(s: Tensor, t: Tensor) -> Tensor:
    """``s`` at the height and width of ``t``, bilinearly; itself where they agree."""
    size = (t.shape[-2], t.shape[-1])
    return s if s.shape[-2:] == size else F.interpolate(s, size, mode="bilinear", align_corners=False)


def summed(x: Tensor) -> Tensor:
    """The sum over everything but the rows, (N,)."""
    return x.flatten(1).sum(1)


def over_levels(values: Sequence[Tensor]) -> Tensor:
    """The levels' values of each row added up, (N,)."""
    return sum(values[1:], values[0])
