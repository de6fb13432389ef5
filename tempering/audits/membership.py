"""Membership inference: does a model's output reveal whether it was trained on a sample?"""

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
    """Return the log-odds of the label, log(p / (1 - p)), from logits: near normal, stable for a saturated softmax.

    Reference: Carlini et al., "Membership Inference Attacks From First Principles", 2022, arXiv:2112.03570,
    section IV-C.
    """
    if z.shape[1] < 2:
        raise ValueError("the log-odds of a label need two classes; the model has one.")
    label_mask = torch.nn.functional.one_hot(y, z.shape[1]).bool()
    return z.gather(1, y[:, None])[:, 0] - z.masked_fill(label_mask, -torch.inf).logsumexp(-1)


def separation(members: Float[Tensor, " M"], others: Float[Tensor, " N"]) -> Separation:
    """Return how well a score separates members from others; members should score higher, ties count half.

    Reference: DeLong et al., "Comparing the areas under two or more correlated receiver operating characteristic
    curves", 1988, for the variance.
    """
    inside, outside = _placements(members, others)
    return _interval(float(inside.mean()), _variance(inside, outside), 0.0, 1.0)


def separations_apart(
    first: tuple[Float[Tensor, " M"], Float[Tensor, " N"]], second: tuple[Float[Tensor, " M"], Float[Tensor, " N"]]
) -> Separation:
    """Return the first AUC minus the second, for two models' scores (members, others) of the same samples."""
    a, b = _placements(*first), _placements(*second)
    return _interval(float((a[0] - b[0]).mean()), _variance(a[0] - b[0], a[1] - b[1]), -1.0, 1.0)


def found_at(members: Float[Tensor, " M"], others: Float[Tensor, " N"], rate: float) -> Bool[Tensor, " M"]:
    """Return which members are detected at this false-positive rate, (M,)."""
    if not 0 <= rate < 1:
        raise ValueError(f"a false-positive rate must be in [0, 1); got {rate}.")
    allowed = int(rate * len(others) + 1e-9)
    return members > torch.sort(others, descending=True).values[allowed]


def lira(target: Float[Tensor, " N"], shadows: Float[Tensor, "S N"], out: Bool[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """Return the offline likelihood-ratio score, (N,).

    It is the distance of the target's confidence to that of models not trained on the sample, in standard deviations;
    monotone in the paper's 1 - Pr[Z > target]. The standard deviation is shared by all samples, as in the paper for
    few shadow models.

    Args:
        target: ``confidence`` of the audited model.
        shadows: ``confidence`` of each shadow model.
        out: which samples each shadow was not trained on.

    Raises:
        ValueError: if all shadows were trained on some sample, or none was left out twice.

    Reference: arXiv:2112.03570, section IV-C and equation 4.
    """
    left_out = out.sum(0)
    if int(left_out.min()) < 1 or int(left_out.sum()) <= len(target):
        raise ValueError(
            "LiRA needs shadows that leave each sample out, some of them twice; one was left out "
            f"{int(left_out.min())} times of {len(shadows)}. Train more shadows."
        )
    masked = torch.where(out, shadows, 0.0)
    mean = masked.sum(0) / left_out
    spread = torch.where(out, shadows - mean, 0.0).square().sum() / (int(left_out.sum()) - len(target))
    return (target - mean) / spread.sqrt().clamp_min(1e-12)


def _placements(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fraction of others below each member, (M,), and of members above each other, (N,); ties count half."""
    if not len(members) or not len(others):
        raise ValueError(f"membership inference needs members and others; got {len(members)} and {len(others)}.")
    return _share_below(members, others), 1 - _share_below(others, members)


def _share_below(values: Tensor, those: Tensor) -> Tensor:
    ordered = those.sort().values
    below, upto = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(those))


def _variance(inside: Tensor, outside: Tensor) -> float:
    """Return the variance of a mean of placements."""
    return sum(float(part.var()) / len(part) for part in (inside, outside) if len(part) > 1)


def _interval(value: float, variance: float, lowest: float, highest: float) -> Separation:
    half = Z * math.sqrt(variance)
    return Separation(value, max(lowest, value - half), min(highest, value + half))
