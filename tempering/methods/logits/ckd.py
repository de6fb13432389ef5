"""Comparative KD: match the differences between the teacher's logits of different samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.methods.base import Method, check_policy
from tempering.methods.features.base import Projected, fitted
from tempering.methods.logits.labeled import one_hot
from tempering.methods.logits.relations import counted_entries
from tempering.objectives import kl, require_labels
from tempering.rows import Rows, expand_to_rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, TermWeight


class CKD(Method):
    """Comparative KD: soft * MSE(dS, dT) + hard * MSE(dS, dY) + divergence * T^2 KL(softmax dT/T || softmax dS/T), over
    comparisons.

    A comparison is between two disjoint groups of rows: dS is the difference of the groups' mean student logits, dT of
    the teacher's, dY of their one-hot labels. N teacher outputs give N^2 comparisons. An offset common to all rows
    cancels, so the bias of a classifier gets no gradient; ``Sum(CKD(), Supervised(hard=0.1))`` adds one. There is no
    cross entropy in CKD. Rows of weight 0 are excluded, rows without a label from ``hard`` only.

    Args:
        soft: weight of the MSE to the teacher's differences.
        hard: weight of the MSE to the labels' differences; with 0 no labels are needed.
        divergence: weight of the divergence of the softened differences; requires ``pairs``.
        groups: number of rows in each of the two groups; (1, 1) and (2, 1) in the released configurations.
        pairs: number of comparisons drawn per block; released: 64. None: the mean over all comparisons, in O(N C): with
            r the difference of the two sides, (1/m + 1/n) times the unbiased variance of r over the rows, per class.
        temperature: policy of ``divergence``, applied to the differences as rows; None: Static(4.0), as released.

    With ``pairs=None`` and row weights w, the mean is (1/m + 1/n) / 2 times that of (r_i - r_j)^2 over all pairs of
    rows, weighted by w_i w_j. For groups (1, 1), and for weights of 0 and 1, this is the mean over all comparisons,
    each weighted by the product of its rows' weights; for larger groups with other weights it is not. Drawn comparisons
    are not weighted.

    Reference: Wilf et al., "Comparative Knowledge Distillation", WACV 2025, arXiv:2311.02253. The released code draws
    the groups from the data set, this one from the block.
    """

    paper = "arXiv:2311.02253"
    relational = True
    shift_invariant = False
    hard_is_cross_entropy = False

    def __init__(
        self,
        *,
        soft: TermWeight = 1.0,
        hard: NonNegative = 1.0,
        divergence: TermWeight = 0.0,
        groups: Sequence[int] = (1, 1),
        pairs: int | None = None,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.divergence = soft, hard, divergence
        self.groups, self.pairs = _sizes("CKD", groups), pairs
        if pairs is not None and pairs < 1:
            raise ValueError(f"CKD needs pairs >= 1, or None for all; got {pairs!r}.")
        if divergence and pairs is None:
            raise ValueError("CKD has no closed form of divergence > 0: draw comparisons, pairs=64.")
        self.temperature = check_policy("CKD", temperature, default=4.0)

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
            terms = {name: self._sampled_mse(kept, *side) for name, side in sides.items()}
            if self.divergence:
                terms["divergence"] = self._divergence(kept, counted, progress)
        return {name: getattr(self, name) * term for name, term in terms.items()}

    def _sampled_mse(self, rows: Rows, other: Tensor, counted: Bool[Tensor, "N C"]) -> Float[Tensor, " N"]:
        """Return the mean squared error over drawn comparisons, one value expanded to all rows, (N,)."""
        groups = sample_groups(counted.any(1), self.pairs or 0, sum(self.groups))
        d_s, d_other = (differences(x, counted, groups, self.groups[0]) for x in (rows.student, other))
        classes = counted.any(0)
        if len(groups) and classes.any():
            error = F.mse_loss(d_s[:, classes], d_other[:, classes])
        else:
            error = _zero(rows.student)
        return expand_to_rows(error, rows)

    def _divergence(self, rows: Rows, counted: Bool[Tensor, "N C"], progress: float) -> Float[Tensor, " N"]:
        groups = sample_groups(counted.any(1), self.pairs or 0, sum(self.groups))
        if not len(groups):
            return expand_to_rows(_zero(rows.student), rows)
        is_masked = ~counted.any(0)
        d_s, d_t = (
            differences(x, counted, groups, self.groups[0]).masked_fill(is_masked, -torch.inf)
            for x in (rows.student, rows.teacher)
        )
        compared = Rows(d_s, d_t, name=rows.name)
        return expand_to_rows(kl(compared, self.temperature(compared, progress)).mean(), rows)


class FeatureCKD(Projected):
    """Comparative KD of features: feature * MSE(differences of projected student features, differences of teacher
    features).

    The mean is over all comparisons, as in ``CKD``. The projector is a 1x1 convolution without bias (a bias would
    cancel); the larger of the two maps is average-pooled. Combine it with logits as ``Sum(CKD(),
    FeatureCKD(names=["stage3"]))``.

    Args:
        feature: weight of the term; default: 100, the released weight of the FitNet hint.
        hard: weight of the cross entropy.
        groups: number of rows in each of the two groups.
        names: keys of ``rows.features``; () for the middle stage.

    Reference: Wilf et al., 2025, arXiv:2311.02253: the released code's "ckd_inter" with a FitNet hint, whose regressor
    also has batch norm and ReLU.
    """

    paper = "arXiv:2311.02253"

    def __init__(
        self,
        *,
        feature: TermWeight = 100.0,
        hard: NonNegative = 0.0,
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
        errors: list[Tensor] = []
        for project, (s, t) in zip(self.projectors, pairs, strict=True):
            s, t = fitted(project(s), t)
            r = (s - t).flatten(1)
            errors.append(variance_share(r, torch.ones_like(r, dtype=torch.bool), weight, self.groups))
        return sum(errors[1:], errors[0])


def variance_share(
    r: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], weight: Float[Tensor, " N"] | None, groups: Sequence[int]
) -> Float[Tensor, " N"]:
    """Return each row's part of the mean squared difference of ``r`` over all comparisons, (N,).

    Their weighted mean over rows is what ``CKD`` documents. It is 0 for a single row.
    """
    w = counted.to(r.dtype) if weight is None else counted * upcast_to_float32(weight).to(r.dtype).unsqueeze(1)
    class_weight, squares = w.sum(0), w.square().sum(0)
    r = torch.where(counted, r, 0.0)
    center = (w * r).sum(0) / torch.where(class_weight > 0, class_weight, 1.0)
    off_diagonal = class_weight.square() - squares
    too_few = (counted.sum(0) < 2) | (off_diagonal <= 0)
    unbiased = torch.where(too_few, 0.0, class_weight / torch.where(too_few, 1.0, off_diagonal))
    total_weight = w.amax(1).sum()
    squared = torch.where(counted, r - center, 0.0).square() * (unbiased * total_weight)
    return (1.0 / groups[0] + 1.0 / groups[1]) * squared.sum(1) / (class_weight > 0).sum().clamp_min(1)


def sample_groups(kept: Bool[Tensor, " N"], pairs: int, size: int) -> Int[Tensor, "P size"]:
    """Draw ``pairs`` lists of ``size`` different indices of kept rows; an empty tensor if there are too few rows."""
    indices = kept.nonzero().squeeze(1)
    if len(indices) < size:
        return indices.new_zeros(0, size)
    return indices[torch.rand(pairs, len(indices), device=kept.device).topk(size, dim=1).indices]


def differences(
    x: Tensor, counted: Bool[Tensor, "N C"], drawn: Int[Tensor, "P size"], first: int
) -> Float[Tensor, "P C"]:
    """Return the mean of the first ``first`` rows of each list minus the mean of the others, (P, C); 0 if masked."""
    x = torch.where(counted, x, 0.0)[drawn]
    gap = x[:, :first].mean(1) - x[:, first:].mean(1)
    return torch.where(counted[drawn].all(1), gap, 0.0)


def _zero(student: Tensor) -> Float[Tensor, ""]:
    """Return 0 connected to the student's graph."""
    return torch.nan_to_num(student, neginf=0.0).sum() * 0.0


def _sizes(owner: str, groups: Sequence[object]) -> tuple[int, int]:
    sizes = [n for n in groups if isinstance(n, int) and n >= 1]
    if len(groups) != 2 or len(sizes) != 2:
        raise ValueError(f"{owner} compares two groups of one row or more, such as (1, 1) or (2, 1); got {groups!r}.")
    return sizes[0], sizes[1]
