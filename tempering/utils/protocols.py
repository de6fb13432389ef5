"""Define the protocols of models that are shared by all packages."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasLogits(Protocol):
    """An output of a model with logits, such as the ``ModelOutput`` classes of transformers, or ``models`` detectors.

    Attributes:
        logits: (N, C) of a classifier, (B, L, V) of a language model, (B, A, K) of a detector.
    """

    @property
    def logits(self) -> Tensor: ...
