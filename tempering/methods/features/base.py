"""What methods over features share: which pairs, which rows, and projectors that the method owns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.base import Method, check_weights, zero_term
from tempering.objectives import cross_entropy
from tempering.rows import Rows, expand_to_rows, upcast_to_float32

BESIDE = ("boxes", "scores")  # of a detector's images: what some methods read beside the maps


class FeatureMethod(Method):
    """A loss over pairs of features, plus hard * cross entropy.

    Args:
        feature: weight of the features' term.
        hard: weight of the cross entropy; beside another method in a Sum it is usually 0.
        names: which of ``rows.features``, in order; () for all of them (but a detector's boxes and scores).

    Only rows of weight > 0 take part. Features are (N, C, H, W) maps or (N, D) vectors, as the method says.
    """

    relational = True
    wants = "maps"  # or "vectors": what a pair is flattened to
    weighs: ClassVar[tuple[str, ...]] = ("feature",)  # its terms but the hard one, each under the name of its weight
    hint = "Name modules to tap in the task, such as Classification(features={'last': ('stage3', 'stage3')}) " + (
        "(student's module, teacher's module)."
    )

    def __init__(self, *, feature: float, hard: float = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__()
        check_weights(type(self).__name__, feature=feature, hard=hard)
        self.feature, self.hard, self.names = feature, hard, tuple(names)

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        self.names = self.names or self.usual(stages)
        return self.names

    def usual(self, stages: Sequence[str]) -> tuple[str, ...]:
        """What the field's tables compare: the pooled vector, or the maps of all stages."""
        return ("pool",) if self.wants == "vectors" else tuple(stages)

    @abstractmethod
    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor | dict[str, Tensor]:
        """The unweighted term of these (student, teacher) features: () for the block, or a value a row.

        Several are named as in ``weighs``.
        """

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        pairs = self.pairs(rows)
        found = self.compare(pairs, rows) if pairs[0][0].shape[0] else dict.fromkeys(self.weighs, zero_term(rows))
        found = {"feature": found} if isinstance(found, Tensor) else found
        terms = {name: getattr(self, name) * self._placed(value, rows) for name, value in found.items()}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms

    @staticmethod
    def _placed(value: Tensor, rows: Rows) -> Tensor:
        if value.ndim == 0:
            return expand_to_rows(value, rows)
        return value if len(value) == len(rows) else spread_out(value, rows)

    def chosen(self, rows: Rows) -> tuple[str, ...]:
        """The names of the features that are compared."""
        return self.names or tuple(name for name in rows.features if name not in BESIDE)

    def pairs(self, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """The chosen pairs in float32 at least, rows of weight 0 left out.

        Raises:
            ValueError: for features that are not there, or of the wrong kind.
        """
        names = self.chosen(rows)
        missing = [name for name in names if name not in rows.features]
        owner = type(self).__name__
        if missing or not names:
            raise ValueError(
                f"{owner} compares features, and Rows(name={rows.name!r}) has {sorted(rows.features) or 'none'}; "
                f"missing: {missing or 'any'}. {self.hint}"
            )
        kept = slice(None) if rows.weight is None else rows.weight > 0
        out = []
        for name in names:
            s, t = (upcast_to_float32(x)[kept] for x in rows.features[name])
            if self.wants == "vectors":
                s, t = s.flatten(1), t.flatten(1)
            elif s.ndim != 4 or t.ndim != 4:
                raise ValueError(
                    f"{owner} compares maps (N, C, H, W); the feature {name!r} is {tuple(s.shape)} and "
                    f"{tuple(t.shape)}. Tap a convolutional stage."
                )
            out.append((s, t.detach()))
        return out


def spread_out(value: Tensor, rows: Rows) -> Tensor:
    """Values of the rows that have weight, back in their places, (N,); 0 elsewhere."""
    if rows.weight is None:
        return value
    return torch.zeros(len(rows), dtype=value.dtype, device=value.device).masked_scatter(rows.weight > 0, value)


def fitted(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller one's size: the larger is average-pooled."""
    if s.shape[-1] > t.shape[-1]:
        s = F.adaptive_avg_pool2d(s, (t.shape[-2], t.shape[-1]))
    elif s.shape[-1] < t.shape[-1]:
        t = F.adaptive_avg_pool2d(t, (s.shape[-2], s.shape[-1]))
    return s, t


def per_row(x: Tensor) -> Tensor:
    """The mean over everything but the rows, (N,)."""
    return x.flatten(1).mean(1)


class Projected(FeatureMethod):
    """A feature method with modules of its own, sized once by ``setup`` on a first block of rows.

    The engine calls it before it makes the optimizer; in a loop of one's own, call ``method.setup(rows)`` there.
    """

    zero_when_equal = False

    def __init__(self, *, feature: float, hard: float = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.projectors = nn.ModuleList()

    @abstractmethod
    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        """Projectors for pairs of these shapes."""

    def setup(self, rows: Rows) -> None:
        if not len(self.projectors):
            pairs = self.pairs(rows)
            self.projectors.extend(self.build(pairs))
            self.projectors.to(pairs[0][0])

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if not len(self.projectors):
            raise RuntimeError(
                f"{type(self).__name__} has projectors whose sizes come from the features: call method.setup(rows) "
                "with a first block of rows, before the optimizer is made."
            )
        return super().forward(rows, progress)
