"""What a teacher is: inputs and sample ids in, outputs without gradient out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(ABC):
    """Where the teacher's numbers come from. Never a module, so never a part of what is trained."""

    identity: str  # sha256 of what it is: weights and options, or a cache's key

    @abstractmethod
    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        """The teacher's outputs for these inputs, without gradient."""

    def to(self, device: torch.device | str) -> Teacher:
        """The same teacher, answering on ``device``."""
        return self

    @property
    def model(self) -> nn.Module | None:
        """The live module, where there is one."""
        return None
