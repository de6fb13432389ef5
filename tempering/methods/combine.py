"""Combinations of methods: a sum of several, and a method restricted to some blocks of rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from tempering.methods.base import Method, is_row_method, zero_term
from tempering.methods.logits.dkd import DKD
from tempering.methods.logits.kd import KD
from tempering.rows import Rows


class Sum(Method):
    """Sum of several methods, with terms named ``<method>.<term>``: ``Sum(KD(hard=0.0), DKD())``.

    A second method of the same class is numbered: ``kd``, ``kd2``. Give only one of them a hard term: a UserWarning
    names those that count the cross entropy of the same rows again.

    Reference: none; see the references of its methods.
    """

    paper = "none: the sum of its parts"

    def __init__(self, *methods: Method) -> None:
        super().__init__()
        if not methods:
            raise ValueError("Sum needs at least one method, such as Sum(KD(hard=0.0), DKD()); got none.")
        wrong = [m for m in methods if not is_row_method(m)]
        if wrong:
            raise TypeError(f"Sum adds methods over rows; got {[type(m).__name__ for m in wrong]}.")
        self.methods = nn.ModuleDict()
        for method in methods:
            name = kind = type(method).__name__.lower()
            number = 1
            while name in self.methods:
                number += 1
                name = f"{kind}{number}"
            self.methods[name] = method
        _warn_of_repeated_hard_terms(methods)
        self.needs_teacher = any(m.needs_teacher for m in methods)  # pyright: ignore[reportAttributeAccessIssue]
        for flag in ("zero_when_equal", "non_negative", "shift_invariant"):
            setattr(self, flag, all(getattr(m, flag) for m in methods))

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {
            f"{name}.{term}": value
            for name, method in self.methods.items()
            for term, value in method(rows, progress).items()
        }

    def setup(self, rows: Rows) -> None:
        for method in self.methods.values():
            if isinstance(method, Method):
                method.setup(rows)

    def hyperparameters(self) -> dict[str, object]:
        return {name: m.hyperparameters() for name, m in self.methods.items() if isinstance(m, Method)}

    @classmethod
    def example(cls) -> Self:
        return cls(KD(hard=0.0), DKD())

    def param_groups(self) -> list[dict[str, Any]]:
        return [group for m in self.methods.values() if isinstance(m, Method) for group in m.param_groups()]


def _warn_of_repeated_hard_terms(methods: Sequence[Method]) -> None:
    """Warn if several methods count the cross entropy of the same blocks."""
    hard = [(name, weight, blocks) for m in methods for name, weight, blocks in _hard_terms(m)]
    for i, (name, weight, blocks) in enumerate(hard):
        for other, again, others in hard[:i]:
            if blocks is None or others is None or set(blocks) & set(others):
                warnings.warn(
                    f"Sum counts the cross entropy of the labels more than once: {other}(hard={again:g}) and "
                    f"{name}(hard={weight:g}). Set hard=0.0 in all methods but one.",
                    stacklevel=4,
                )
                return


def _hard_terms(method: Method) -> list[tuple[str, float, tuple[str, ...] | None]]:
    """Return (name, weight, blocks) of each hard term in a method; blocks of None are all of them."""
    if isinstance(method, Sum):
        return [term for m in method.methods.values() if isinstance(m, Method) for term in _hard_terms(m)]
    if isinstance(method, OnBlocks):
        return [(name, weight, method.blocks) for name, weight, _ in _hard_terms(method.inner)]
    weight = getattr(method, "hard", 0.0) if method.hard_is_cross_entropy else 0.0
    return [(type(method).__name__, weight, None)] if isinstance(weight, int | float) and weight > 0 else []


class OnBlocks(Method):
    """A method restricted to blocks of these names, 0 on others: ``OnBlocks(DTKD(hard=0.0), blocks=["classes"])``.

    For tasks that make several blocks, such as detection: "classes", "sides" and "images".

    Args:
        inner: a method over rows.
        blocks: values of ``Rows.name``.

    Reference: none; see the reference of ``inner``.
    """

    paper = "none: another method, on some of the rows"

    def __init__(self, inner: Method, *, blocks: Sequence[str] = ("classes",)) -> None:
        super().__init__()
        if not is_row_method(inner):
            raise TypeError(f"OnBlocks needs a method over rows, such as KD(hard=0.0); got {inner!r}.")
        if isinstance(blocks, str) or not blocks:
            raise ValueError(f"OnBlocks needs blocks, names of blocks of rows such as ('classes',); got {blocks!r}.")
        self.inner, self.blocks = inner, tuple(blocks)
        for flag in ("needs_labels", "needs_teacher", "zero_when_equal", "non_negative", "shift_invariant"):
            setattr(self, flag, getattr(inner, flag))

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return self.inner(rows, progress) if rows.name in self.blocks else {"elsewhere": zero_term(rows)}

    def setup(self, rows: Rows) -> None:
        if rows.name in self.blocks:
            self.inner.setup(rows)

    def needs_setup(self) -> bool:
        return self.inner.needs_setup()

    @classmethod
    def example(cls) -> Self:
        return cls(KD(), blocks=("logits",))

    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups()
