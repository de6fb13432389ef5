"""Shared functions of methods that treat the label's class and the other classes differently."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.objectives import log_softmax


def one_hot(label: Tensor, like: Float[Tensor, "N C"]) -> Bool[Tensor, "N C"]:
    """Return the one-hot mask of the labels; the first class for a row without a label."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, label_index(label), True)


def drop_classes(z: Float[Tensor, "N C"], out: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Return log-probabilities of the classes not in ``out``; minus infinity on ``out``, and if no class remains."""
    kept = ~out & ~torch.isneginf(z)
    return log_softmax(z.masked_fill(~kept, -torch.inf)).masked_fill(~kept, -torch.inf)


def soft_cross_entropy(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Return the cross entropy of two log-probabilities, (N,); 0 if no class remains."""
    is_masked = torch.isneginf(logp)
    return -(logp.exp() * logq.masked_fill(is_masked, 0.0)).sum(-1)


def weighted_nll(confidence: Float[Tensor, " N"], student: Float[Tensor, "N C"], label: Tensor) -> Float[Tensor, " N"]:
    """Return -confidence * log p(label), (N,); 0 on rows without a label."""
    logp = log_softmax(student).gather(1, label_index(label)).squeeze(1)
    return torch.where(label >= 0, -(confidence * logp.masked_fill(torch.isneginf(logp) & (confidence == 0), 0.0)), 0.0)


def label_index(label: Tensor) -> Tensor:
    """Return labels as an index (N, 1) for ``gather``; the first class for a row without a label."""
    return label.clamp_min(0).long().unsqueeze(1)
