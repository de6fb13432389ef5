"""Base class of teachers: map inputs and sample ids to outputs without gradient."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tempering.utils.files import sha256_text
from tempering.utils.state import unwrapped
from tempering.utils.tensors import tensor_bytes


class Columns(NamedTuple):
    """A teacher's inputs, and the columns of the batch that it reads beside them (``Teacher.columns``)."""

    inputs: Any
    columns: dict[str, Any]


class Teacher(ABC):
    """Source of the teacher's outputs. Not an ``nn.Module``, so it is never part of the trained parameters.

    Attributes:
        parts: name -> teacher, of a teacher made of several.
        columns: columns of the batch that it reads beside its inputs; the student does not see them.
        state: the module that changes during a run and belongs in checkpoints; None: nothing changes.
        follows_student: whether it is made of the student, by ``follow``.
        reads_outputs: whether it reads "teacher_outputs" of the batch.
    """

    identity: str  # sha256 of the weights and options, or of a cache's key
    trained: bool = True  # False for random weights, which `tempering check` uses before the teacher is trained
    samples: int | None = None  # number of tokens sampled per position, of teachers with sampled outputs
    fallback: Teacher | None = None  # teacher for data that a cache does not contain, such as the test split
    parts: Mapping[str, Teacher] = MappingProxyType({})
    columns: tuple[str, ...] = ()
    state: nn.Module | None = None
    follows_student: bool = False
    reads_outputs: bool = False

    @abstractmethod
    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        """Return the teacher's outputs for these inputs, without gradient."""

    def forward_with_grad(self, inputs: Any, ids: Tensor | None) -> Any:
        """Return the same outputs with a gradient path to the inputs, and to the weights that require grad.

        Raises:
            TypeError: if the teacher is not differentiable.
        """
        raise TypeError(
            f"{type(self).__name__} is not differentiable: it has only stored outputs. Give the model "
            "itself: teachers.Live(model)."
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the teacher to ``device`` and return it."""
        return self

    def bind_data(self, batches: object) -> None:
        """Receive the batches of a run before the first of them; a live teacher reads their normalization.

        Raises:
            ValueError: for batches that do not say how they are normalized, if the teacher has to know it.
        """
        return

    @property
    def model(self) -> nn.Module | None:
        """The live module, or None."""
        return None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The live modules, of all parts."""
        if self.parts:
            return tuple(dict.fromkeys(model for part in self.parts.values() for model in part.models))
        return () if self.model is None else (self.model,)

    @property
    def leaves(self) -> tuple[Teacher, ...]:
        """The teachers that it is made of, each once; itself if it has no parts."""
        if not self.parts:
            return (self,)
        return tuple(dict.fromkeys(leaf for part in self.parts.values() for leaf in part.leaves))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the parts that run."""
        return tuple(self.parts)

    def alone(self, name: str) -> Teacher | None:
        """Return a teacher that answers as the part ``name`` does; None if that answers only some samples."""
        return None

    def owners(self, inputs: Any, ids: Tensor | None, output: Any) -> Any:
        """Return the output with every value replaced by the number of the part that made it."""
        raise TypeError(f"{type(self).__name__} has no parts that answer some samples each.")

    def nonfinite_parts(self, inputs: Any, ids: Tensor | None) -> list[str]:
        """Return the names of the parts, if there are several, whose outputs for these inputs hold NaN or infinity."""
        return []

    def check_predicts(self, predicts: str) -> None:
        """Check that the outputs have a meaning for what a task predicts, ``Task.predicts``.

        Raises:
            ValueError: for outputs that are combined in a way that has none.
        """
        for part in self.parts.values():
            part.check_predicts(predicts)

    def follow(self, student: nn.Module) -> None:
        """Receive the student before a run, if the teacher is made of it."""
        return

    def update(self) -> None:
        """Follow the student after a step of the optimizer."""
        return

    def incompatibility(self, batches: Any) -> str | None:
        """Return why the outputs do not belong to these batches and what to do; None if they do, as for a live one."""
        return None

    def for_batches(self, batches: Any) -> Teacher | None:
        """Return the teacher for these batches: itself, else ``fallback``; None if there is none."""
        return self if self.incompatibility(batches) is None else self.fallback


def fingerprint(model: nn.Module) -> str:
    """Return the sha256 of a model, in hexadecimal: of its modules' names and types and the bytes of its state.

    Equal weights have equal fingerprints on any device, also inside torch.compile or DataParallel, and offloaded by
    accelerate to memory or files; hyperparameters that are neither state nor a type do not count.

    Raises:
        ValueError: for weights on the meta device, which have no values.
    """
    model, digest = unwrapped(model), hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__name__}\n".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            value = _loaded(model, name) if value.is_meta else value
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            digest.update(tensor_bytes(value))
        else:
            digest.update(f"{name}: {value!r}\n".encode())
    return digest.hexdigest()


def _loaded(model: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter or buffer that accelerate has offloaded."""
    path, _, attribute = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if (weights := getattr(part, "weights_map", None)) is not None:
            return weights[attribute]
    raise ValueError(
        f"{type(model).__name__} has no values for {name}: it is on the meta device. Load its weights first: "
        "model.to_empty(device='cpu'), then load_state_dict; or from_pretrained(...)."
    )


def key_digest(key: dict[str, Any]) -> str:
    """Return the sha256 of a JSON-serializable key, in hexadecimal."""
    return sha256_text(json.dumps(key, sort_keys=True))
