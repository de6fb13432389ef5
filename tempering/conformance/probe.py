"""Call losses of every kind in one way: on rows of logits, with their labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tempering.conformance.definitions import DEFINITIONS
from tempering.conformance.promises import Kind, Promises, takes
from tempering.rows import IGNORE_INDEX

LABELS = ("labels", "target", "targets", "label", "y")
MASKS = ("mask", "valid", "attention_mask", "response_mask")
TEMPERATURES = ("temperature", "T", "tau", "temp")
NORMALIZERS = ("normalizer", "num_items_in_batch")
CHUNK_SIZES = ("chunk_size", "chunk")
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Violation(AssertionError):
    """A broken invariant, with the value that was expected and the one that was found."""

    def __init__(
        self,
        message: str,
        *,
        expected: Any = None,
        found: Any = None,
        promised: bool | None = None,
        **tensors: Tensor | None,
    ) -> None:
        """``promised``: whether it is a failure whatever the invariant's own condition says; None: as that says."""
        super().__init__(message)
        self.expected, self.found, self.promised = expected, found, promised
        self.tensors = {name: x.detach() for name, x in tensors.items() if x is not None}


class NotApplicable(Exception):
    """The loss has no such input, or refuses it; the message says which."""


class OutOfTime(NotApplicable):
    """The time of the whole check is used up."""


class Probe:
    """A loss, called on rows.

    Args:
        loss: the loss, or an adapter of one; see ``check``.
        kind: its kind.
        promises: what it promises.
    """

    def __init__(self, loss: Callable[..., Any], kind: Kind, promises: Promises) -> None:
        self.loss, self.promises = loss, promises
        self.kind: Kind = kind
        named = getattr(loss, "signature_of", loss)
        named = named.forward if isinstance(named, torch.nn.Module) else named
        self.labels, self.mask = takes(named, *LABELS), takes(named, *MASKS)
        self.temperature, self.normalizer = takes(named, *TEMPERATURES), takes(named, *NORMALIZERS)
        self.chunk_size = takes(named, *CHUNK_SIZES)
        self.compile: bool | str = False
        self.copies = True
        """Whether the loss gets copies, so that one that modifies them spoils no other invariant."""
        self.values_of_rows: dict[tuple[int, float | None], float] = {}
        """Of the rows that known definitions are compared on, by number and temperature."""
        self.deadline = math.inf
        self.last_call = ""
        self.on_rows = kind in ("logits", "tokens", "top_k")
        self.ignores = self.labels is not None or self.mask is not None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures to try: T = 1 first where the loss takes one."""
        return (1.0, 0.05, 2.0, 4.0, 100.0) if self.temperature else (self.promises.temperature,)

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        temperature: float | None = None,
        extra: Mapping[str, Any] = NOTHING,
    ) -> Tensor:
        """Return the loss of N rows, (); for features and scores of the two tensors.

        Args:
            student: (N, C).
            teacher: (N, C).
            target: (N,) labels, -100 for rows to leave out; None: class 0. For features the mask (N, ...) True for
                valid vectors; None: all.
            temperature: T, for a loss that takes one.
            extra: more arguments of the loss, by name.
        """
        if not self.on_rows:
            mask = torch.ones(student.shape[:-1], dtype=torch.bool) if target is None else target
            masks = {self.mask: mask} if self.mask and self.kind == "features" else {}
            return self._scalar(self._loss((student, teacher), {**masks, **extra}), 1)
        target = torch.zeros(len(student), dtype=torch.long) if target is None else target
        if self.kind == "tokens":
            shift = self.promises.shift
            student, teacher = (torch.cat((x, x.new_zeros(shift, x.shape[1])))[None] for x in (student, teacher))
            target = torch.cat((target.new_full((shift,), IGNORE_INDEX), target))[None]
        return self.call(student, teacher, target, temperature, extra)

    def call(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float | None = None,
        extra: Mapping[str, Any] = NOTHING,
    ) -> Tensor:
        """Return the loss of logits in the loss's own shape, (B, T, V) or (N, C), with labels of the same shape."""
        if self.kind == "top_k":
            return self.call_top_k(student, teacher, teacher.shape[-1], target, temperature, extra)
        return self.call_sides((student, teacher), target, temperature, extra)

    def call_top_k(
        self,
        student: Tensor,
        teacher: Tensor,
        k: int,
        target: Tensor | None = None,
        temperature: float | None = None,
        extra: Mapping[str, Any] = NOTHING,
        order: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a list of the teacher's k most likely classes, in this order."""
        values, indices = top_k_of(teacher, k, self.promises.top_k_values)
        if order is not None:
            values, indices = values[..., order], indices[..., order]
        return self.call_sides((student, values, indices), target, temperature, extra)

    def call_sides(
        self,
        sides: tuple[Tensor, ...],
        target: Tensor | None = None,
        temperature: float | None = None,
        extra: Mapping[str, Any] = NOTHING,
    ) -> Tensor:
        """Return the loss of the tensors that it takes: student and teacher, or (N, K) values and indices of a list."""
        target = torch.zeros(len(sides[0]), dtype=torch.long) if target is None else target
        arguments = {**self._arguments(target, temperature), **extra}
        return self._scalar(self._loss(sides, arguments), self._count(target))

    def _arguments(self, target: Tensor, temperature: float | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.labels:
            arguments[self.labels] = target
        if self.mask:
            arguments[self.mask] = target != IGNORE_INDEX
        if self.temperature:
            arguments[self.temperature] = 1.0 if temperature is None else temperature
        return arguments

    def _count(self, target: Tensor) -> int:
        return int((target != IGNORE_INDEX).sum()) if self.ignores else target.numel()

    def _loss(self, sides: tuple[Tensor, ...], arguments: Mapping[str, Any]) -> Any:
        shown = [_shape(x) for x in sides] + [f"{name}={_shape(value)}" for name, value in arguments.items()]
        self.last_call = f"loss({', '.join(shown)})"
        if time.perf_counter() > self.deadline:
            raise OutOfTime("not checked: the time is used up")
        return self.loss(*(x.clone() if self.copies else x for x in sides), **arguments)

    def gradient(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient in the student, both detached."""
        return self.differentiate(lambda x: self(x, teacher, target, temperature), student)

    def differentiate(self, function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
        """Return a function's value and its gradient at the student."""
        leaf = student.detach().clone().requires_grad_()
        value = function(leaf)
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(leaf)
        value.backward()
        return value.detach(), torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def reference(self, student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> Tensor:
        """Return the definition's value of every row, float64 (N,), without T^2.

        Raises:
            NotApplicable: if no definition is promised or found.
        """
        definition = self.promises.definition
        if definition is None:
            raise NotApplicable("no definition is declared, and none of the known ones fits")
        function = DEFINITIONS[definition] if isinstance(definition, str) else definition
        target = torch.zeros(len(student), dtype=torch.long) if target is None else target
        labels = {"target": target} if takes(function, "target") else {}
        return function(student.double(), teacher.double(), temperature, **labels)

    def having(self, **promises: Any) -> Probe:
        """Return the probe with promises that were inferred."""
        return Probe(self.loss, self.kind, replace(self.promises, **promises))

    def _scalar(self, value: Any, valid: int) -> Tensor:
        value = _tensor_of(value)
        return value if value.ndim == 0 else value.sum() / max(valid, 1)


def top_k_of(teacher: Tensor, k: int, values: str = "log_probs") -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (or probabilities, logits) and the indices of every row's k most likely classes."""
    logits, indices = teacher.topk(k, -1)
    log_probs = torch.log_softmax(teacher, -1).gather(-1, indices)
    return {"log_probs": log_probs, "probs": log_probs.exp(), "logits": logits}[values], indices


def _tensor_of(returned: Any) -> Tensor:
    """The loss of what was returned: a tensor, the first of a tuple or list, or what is named loss.

    Raises:
        TypeError: for anything else.
    """
    value = returned
    if isinstance(value, Mapping):
        value = value["loss"] if "loss" in value else next(iter(value.values())) if len(value) == 1 else value
    elif not isinstance(value, Tensor) and hasattr(value, "loss"):
        value = value.loss
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, Tensor):
        return value
    raise TypeError(
        f"the loss must return a tensor, a tuple whose first element it is, or a dict or object that names it loss; "
        f"got {type(returned).__name__}. Convert it: lambda *a, **k: loss(*a, **k)['kd']."
    )


def _shape(value: Any) -> str:
    """A tensor as its dtype and shape, other values as they are."""
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    )
