"""Ensemble of two teachers, such as R2KD's: a network and its pruned copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.live import Live
from tempering.utils.tensors import logits_of


class EnsembleTeacher(Teacher):
    """Weighted sum of two teachers' logits: share * first + (1 - share) * second.

    ``EnsembleTeacher(model, prune(model))`` is R2KD's teacher. Features are extracted from the first.

    Args:
        first, second: modules (wrapped in Live) or teachers that return (N, C) logits.
        share: weight of the first, in [0, 1].

    Reference: Kim et al., IEEE TKDE 2024, arXiv:2311.13934.
    """

    def __init__(self, first: nn.Module | Teacher, second: nn.Module | Teacher, *, share: float = 0.7) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"EnsembleTeacher needs share in [0, 1], the weight of the first teacher; got {share!r}.")
        self.first, self.second = (x if isinstance(x, Teacher) else Live(x) for x in (first, second))
        self.share = share
        self.identity = key_digest({"blend": [self.first.identity, self.second.identity], "share": share})

    @property
    def model(self) -> nn.Module | None:
        return self.first.model

    def to(self, device: torch.device | str) -> Self:
        self.first.to(device)
        self.second.to(device)
        return self

    def bind_data(self, batches: object) -> None:
        self.first.bind_data(batches)
        self.second.bind_data(batches)

    def incompatibility(self, batches: Any) -> str | None:
        return self.first.incompatibility(batches) or self.second.incompatibility(batches)

    @torch.no_grad()
    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Tensor:
        return self._blend(self.first(inputs, ids), self.second(inputs, ids))

    def forward_with_grad(self, inputs: Any, ids: Tensor | None = None) -> Tensor:
        return self._blend(self.first.forward_with_grad(inputs, ids), self.second.forward_with_grad(inputs, ids))

    def _blend(self, first: Any, second: Any) -> Tensor:
        first, second = _logits(first), _logits(second)
        if first.shape != second.shape:
            raise ValueError(
                f"EnsembleTeacher adds logits of one shape; the first teacher returned {tuple(first.shape)} and the "
                f"second {tuple(second.shape)}. Both need the same classes in the same order."
            )
        return self.share * first + (1.0 - self.share) * second


def prune(model: nn.Module, *, amount: float = 0.1) -> nn.Module:
    """Return a copy with the smallest |w| of every convolution and linear layer set to 0, a share ``amount`` of each.

    Biases are kept and the copy is not fine-tuned, as in R2KD.

    Raises:
        ValueError: for an amount outside [0, 1), or a model without such layers.
    """
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"prune needs amount in [0, 1), the share of weights set to 0; got {amount!r}.")
    out = copy.deepcopy(model)
    layers = [m for m in out.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    if not layers:
        raise ValueError(f"prune found no convolution or linear layer in {type(model).__name__}.")
    for layer in layers:
        weights = layer.weight.detach().flatten()  # a copy in channels-last format, so it is copied back
        smallest = weights.abs().topk(round(amount * len(weights)), largest=False).indices
        layer.weight.data.copy_(weights.index_fill(0, smallest, 0.0).view_as(layer.weight))
    return out


def with_pruned(
    model: nn.Module, *, amount: float, wrap: Callable[[nn.Module], Teacher] = Live, share: float = 0.7
) -> EnsembleTeacher:
    """Return R2KD's teacher: the model and its pruned copy, each wrapped as ``wrap`` does."""
    return EnsembleTeacher(wrap(model), wrap(prune(model, amount=amount)), share=share)


def _logits(output: Any) -> Tensor:
    logits = logits_of(output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"EnsembleTeacher adds logits, and a teacher returned {type(logits).__name__}.")
    return logits
