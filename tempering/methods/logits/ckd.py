"""Comparative KD: the student is to see the differences between samples that the teacher sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.methods.base import Method, check_policy, check_weights
from tempering.methods.features.base import Projected, fitted
from tempering.methods.logits.labeled import one_hot
from tempering.methods.logits.relations import counted_entries
from tempering.objectives import kl, require_labels
from tempering.rows import Rows, expand_to_rows, upcast_to_float32
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Weight


class CKD(Method):
    """soft * MSE(dS, dT) + hard * MSE(dS, dY) + divergence * T^2 KL(softmax dT/T || softmax dS/T), over comparisons.

    A comparison is of two disjoint groups of rows: dS is the difference of the groups' mean student logits, dT of the
    teacher's, dY of their one-hot labels. N answers of the teacher make N^2 of them. What the groups' rows share
    cancels, so a classifier's bias learns nothing; ``Sum(CKD(), Supervised(hard=0.1))`` anchors it. There is no other
    cross entropy in it. Rows of weight 0 take no part, rows without a label none in ``hard``.

    Args:
        soft: weight of the teacher's differences.
        hard: weight of the labels' differences; 0 needs no labels.
        divergence: weight of the divergence of the softened differences; needs ``pairs``.
        groups: rows in each of the two groups; (1, 1) and (2, 1) in the released configurations.
        pairs: comparisons drawn per block, as released (64). None takes the mean over all there are, in O(N C): for
            r the difference of the two sides, (1/m + 1/n) times its variance over the rows, unbiased, in each class.
        temperature: of ``divergence``; None is Static(4.0), as released. A policy sees the differences as its rows.

    With weights, a comparison over all counts by the product of its rows' weights; a drawn one does not.

    Reference: Wilf et al., "Comparative Knowledge Distillation", WACV 2025, arXiv:2311.02253. The released code draws
    its groups over the data set, here over the block.
    """

    paper = "arXiv:2311.02253"
    relational = True
    shift_invariant = False

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight()] = 1.0,
        hard: float = 1.0,
        divergence: Annotated[float, Weight()] = 0.0,
        groups: Sequence[int] = (1, 1),
        pairs: int | None = None,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        check_weights("CKD", soft=soft, hard=hard, divergence=divergence)
        self.soft, self.hard, self.divergence = soft, hard, divergence
        self.groups, self.pairs = _sizes("CKD", groups), pairs
        if pairs is not None and pairs < 1:
            raise ValueError(f"CKD needs pairs >= 1, or None for all; got {pairs!r}.")
        if divergence and pairs is None:
            raise ValueError("CKD has no closed form of divergence > 0: draw comparisons, pairs=64.")
        self.temperature = check_policy("CKD", Static(4.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        kept, counted = counted_entries(rows)
        sides = {"soft": (kept.teacher, counted)}
        if self.hard:
            target = require_labels(rows, "CKD")
            sides["hard"] = (one_hot(target, kept.student).to(kept.student), counted & (target >= 0).unsqueeze(1))
        if self.pairs is None:
            terms = {
                name: variance_share(kept.student - other, part, rows.weight, self.groups)
                for name, (other, part) in sides.items()
            }
        else:
            terms = {name: self._drawn(kept, *side) for name, side in sides.items()}
            if self.divergence:
                terms["divergence"] = self._divergence(kept, counted, progress)
        return {name: getattr(self, name) * term for name, term in terms.items()}

    def _drawn(self, rows: Rows, other: Tensor, counted: Bool[Tensor, "N C"]) -> Float[Tensor, " N"]:
        """The mean squared difference over drawn comparisons, the same value for every row, (N,)."""
        drawn = sample_groups(counted.any(1), self.pairs or 0, sum(self.groups))
        ours, theirs = (differences(x, counted, drawn, self.groups[0]) for x in (rows.student, other))
        both = counted.any(0)
        error = F.mse_loss(ours[:, both], theirs[:, both]) if len(drawn) and both.any() else _nothing(rows.student)
        return expand_to_rows(error, rows)

    def _divergence(self, rows: Rows, counted: Bool[Tensor, "N C"], progress: float) -> Float[Tensor, " N"]:
        drawn = sample_groups(counted.any(1), self.pairs or 0, sum(self.groups))
        if not len(drawn):
            return expand_to_rows(_nothing(rows.student), rows)
        gone = ~counted.any(0)
        ours, theirs = (
            differences(x, counted, drawn, self.groups[0]).masked_fill(gone, -torch.inf)
            for x in (rows.student, rows.teacher)
        )
        compared = Rows(ours, theirs, name=rows.name)
        return expand_to_rows(kl(compared, self.temperature(compared, progress)).mean(), rows)


class FeatureCKD(Projected):
    """feature * MSE(differences of the projected student features, differences of the teacher's): the white-box form.

    Over all comparisons there are, as in ``CKD``. The projector is a 1x1 convolution without a bias, which would
    cancel; the larger of two maps is pooled. Beside the logits: ``Sum(CKD(), FeatureCKD(names=["stage3"]))``.

    Args:
        feature: weight of the term; 100 is the released one of the hint.
        hard: weight of the rows' cross entropy.
        groups: rows in each of the two groups.
        names: which of ``rows.features``; () for the middle stage.

    Reference: Wilf et al., 2025, arXiv:2311.02253: the released code's "ckd_inter" with a FitNet hint, whose regressor
    also has batch norm and ReLU.
    """

    paper = "arXiv:2311.02253"

    def __init__(
        self,
        *,
        feature: Annotated[float, Weight()] = 100.0,
        hard: float = 0.0,
        groups: Sequence[int] = (1, 1),
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.groups = _sizes("FeatureCKD", groups)

    def usual(self, stages: Sequence[str]) -> tuple[str, ...]:
        return tuple(stages[len(stages) // 2 :][:1])

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [nn.Conv2d(s.shape[1], t.shape[1], kernel_size=1, bias=False) for s, t in pairs]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        weight = None if rows.weight is None else rows.weight[rows.weight > 0]
        errors = []
        for project, (s, t) in zip(self.projectors, pairs, strict=True):
            s, t = fitted(project(s), t)
            r = (s - t).flatten(1)
            errors.append(variance_share(r, torch.ones_like(r, dtype=torch.bool), weight, self.groups))
        return sum(errors[1:], errors[0])


def variance_share(
    r: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], weight: Float[Tensor, " N"] | None, groups: Sequence[int]
) -> Float[Tensor, " N"]:
    """Each row's share of the mean over all comparisons of the mean squared difference of ``r``, (N,).

    The rows' weighted mean is that of the naive loop over all pairs of disjoint groups. A single row has no other to be
    compared with: 0.
    """
    share = counted.to(r.dtype) if weight is None else counted * upcast_to_float32(weight).to(r.dtype).unsqueeze(1)
    whole, squares = share.sum(0), share.square().sum(0)
    r = torch.where(counted, r, 0.0)
    center = (share * r).sum(0) / torch.where(whole > 0, whole, 1.0)
    left = whole.square() - squares
    alone = (counted.sum(0) < 2) | (left <= 0)
    unbiased = torch.where(alone, 0.0, whole / torch.where(alone, 1.0, left))
    mass = share.amax(1).sum()
    squared = torch.where(counted, r - center, 0.0).square() * (unbiased * mass)
    return (1.0 / groups[0] + 1.0 / groups[1]) * squared.sum(1) / (whole > 0).sum().clamp_min(1)


def sample_groups(kept: Bool[Tensor, " N"], pairs: int, size: int) -> Int[Tensor, "P size"]:
    """``pairs`` drawn lists of ``size`` different rows among those that are kept; none where there are too few."""
    places = kept.nonzero().squeeze(1)
    if len(places) < size:
        return places.new_zeros(0, size)
    return places[torch.rand(pairs, len(places), device=kept.device).topk(size, dim=1).indices]


def differences(
    x: Tensor, counted: Bool[Tensor, "N C"], drawn: Int[Tensor, "P size"], first: int
) -> Float[Tensor, "P C"]:
    """Mean of the first ``first`` rows of each list less that of the others, (P, C); 0 where a class is masked."""
    x = torch.where(counted, x, 0.0)[drawn]
    gap = x[:, :first].mean(1) - x[:, first:].mean(1)
    return torch.where(counted[drawn].all(1), gap, 0.0)


def _nothing(student: Tensor) -> Float[Tensor, ""]:
    """0 with a gradient path."""
    return torch.nan_to_num(student, neginf=0.0).sum() * 0.0


def _sizes(owner: str, groups: Sequence[int]) -> tuple[int, int]:
    if len(groups) != 2 or any(not isinstance(n, int) or n < 1 for n in groups):
        raise ValueError(f"{owner} compares two groups of one row or more, such as (1, 1) or (2, 1); got {groups!r}.")
    return groups[0], groups[1]
