"""Base classes of feature methods: selection of feature pairs and rows, and learned projectors."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.base import Method, zero_term
from tempering.rows import Rows, expand_to_rows, rows_per_sample, upcast_to_float32
from tempering.utils.search_space import NonNegative

# detection features that are no maps: inputs of some methods
NOT_COMPARED = ("boxes", "scores", "query_sigmoid", "query_softmax", "query_boxes")


class FeatureMethod(Method):
    """Base class of losses over pairs of features, plus hard * cross entropy.

    Args:
        feature: weight of the feature term.
        hard: weight of the cross entropy; usually 0 in a ``Sum`` with another method.
        names: keys of ``rows.features``, in order; () for all except a detector's boxes, scores and queries.

    Only rows of weight > 0 are compared. Features are maps (N, C, H, W) or vectors (N, D), depending on the method.
    Where every sample has several rows, such as the pixels of an image in segmentation, features are those of the
    samples, (B, ...) beside N = B * P rows ordered by sample: a sample is compared if one of its rows has weight > 0,
    and its term is that of each of its rows. So samples count by the weight of their rows, however a batch is split.
    """

    relational = True
    of_classes = False
    wants = "maps"  # or "vectors": flatten features to (N, D)
    weighs: ClassVar[tuple[str, ...]] = ("feature",)  # terms except "hard", named like their weights
    hint = "Name modules to tap in the task, such as Classification(features={'last': ('stage3', 'stage3')}) " + (
        "(student's module, teacher's module)."
    )

    def __init__(self, *, feature: NonNegative, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.feature, self.hard, self.names = feature, hard, tuple(names)

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        self.names = self.names or self.usual(stages)
        return self.names

    def usual(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Return the features compared in published tables: the pooled vector, or the maps of all stages."""
        return ("pool",) if self.wants == "vectors" else tuple(stages)

    @abstractmethod
    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor | dict[str, Tensor]:
        """Compute the unweighted term of these (student, teacher) features: () for the block, or one value per row.

        Several terms are returned as a dictionary with the names in ``weighs``.
        """

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        pairs = self.pairs(rows)
        values = self.compare(pairs, rows) if pairs[0][0].shape[0] else dict.fromkeys(self.weighs, zero_term(rows))
        values = {"feature": values} if isinstance(values, Tensor) else values
        per = rows_per_sample(rows, self.chosen(rows))
        terms = {name: getattr(self, name) * self._expand(value, rows, per) for name, value in values.items()}
        return self.with_hard(terms, rows)

    @staticmethod
    def _expand(value: Tensor, rows: Rows, per: int = 1) -> Tensor:
        """Expand a value of the block, or of its samples that are compared, to all rows, (N,), ``per`` a sample."""
        if value.ndim == 0:
            return expand_to_rows(value, rows)
        if len(value) * per != len(rows):
            value = spread_out(value, rows, per)
        return value if per == 1 else value.repeat_interleave(per)

    def chosen(self, rows: Rows) -> tuple[str, ...]:
        """Return the names of the features to compare."""
        return self.names or tuple(name for name in rows.features if name not in NOT_COMPARED)

    def pairs(self, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """Return the (student, teacher) pairs to compare, in float32 at least, without rows of weight 0.

        Raises:
            ValueError: for features that are missing or have the wrong shape.
        """
        names = self.chosen(rows)
        missing = [name for name in names if name not in rows.features]
        owner = type(self).__name__
        if missing or not names:
            raise ValueError(
                f"{owner} compares features, and Rows(name={rows.name!r}) has {sorted(rows.features) or 'none'}; "
                f"missing: {missing or 'any'}. {self.hint}"
            )
        kept = None
        if rows.weight is not None:  # one index for all: a mask would be read by the host for every feature
            kept = samples_kept(rows, rows_per_sample(rows, names)).nonzero().squeeze(1)
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in names:
            s, t = (upcast_to_float32(x) for x in rows.features[name])
            if kept is not None:
                s, t = s.index_select(0, kept), t.index_select(0, kept)
            if self.wants == "vectors":
                s, t = s.flatten(1), t.flatten(1)
            elif s.ndim != 4 or t.ndim != 4:
                raise ValueError(
                    f"{owner} compares maps (N, C, H, W); the feature {name!r} is {tuple(s.shape)} and "
                    f"{tuple(t.shape)}. Tap a convolutional stage."
                )
            elif all(x.shape[1] == x.shape[2] != x.shape[3] for x in (s, t)):
                warnings.warn(
                    f"{owner} compares maps (N, C, H, W); the feature {name!r} is {tuple(s.shape)} and "
                    f"{tuple(t.shape)}, which looks like (N, H, W, C), as in Swin. Name a module whose output has the "
                    "channels first, such as an nn.Identity after a permute(0, 3, 1, 2).",
                    stacklevel=3,
                )
            pairs.append((s, t.detach()))
        return pairs


def samples_kept(rows: Rows, per: int) -> Tensor:
    """Return which samples have a row of weight > 0, (B,), with ``per`` rows per sample."""
    assert rows.weight is not None
    kept = rows.weight > 0
    return kept if per == 1 else kept.view(-1, per).any(1)


def spread_out(value: Tensor, rows: Rows, per: int = 1) -> Tensor:
    """Scatter the values of samples with a row of weight > 0 to all samples, (N / per,); 0 for the others."""
    if rows.weight is None:
        return value
    kept = samples_kept(rows, per)
    return torch.zeros(len(kept), dtype=value.dtype, device=value.device).masked_scatter(kept, value)


def fitted(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the size of the smaller."""
    if s.shape[-1] > t.shape[-1]:
        s = F.adaptive_avg_pool2d(s, (t.shape[-2], t.shape[-1]))
    elif s.shape[-1] < t.shape[-1]:
        t = F.adaptive_avg_pool2d(t, (s.shape[-2], s.shape[-1]))
    return s, t


def per_row(x: Tensor) -> Tensor:
    """Return the mean over all dimensions but the first, (N,)."""
    return x.flatten(1).mean(1)


class Projected(FeatureMethod):
    """Base class of feature methods with learned projectors, created by ``setup`` from a first block of rows.

    The trainer calls ``setup`` before it creates the optimizer; in a custom training loop, call it there yourself.
    """

    zero_when_equal = False

    def __init__(self, *, feature: float, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.projectors = nn.ModuleList()

    @abstractmethod
    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        """Create the projectors for pairs of these shapes."""

    def setup(self, rows: Rows) -> None:
        if not len(self.projectors):
            pairs = self.pairs(rows)
            self.projectors.extend(self.build(pairs))
            self.projectors.to(pairs[0][0])

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if not len(self.projectors):
            raise RuntimeError(
                f"{type(self).__name__} has projectors whose sizes come from the features: call method.setup(rows) "
                "with a first block of rows, before the optimizer is made (of Lightning's DistillModule, "
                "module.prepare(batch) before fit)."
            )
        return super().forward(rows, progress)
