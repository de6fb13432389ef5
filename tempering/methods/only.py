"""A method on some of a task's blocks of rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from tempering.methods.base import Method, StepMethod, zero
from tempering.methods.kd import KD
from tempering.rows import Rows


class Only(Method):
    """The terms of a method on blocks of these names, and 0 on others: ``Only(DTKD(hard=0.0), blocks=["classes"])``.

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
            raise TypeError(f"Only needs a method over rows, such as KD(hard=0.0); got {inner!r}.")
        if isinstance(blocks, str) or not blocks:
            raise ValueError(f"Only needs blocks, names of blocks of rows such as ('classes',); got {blocks!r}.")
        self.inner, self.blocks = inner, tuple(blocks)
        for told in ("needs_labels", "needs_teacher", "zero_at_agreement", "non_negative", "shift_invariant"):
            setattr(self, told, getattr(inner, told))

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return self.inner(rows, progress) if rows.name in self.blocks else {"elsewhere": zero(rows)}

    def prepare(self, rows: Rows) -> None:
        if rows.name in self.blocks:
            self.inner.prepare(rows)

    def wants_rows(self) -> bool:
        return self.inner.wants_rows()

    @classmethod
    def example(cls) -> Self:
        return cls(KD(), blocks=("logits",))

    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups()
