"""Self-teacher: the student itself, as it is in every step, or without the adapters that are trained."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rows import upcast_to_float32
from tempering.teachers.base import Teacher, key_digest
from tempering.utils.state import unwrapped
from tempering.utils.tensors import eval_mode, map_tensors


class SelfTeacher(Teacher):
    """The student itself as its teacher, in eval mode and without gradient: one copy of the weights in memory.

    With its own inputs alone it would have nothing to teach. It has something to teach with ``adapters=False``, as the
    model under the adapters of a PEFT student, or if it sees what the student does not: ``tasks.PrivilegedContext``.
    For the student's first weights, or their moving average, give a copy or ``MeanTeacher``.

    Args:
        adapters: False turns off the student's adapters while it teaches: the model that they were added to.

    Raises:
        TypeError: when a run gives it a student without adapters, for adapters=False.
        RuntimeError: if it runs before a run has given it its student.

    Reference: Shenfeld et al., "Self-Distillation Enables Continual Learning", 2026, arXiv:2601.19897.
    """

    trained = False  # its first weights are the student's
    follows_student = True

    def __init__(self, *, adapters: bool = True) -> None:
        self.adapters, self._student = adapters, None
        self.identity = key_digest({"the student": adapters})

    def follow(self, student: nn.Module) -> None:
        """Teach as this student, at the beginning of a run."""
        student = unwrapped(student)
        self._adapted: Any = next((m for m in student.modules() if hasattr(m, "disable_adapter")), None)
        if self._adapted is None and not self.adapters:
            raise TypeError(
                f"SelfTeacher(adapters=False) needs a PEFT student, whose adapters it turns off; "
                f"{type(student).__name__} has none. Give a copy of the first weights: teacher=copy.deepcopy(student)."
            )
        self._student = student

    @torch.no_grad()
    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        student = self._student
        if student is None:
            raise RuntimeError(
                "SelfTeacher has no student yet. A run gives it the student; in your own loop call "
                "teacher.follow(student) first."
            )
        trained = [(p, p.requires_grad) for p in student.parameters()]  # peft sets it as it turns adapters on
        try:
            with eval_mode(student), nullcontext() if self.adapters else self._adapted.disable_adapter():
                return map_tensors(student(inputs), upcast_to_float32)
        finally:
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
