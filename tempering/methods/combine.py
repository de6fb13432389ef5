"""Sums of methods, and a method applied to some blocks of rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from tempering.methods.base import Method, StepMethod, zero_term
from tempering.methods.logits.dkd import DKD
from tempering.methods.logits.kd import KD
from tempering.rows import Rows


class Sum(Method):
    """The terms of several methods side by side, each named ``<method>.<term>``: ``Sum(KD(hard=0.0), DKD())``.

    A second method of one kind gets a number: ``kd``, ``kd2``. Beware of counting the hard term twice.

    Reference: none of its own; ``papers`` lists the parts'.
    """

    paper = "none: the sum of its parts"

    def __init__(self, *methods: Method) -> None:
        super().__init__()
        if not methods:
            raise ValueError("Sum needs at least one method, such as Sum(KD(hard=0.0), DKD()); got none.")
        wrong = [m for m in methods if not isinstance(m, Method) or isinstance(m, StepMethod)]
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
        self.needs_teacher = any(m.needs_teacher for m in methods)  # pyright: ignore[reportAttributeAccessIssue]
        for told in ("zero_when_equal", "non_negative", "shift_invariant"):
            setattr(self, told, all(getattr(m, told) for m in methods))

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


class OnBlocks(Method):
    """The terms of a method on blocks of these names, 0 on others: ``OnBlocks(DTKD(hard=0.0), blocks=["classes"])``.

    It is for tasks that make several, as detection does: "classes", "sides" and "images".

    Args:
        inner: a method over rows.
        blocks: names of ``Rows.name``.

    Reference: none of its own; ``inner`` has one.
    """

    paper = "none: another method, on some of the rows"

    def __init__(self, inner: Method, *, blocks: Sequence[str] = ("classes",)) -> None:
        super().__init__()
        if not isinstance(inner, Method) or isinstance(inner, StepMethod):
            raise TypeError(f"OnBlocks needs a method over rows, such as KD(hard=0.0); got {inner!r}.")
        if isinstance(blocks, str) or not blocks:
            raise ValueError(f"OnBlocks needs blocks, names of blocks of rows such as ('classes',); got {blocks!r}.")
        self.inner, self.blocks = inner, tuple(blocks)
        for told in ("needs_labels", "needs_teacher", "zero_when_equal", "non_negative", "shift_invariant"):
            setattr(self, told, getattr(inner, told))

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
