"""Base class of methods over a detector's neck: its levels, boxes and scores, and channel projectors."""

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
BLOCKS_WITHOUT_MAPS = ("classes", "sides")  # a detector's blocks of anchors and of box sides


class NeckMethod(Projected):
    """Base class of feature methods over the levels of two necks, plus hard * the task's own loss.

    The levels are the features "p0", "p1", ... of the block of images, unless ``names`` is given. On a detector's other
    blocks all terms are 0. If the channels differ, a learned 1x1 convolution projects the student's map to the
    teacher's channels; if the sizes differ, it is interpolated to the teacher's size, unlike in the released codes.

    Terms are sums over an image's channels and positions where the method's docstring defines them so. The released
    codes' "sum / N" is the mean of these terms over the images, as computed by ``total``, so their weights apply
    unchanged.
    """

    relational = False
    hint = "tasks.Detection gives the levels of both necks as 'p0', 'p1', ...; for other maps give names=."

    @classmethod
    def example(cls) -> Self:
        return cls(feature=1.0, names=("map",))

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        return ()  # the task provides the levels

    def chosen(self, rows: Rows) -> tuple[str, ...]:
        levels = sorted((int(m[1]), name) for name in rows.features if (m := LEVEL.fullmatch(name)))
        return self.names or tuple(name for _, name in levels)

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether its terms are 0 for a student equal to the teacher: only after ``setup``, without projectors."""
        return bool(len(self.projectors)) and all(isinstance(p, nn.Identity) for p in self.projectors)

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [between(s, t) for s, t in pairs]

    def setup(self, rows: Rows) -> None:
        if rows.name not in BLOCKS_WITHOUT_MAPS and not len(self.projectors):
            super().setup(rows)
            pairs = self.pairs(rows)
            self.to(pairs[0][0])

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if rows.name in BLOCKS_WITHOUT_MAPS:
            return dict.fromkeys(self.weighs, zero_term(rows))
        return super().forward(rows, progress)

    def aligned(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs with the student's maps projected and resized to the teacher's shapes.

        Raises:
            ValueError: if the number of levels differs from that at ``setup``.
        """
        if len(pairs) != len(self.projectors):
            raise ValueError(
                f"{type(self).__name__} was set up for {len(self.projectors)} levels; got {len(pairs)}. Construct a "
                "new one for another neck."
            )
        return [(resized(project(s), t), t) for project, (s, t) in zip(self.projectors, pairs, strict=True)]

    def teacher_feature(self, rows: Rows, name: str, meaning: str) -> Tensor:
        """Return the teacher's side of a feature that is not a map, for rows of weight > 0.

        Raises:
            ValueError: if the feature is missing.
        """
        if name not in rows.features:
            raise ValueError(
                f"{type(self).__name__} needs {meaning}, and Rows(name={rows.name!r}) has no feature {name!r}. "
                f"tasks.Detection provides it; in a custom training loop, add it to features, equal on both sides."
            )
        value = upcast_to_float32(rows.features[name][1]).detach()
        return value if rows.weight is None else value[rows.weight > 0]


def between(s: Tensor, t: Tensor) -> nn.Module:
    """Create a 1x1 convolution from the channels of ``s`` to those of ``t``; an identity if they are equal."""
    return nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], kernel_size=1)


def resized(s: Tensor, t: Tensor) -> Tensor:
    """Interpolate ``s`` bilinearly to the height and width of ``t``; return ``s`` if they are equal."""
    size = (t.shape[-2], t.shape[-1])
    return s if s.shape[-2:] == size else F.interpolate(s, size, mode="bilinear", align_corners=False)


def summed(x: Tensor) -> Tensor:
    """Return the sum over all dimensions but the first, (N,)."""
    return x.flatten(1).sum(1)


def over_levels(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of the levels' values for each row, (N,)."""
    return sum(values[1:], values[0])
