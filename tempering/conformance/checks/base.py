"""Invariants, and how their tests compare values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.conformance.draws import Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.promises import Kind, Promises
from tempering.conformance.tolerances import RELATIVE, rounding
from tempering.rows import IGNORE_INDEX

ROWS: tuple[Kind, ...] = ("logits", "tokens", "top_k")


ALL: tuple[Kind, ...] = (*ROWS, "features", "scores")


Test = Callable[[Probe, Draw], None]


@dataclass(frozen=True)
class Invariant:
    """One invariant.

    Attributes:
        name: its name.
        sentence: what it says.
        test: raises ``Violation`` for inputs that break it.
        kinds: the kinds of losses that it is for.
        after: invariants whose failure explains a failure of this one, which is then not reported.
        promised: whether these promises include it; False: a failure is "not promised". None: always promised.
        applies: whether it is a question for a loss of these promises.
        examples: how many inputs to try.
        of_draws: whether it is a question for an estimate from classes that are drawn (``Promises.sampled``).
        recognizes: whether it recognizes known mistakes, which fail whatever is promised.
    """

    name: str
    sentence: str
    test: Test
    kinds: tuple[Kind, ...]
    after: tuple[str, ...]
    promised: Callable[[Promises], bool | None] | None
    applies: Callable[[Promises], bool]
    examples: int
    of_draws: bool
    recognizes: bool


INVARIANTS: dict[str, Invariant] = {}
FIRST = ("runs", "deterministic")


def invariant(
    name: str,
    kinds: tuple[Kind, ...] = ROWS,
    *,
    after: tuple[str, ...] = (),
    promised: Callable[[Promises], bool | None] | None = None,
    applies: Callable[[Promises], bool] = lambda promises: True,
    examples: int = 12,
    of_draws: bool = False,
    recognizes: bool = False,
) -> Callable[[Test], Test]:
    def register(test: Test) -> Test:
        sentence = (test.__doc__ or "").strip().split("\n")[0]
        before = after if name in FIRST else (*after, *FIRST)  # two calls that differ explain any other difference
        INVARIANTS[name] = Invariant(
            name, sentence, test, kinds, before, promised, applies, examples, of_draws, recognizes
        )
        return test

    return register


def check_close(
    found: Tensor,
    expected: Tensor,
    message: str,
    *,
    tol: float | None = None,
    relative: float = RELATIVE,
    tensors: Mapping[str, Tensor] = MappingProxyType({}),
    **named: Tensor,
) -> None:
    """Raise Violation, with the first values that differ, unless |found - expected| <= tol + relative * max |expected|.

    ``tol`` None: the rounding of terms of 4, as the logits of most draws are. Equal infinities are equal; NaN is equal
    to nothing.
    """
    tol = rounding(torch.float32, 4.0) if tol is None else tol
    found, expected = torch.broadcast_tensors(found.detach().double(), expected.detach().double())
    finite = expected[expected.isfinite()]
    limit = tol + relative * (float(finite.abs().max()) if finite.numel() else 0.0)
    different = ~(((found - expected).abs() <= limit) | (found == expected))
    if bool(different.any()):
        if found.ndim:
            message += f", first at {different.nonzero()[0].tolist()}"
            found, expected = found[different], expected[different]
        inputs = {**tensors, **named}
        raise Violation(message, expected=plain(expected), found=plain(found), promised=None, **inputs)


def plain(value: Tensor) -> Any:
    """One number, or the first twelve."""
    return float(value) if value.numel() == 1 else [round(x, 8) for x in value.flatten().tolist()[:12]]


def scale_of(*sides: Tensor, temperature: float = 1.0) -> float:
    """The largest term of a loss: logits over T, with T^2 where that may be included."""
    largest = max((float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for x in sides), default=0.0)
    return (largest / temperature + 3.0) * max(1.0, temperature**2)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def check_finite_or_refused(probe: Probe, student: Tensor, teacher: Tensor) -> None:
    try:
        value, gradient = probe.gradient(student, teacher)
    except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as error:
        raise NotApplicable(f"refused: {first_line(error)}") from None
    if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
        raise Violation("the loss or its gradient is not finite", found=plain(value), student=student, teacher=teacher)


def sequences(probe: Probe, draw: Draw, *, ignored: bool) -> tuple[Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    """Rows in the loss's own shape: (B, T, V) for tokens, with labels aligned to the rows, and how to call the loss."""
    c = draw.integer(2, 6)
    if probe.kind != "tokens":
        n = draw.integer(2, 5)
        student, teacher = draw.pair(n=n, c=c)
        return student, teacher, draw.labels(n, c, ignored=ignored), probe
    b, length, shift = 2, draw.integer(2, 4), probe.promises.shift
    student, teacher = (x.view(b, length, c) for x in draw.pair(n=b * length, c=c))
    target = draw.labels(b * length, c, ignored=ignored).view(b, length)

    def call(s: Tensor, t: Tensor, y: Tensor, temperature: float | None = None) -> Tensor:
        return probe.call(*shifted(s, t, y, shift), temperature)

    return student, teacher, target, call


def shifted(student: Tensor, teacher: Tensor, target: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, V) rows and their labels (B, T), for a loss in which position i predicts the label of i + shift."""
    student, teacher = (F.pad(x, (0, 0, 0, shift)) for x in (student, teacher))
    return student, teacher, F.pad(target, (shift, 0), value=IGNORE_INDEX)


def is_divergence(p: Promises) -> bool | None:
    return p.divergence is not False
