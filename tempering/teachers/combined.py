"""Base class of teachers made of several teachers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor, nn

from tempering.rows import TEACHER_OUTPUTS
from tempering.teachers.base import Columns, Teacher
from tempering.teachers.live import Live, no_teacher_error
from tempering.teachers.outputs import Hidden, Sparse
from tempering.utils.tensors import logits_of

Teachers = Mapping[str, nn.Module | Teacher] | Sequence[nn.Module | Teacher]


class CombinedTeacher(Teacher):
    """A teacher of several: live, cached and remote ones may be mixed.

    Args:
        teachers: name -> module (wrapped in ``Live``) or teacher; those of a sequence are named "0", "1", ...

    Raises:
        ValueError: for no teachers.
        TypeError: for anything else, naming it.
    """

    def __init__(self, teachers: Teachers) -> None:
        owner = type(self).__name__
        if not isinstance(teachers, Mapping | Sequence) or isinstance(teachers, str):
            raise TypeError(
                f"{owner} needs teachers, {owner}([a, b]) or {owner}({{'a': a, 'b': b}}); got "
                f"{type(teachers).__name__}."
            )
        named = teachers if isinstance(teachers, Mapping) else {str(i): x for i, x in enumerate(teachers)}
        if not named:
            raise ValueError(f"{owner} needs at least one teacher; got none.")
        if wrong := [name for name, x in named.items() if not isinstance(x, nn.Module | Teacher)]:
            raise no_teacher_error(named[wrong[0]], f"{owner} needs a module or a teacher for {wrong[0]!r}")
        if numbers := [name for place, name in enumerate(named) if not isinstance(name, str) and name != place]:
            raise ValueError(
                f"{owner} needs texts as the names of teachers; got {numbers[0]!r}. Numbers are the places of the "
                "teachers, from 0: give a list."
            )
        self.parts = {str(name): x if isinstance(x, Teacher) else Live(x) for name, x in named.items()}
        self._nonfinite: list[str] | None = None  # the parts whose outputs are not finite, while they are looked for

    @property
    def columns(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.columns))

    @property
    def trained(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """Whether all of them are trained."""
        return all(part.trained for part in self.parts.values())

    @trained.setter
    def trained(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        for part in self.parts.values():
            part.trained = value

    @property
    def samples(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next((part.samples for part in self.parts.values() if part.samples is not None), None)

    def to(self, device: torch.device | str) -> Self:
        for part in self.parts.values():
            part.to(device)
        return self

    def bind_data(self, batches: object) -> None:
        for name, part in self.parts.items():
            with self._named(name):
                part.bind_data(batches)

    def follow(self, student: nn.Module) -> None:
        for part in self.parts.values():
            part.follow(student)

    def update(self) -> None:
        for part in self.leaves:  # one that is there twice is updated once
            part.update()

    @property
    def state(self) -> nn.Module | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        states = {str(i): part.state for i, part in enumerate(self.parts.values()) if part.state is not None}
        return nn.ModuleDict(states) if states else None

    @property
    def follows_student(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.follows_student for part in self.parts.values())

    @property
    def reads_outputs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.reads_outputs for part in self.parts.values())

    def incompatibility(self, batches: Any) -> str | None:
        reasons = {name: part.incompatibility(batches) for name, part in self.parts.items()}
        return next((f"teacher {name!r}: {reason}" for name, reason in reasons.items() if reason is not None), None)

    def for_batches(self, batches: Any) -> Teacher | None:
        found = {name: part.for_batches(batches) for name, part in self.parts.items()}
        if any(part is None for part in found.values()):
            return self.fallback
        if all(found[name] is part for name, part in self.parts.items()):
            return self
        other = copy.copy(self)
        other.parts = {name: part for name, part in found.items() if part is not None}
        return other

    @torch.no_grad()
    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        return self._answer(inputs, ids, grad=False)

    def forward_with_grad(self, inputs: Any, ids: Tensor | None = None) -> Any:
        return self._answer(inputs, ids, grad=True)

    @abstractmethod
    def _answer(self, inputs: Any, ids: Tensor | None, *, grad: bool) -> Any:
        """Return the outputs for these inputs, with a gradient path or without."""

    def _query(self, name: str, inputs: Any, ids: Tensor | None, *, grad: bool) -> Any:
        """Return one teacher's outputs; an error names the teacher."""
        part = self.parts[name]
        columns: dict[str, Any] = {}
        if isinstance(inputs, Columns):
            inputs, columns = inputs.inputs, {key: inputs.columns[key] for key in part.columns}
        inputs = self._own_inputs(part, inputs)
        inputs = Columns(inputs, columns) if columns else inputs
        with self._named(name):
            output = part.forward_with_grad(inputs, ids) if grad else part(inputs, ids)
        if self._nonfinite is not None and _has_nonfinite(dense_logits(output)):
            inner = part.nonfinite_parts(inputs, ids)
            self._nonfinite += [f"{name}/{other}" for other in inner] or [name]
        return output

    def nonfinite_parts(self, inputs: Any, ids: Tensor | None) -> list[str]:
        found = self._nonfinite = []
        try:
            with suppress(Exception):  # it explains an error, and must not hide it
                self(inputs, ids)
        finally:
            self._nonfinite = None
        return found

    def _own_inputs(self, part: Teacher, inputs: Any) -> Any:
        """Return the inputs without "teacher_outputs" of the data set that another part reads."""
        if not isinstance(inputs, Mapping) or part.reads_outputs or not self.reads_outputs:
            return inputs
        rest = {name: x for name, x in inputs.items() if name != TEACHER_OUTPUTS}
        return rest["inputs"] if list(rest) == ["inputs"] else rest  # as with_teacher_outputs() got them

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = type(self.parts[name]).__name__
            error.add_note(
                f"This is of the teacher {name!r} ({kind}), one of {len(self.parts)} of {type(self).__name__}."
            )
            raise

    def _said(self, name: str, output: Any) -> str:
        """Describe a teacher and its output for an error."""
        shape = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        return f"teacher {name!r} ({type(self.parts[name]).__name__}) returned {shape}"


class AsModule(nn.Module):
    """A teacher as a module of its inputs, for code that runs modules, such as audits."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self.networks = teacher, nn.ModuleList(teacher.models)

    def forward(self, inputs: Any) -> Any:
        return self.teacher.forward_with_grad(inputs, None)


def _has_nonfinite(output: Any) -> bool:
    """Whether logits are NaN or infinite, but for minus infinity, which masks, and what a cache has not stored."""
    if isinstance(output, Sparse):
        output = output.logp if output.stored is None else output.logp[output.stored]
    return isinstance(output, Tensor) and bool((torch.isnan(output) | torch.isposinf(output)).any())


def dense_logits(output: Any) -> Any:
    """Return the logits of an output, those of hidden states computed; anything else is returned as it is."""
    return output.head(output.states) if isinstance(output, Hidden) else logits_of(output)
