"""What methods that treat the label's class apart from the others share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.objectives import log_softmax


def one_hot(label: Tensor, like: Float[Tensor, "N C"]) -> Bool[Tensor, "N C"]:
    """Where each row's label is; the first class for a row without one."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, label_index(label), True)


def drop_classes(z: Float[Tensor, "N C"], out: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Log-probabilities of the classes that are not ``out``; minus infinity on these, and where no class is left."""
    left = ~out & ~torch.isneginf(z)
    return log_softmax(z.masked_fill(~left, -torch.inf)).masked_fill(~left, -torch.inf)


def soft_cross_entropy(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Cross entropy of two log-probabilities, (N,); 0 where no class is left."""
    gone = torch.isneginf(logp)
    return -(logp.exp() * logq.masked_fill(gone, 0.0)).sum(-1)


def weighted_nll(sure: Float[Tensor, " N"], student: Float[Tensor, "N C"], label: Tensor) -> Float[Tensor, " N"]:
    """-sure * log p(label), (N,); 0 on rows without a label."""
    logp = log_softmax(student).gather(1, label_index(label)).squeeze(1)
    return torch.where(label >= 0, -(sure * logp.masked_fill(torch.isneginf(logp) & (sure == 0), 0.0)), 0.0)


def label_index(label: Tensor) -> Tensor:
    """Labels as an index (N, 1) to gather by; the first class for a row without one."""
    return label.clamp_min(0).long().unsqueeze(1)
