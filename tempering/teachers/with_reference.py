"""A teacher with a reference model: the initial student, from which the student is kept from moving far."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tempering.rows import TEACHER_OUTPUTS
from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.combined import CombinedTeacher, dense_logits
from tempering.teachers.outputs import Referenced


class WithReference(CombinedTeacher):
    """A teacher whose outputs have the logits of a reference model beside them, for methods with a term "reference".

    The reference model reads the teacher's inputs, which must be the student's.

    Args:
        teacher: a module (wrapped in ``Live``) or a teacher.
        reference: likewise, with all logits: a copy of the initial student, ``copy.deepcopy(student)``; of a PEFT
            student ``SelfTeacher(adapters=False)``, the model under its adapters, in no memory of its own.
    """

    def __init__(self, teacher: nn.Module | Teacher, reference: nn.Module | Teacher) -> None:
        super().__init__({"teacher": teacher, "reference": reference})
        self.identity = key_digest({"reference": {name: part.identity for name, part in self.parts.items()}})

    @property
    def model(self) -> nn.Module | None:
        return self.parts["teacher"].model

    @property
    def active(self) -> tuple[str, ...]:
        return ("teacher",)

    def _answer(self, inputs: Any, ids: Tensor | None, *, grad: bool) -> Referenced:
        output = self._query("teacher", inputs, ids, grad=grad)
        if isinstance(inputs, dict) and not self.reads_outputs:  # stored logits of a generated batch are the teacher's
            inputs = {name: x for name, x in inputs.items() if name != TEACHER_OUTPUTS}
        return Referenced(output, dense_logits(self._query("reference", inputs, ids, grad=False)))
