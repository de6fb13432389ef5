"""What a teacher is: inputs and sample ids in, outputs without gradient out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from tempering.utils.files import sha256_text
from tempering.utils.tensors import tensor_bytes


class Teacher(ABC):
    """Where the teacher's numbers come from. Never a module, so never a part of what is trained."""

    identity: str  # sha256 of what it is: weights and options, or a cache's key
    trained: bool = True  # False for random weights, with which `tempering check` checks before there is a teacher
    fallback: Teacher | None = None  # who is asked about data that a cache does not hold, such as the test split

    @abstractmethod
    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        """The teacher's outputs for these inputs, without gradient."""

    def forward_with_grad(self, inputs: Any, ids: Tensor | None) -> Any:
        """The same answers with a gradient path to the inputs, and to such weights as require grad.

        Raises:
            TypeError: for a teacher that has no way back.
        """
        raise TypeError(
            f"{type(self).__name__} has answers and no gradient. Give the model itself: teachers.Live(model)."
        )

    def to(self, device: torch.device | str) -> Self:
        """The same teacher, answering on ``device``."""
        return self

    @property
    def model(self) -> nn.Module | None:
        """The live module, where there is one."""
        return None

    def incompatibility(self, batches: Any) -> str | None:
        """Why its answers do not belong to these batches, and what to do; None if they do. A live one never objects."""
        return None

    def for_batches(self, batches: Any) -> Teacher | None:
        """Who answers for these batches: itself, else ``fallback``; None where neither can."""
        return self if self.incompatibility(batches) is None else self.fallback


def fingerprint(model: nn.Module) -> str:
    """sha256 of a model, in hexadecimal: its modules' names and types, and the bytes of its state.

    The same for the same weights on any device; hyperparameters that are neither state nor a type are not seen.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__name__}\n".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            digest.update(tensor_bytes(value))
        else:
            digest.update(f"{name}: {value!r}\n".encode())
    return digest.hexdigest()


def key_digest(key: dict[str, Any]) -> str:
    """sha256 of a JSON-able key, in hexadecimal."""
    return sha256_text(json.dumps(key, sort_keys=True))
