"""Membership inference: can it be told from a model's answer whether it was trained on a sample?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tempering.audits.intervals import Z


class Separation(NamedTuple):
    """Area under the ROC curve with its 95 % interval; 0.5 is guessing."""

    auc: float
    low: float
    high: float


def confidence(z: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The log-odds of the label, log(p / (1 - p)), from logits: near normal, and fine where the softmax is saturated.

    Reference: Carlini et al., "Membership Inference Attacks From First Principles", 2022, arXiv:2112.03570,
    section IV-C.
    """
    if z.shape[1] < 2:
        raise ValueError("the log-odds of a label need two classes; the model answers one.")
    own = torch.nn.functional.one_hot(y, z.shape[1]).bool()
    return z.gather(1, y[:, None])[:, 0] - z.masked_fill(own, -torch.inf).logsumexp(-1)


def separation(members: Float[Tensor, " M"], others: Float[Tensor, " N"]) -> Separation:
    """How well a score tells members from others; members are to score higher, ties count half.

    Reference: DeLong et al., "Comparing the areas under two or more correlated receiver operating characteristic
    curves", 1988, for the variance.
    """
    inside, outside = _placements(members, others)
    return _about(float(inside.mean()), _variance(inside, outside), 0.0, 1.0)


def separations_apart(
    first: tuple[Float[Tensor, " M"], Float[Tensor, " N"]], second: tuple[Float[Tensor, " M"], Float[Tensor, " N"]]
) -> Separation:
    """The first area minus the second, of two models' scores (members, others) of the same samples."""
    a, b = _placements(*first), _placements(*second)
    return _about(float((a[0] - b[0]).mean()), _variance(a[0] - b[0], a[1] - b[1]), -1.0, 1.0)


def found_at(members: Float[Tensor, " M"], others: Float[Tensor, " N"], rate: float) -> Bool[Tensor, " M"]:
    """Which members are found where no more than this share of others is taken for one, (M,)."""
    if not 0 <= rate < 1:
        raise ValueError(f"a false-positive rate lies in [0, 1); got {rate}.")
    allowed = int(rate * len(others) + 1e-9)
    return members > torch.sort(others, descending=True).values[allowed]


def lira(target: Float[Tensor, " N"], shadows: Float[Tensor, "S N"], out: Bool[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """The offline likelihood-ratio score, (N,): how far the target's confidence lies above that of models which were
    not trained on the sample, in their standard deviations.

    It is monotone in the paper's 1 - Pr[Z > target]. The deviation is one of all samples, as the paper has it where
    shadows are few.

    Args:
        target: ``confidence`` of the audited model.
        shadows: of each shadow model.
        out: which samples each shadow was not trained on.

    Raises:
        ValueError: where some sample was seen by all shadows, or none was left out twice.

    Reference: arXiv:2112.03570, section IV-C and equation 4.
    """
    left = out.sum(0)
    if int(left.min()) < 1 or int(left.sum()) <= len(target):
        raise ValueError(
            f"LiRA needs shadows that leave each sample out, some of them twice; one was left out {int(left.min())} "
            f"times of {len(shadows)}. Train more shadows."
        )
    kept = torch.where(out, shadows, 0.0)
    middle = kept.sum(0) / left
    spread = torch.where(out, shadows - middle, 0.0).square().sum() / (int(left.sum()) - len(target))
    return (target - middle) / spread.sqrt().clamp_min(1e-12)


def _placements(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The share of others below each member, (M,), and of members above each other one, (N,); ties count half."""
    if not len(members) or not len(others):
        raise ValueError(f"telling members from others needs some of both; got {len(members)} and {len(others)}.")
    return _share_below(members, others), 1 - _share_below(others, members)


def _share_below(values: Tensor, those: Tensor) -> Tensor:
    ordered = those.sort().values
    below, upto = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(those))


def _variance(inside: Tensor, outside: Tensor) -> float:
    """Of a mean of placements."""
    return sum(float(part.var()) / len(part) for part in (inside, outside) if len(part) > 1)


def _about(value: float, variance: float, least: float, most: float) -> Separation:
    half = Z * math.sqrt(variance)
    return Separation(value, max(least, value - half), min(most, value + half))
