"""Call losses of every kind in one way: on rows of logits, with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tempering.conformance.promises import DEFINITIONS, Kind, Promises, takes
from tempering.rows import IGNORE_INDEX

LABELS = ("labels", "target", "targets", "label", "y")
MASKS = ("mask", "valid", "attention_mask", "response_mask")
TEMPERATURES = ("temperature", "T", "tau", "temp")
NORMALIZERS = ("normalizer", "num_items_in_batch")


class Violation(AssertionError):
    """A broken invariant, with the value that was expected and the one that was found."""

    def __init__(self, message: str, *, expected: Any = None, found: Any = None, **tensors: Tensor | None) -> None:
        super().__init__(message)
        self.expected, self.found = expected, found
        self.tensors = {name: x.detach() for name, x in tensors.items() if x is not None}


class NotApplicable(Exception):
    """The loss has no such input, or refuses it; the message says which."""


class Probe:
    """A loss, called on rows.

    Args:
        loss: the loss, or an adapter of one; see ``check``.
        kind: its kind.
        promises: what it promises.
    """

    def __init__(self, loss: Callable[..., Any], kind: Kind, promises: Promises) -> None:
        self.loss, self.kind, self.promises = loss, kind, promises
        named = getattr(loss, "signature_of", loss)
        named = named.forward if isinstance(named, torch.nn.Module) else named
        self.labels, self.mask = takes(named, *LABELS), takes(named, *MASKS)
        self.temperature, self.normalizer = takes(named, *TEMPERATURES), takes(named, *NORMALIZERS)
        self.chunk_size = takes(named, "chunk_size", "chunk", "chunks")
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
        **kw: Any,
    ) -> Tensor:
        """Return the loss of N rows, (); for features and scores of the two tensors.

        Args:
            student: (N, C).
            teacher: (N, C).
            target: (N,) labels, -100 for rows to leave out; None: class 0.
            temperature: T, for a loss that takes one.
        """
        if not self.on_rows:
            return self._scalar(self.loss(student, teacher, **kw), 1)
        target = torch.zeros(len(student), dtype=torch.long) if target is None else target
        if self.kind == "tokens":
            shift = self.promises.shift
            student, teacher = (torch.cat((x, x.new_zeros(shift, x.shape[1])))[None] for x in (student, teacher))
            target = torch.cat((target.new_full((shift,), IGNORE_INDEX), target))[None]
        return self.call(student, teacher, target, temperature, **kw)

    def call(
        self, student: Tensor, teacher: Tensor, target: Tensor, temperature: float | None = None, **kw: Any
    ) -> Tensor:
        """Return the loss of logits in the loss's own shape, (B, T, V) or (N, C), with labels of the same shape."""
        if self.labels:
            kw[self.labels] = target
        if self.mask:
            kw[self.mask] = target != IGNORE_INDEX
        if self.temperature:
            kw[self.temperature] = 1.0 if temperature is None else temperature
        valid = int((target != IGNORE_INDEX).sum()) if self.ignores else target.numel()
        if self.kind == "top_k":
            values, indices = top_k_of(teacher, teacher.shape[-1], self.promises.top_k_values)
            return self._scalar(self.loss(student, values, indices, **kw), valid)
        return self._scalar(self.loss(student, teacher, **kw), valid)

    def gradient(self, student: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient in the student, both detached."""
        return self.differentiate(lambda x: self(x, *args, **kw), student)

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
        kw = {"target": target} if takes(function, "target") else {}
        return function(student.double(), teacher.double(), temperature, **kw)

    def with_promises(self, **changes: Any) -> Probe:
        return Probe(self.loss, self.kind, replace(self.promises, **changes))

    def _scalar(self, value: Any, valid: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss must return a tensor; got {type(value).__name__}. Wrap it: lambda *a, **k: loss(*a, **k)[0]."
            )
        return value if value.ndim == 0 else value.sum() / max(valid, 1)


def top_k_of(teacher: Tensor, k: int, values: str = "log_probs") -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (or probabilities, logits) and the indices of every row's k most likely classes."""
    logits, indices = teacher.topk(k, -1)
    log_probs = torch.log_softmax(teacher, -1).gather(-1, indices)
    return {"log_probs": log_probs, "probs": log_probs.exp(), "logits": logits}[values], indices


def tolerance(value: Tensor, scale: float = 1.0) -> float:
    """Rounding of a value of this dtype whose largest terms are of this scale; float32 at best, since losses upcast."""
    eps = max(torch.finfo(torch.float32).eps, torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0)
    return 64.0 * eps * max(1.0, scale)
