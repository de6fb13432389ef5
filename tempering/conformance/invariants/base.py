"""Invariants, and how their tests compare values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempering.conformance.draws import Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.promises import Kind, Promises
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
    """

    name: str
    sentence: str
    test: Test
    kinds: tuple[Kind, ...]
    after: tuple[str, ...]
    promised: Callable[[Promises], bool | None] | None
    applies: Callable[[Promises], bool]
    examples: int


INVARIANTS: dict[str, Invariant] = {}


def invariant(
    name: str,
    kinds: tuple[Kind, ...] = ROWS,
    *,
    after: tuple[str, ...] = (),
    promised: Callable[[Promises], bool | None] | None = None,
    applies: Callable[[Promises], bool] = lambda promises: True,
    examples: int = 20,
) -> Callable[[Test], Test]:
    def register(test: Test) -> Test:
        sentence = (test.__doc__ or "").strip().split("\n")[0]
        INVARIANTS[name] = Invariant(name, sentence, test, kinds, after, promised, applies, examples)
        return test

    return register


def check_close(
    found: Tensor, expected: Tensor, message: str, *, tol: float, relative: float = 1e-4, **tensors: Tensor | None
) -> None:
    """Raise Violation unless |found - expected| <= tol + relative * max |expected|, everywhere."""
    found, expected = found.detach().double(), torch.as_tensor(expected).detach().double()
    limit = tol + relative * (float(expected.abs().max()) if expected.numel() else 0.0)
    if not bool(((found - expected).abs() <= limit).all()):
        raise Violation(message, expected=plain(expected), found=plain(found), **tensors)


def plain(value: Tensor) -> Any:
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
        pad = s.new_zeros(b, shift, c)
        s, t = torch.cat((s, pad), 1), torch.cat((t, pad), 1)
        return probe.call(s, t, torch.cat((y.new_full((b, shift), IGNORE_INDEX), y), 1), temperature)

    return student, teacher, target, call


def is_divergence(p: Promises) -> bool | None:
    return p.divergence is not False
