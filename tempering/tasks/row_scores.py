"""Scores of single rows, summed over batches of any size: the engine and the adapters share them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tempering.rows import Rows, class_labels, is_scored, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, Task, TeacherForward, evaluating
from tempering.utils.tensors import on_host, to_device


@dataclass
class RowScores:
    """Sums over labeled rows: cross entropy in nats, hits of the label, and hits of the teacher's most likely class.

    The means do not depend on how the rows were cut into batches. Rows without a label or of weight 0 are left out.
    """

    loss: Tensor | float = 0.0
    accuracy: Tensor | float = 0.0
    agreement: Tensor | float = 0.0
    count: int = 0

    def add(self, rows: Rows, teacher_top: Tensor | None) -> None:
        """Add rows; ``teacher_top``, (N,), is the teacher's most likely class of each, None without a teacher.

        Raises:
            ValueError: for rows without targets.
        """
        if rows.target is None:
            raise ValueError("scoring needs labels: the batches have none.")
        target, weight = on_host((rows.target, rows.weight))
        kept = is_scored(target, weight)
        z, y = upcast_to_float32(rows.student), class_labels(rows.target)
        if not bool(kept.all()):
            index = to_device(kept.nonzero().squeeze(1), z.device)
            z, y = z.index_select(0, index), y.index_select(0, index)
            teacher_top = None if teacher_top is None else teacher_top.index_select(0, index)
        top, y = z.argmax(-1), y.long()
        # sums stay on the device: the host would wait for each
        self.loss = self.loss + nn.functional.cross_entropy(z.double(), y, reduction="sum")
        self.accuracy = self.accuracy + (top == y).sum()
        if teacher_top is not None:
            self.agreement = self.agreement + (top == teacher_top).sum()
        self.count += len(y)

    def means(self, *, has_teacher: bool, unit: str = "row") -> dict[str, float]:
        """Return accuracy and agreement in [0, 1], and the loss in nats; of tokens, its perplexity too.

        Raises:
            ValueError: if no row has a label; ``unit`` is the word for a row.
        """
        if not self.count:
            raise NothingToScoreError(f"there is nothing to score: no {unit} has a label. Is the split empty?")
        names = ("loss", "accuracy", "agreement") if has_teacher else ("loss", "accuracy")
        out = {name: float(getattr(self, name)) / self.count for name in names}
        return out | {"perplexity": math.exp(min(out["loss"], 700.0))} if unit == "token" else out


def score_rows(
    task: Task, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward | None
) -> dict[str, float]:
    """Score the student, in eval mode, on the rows of these batches (mappings); restore its mode.

    Raises:
        ValueError: if no row has a label.
    """
    scores = RowScores()
    with evaluating(student, batches) as on_device:
        for batch in map(dict, on_device):
            student_in, teacher_in, ids = task.inputs(batch)
            student_out = student(student_in)
            teacher_out = None if teacher is None else teacher(teacher_in, ids)
            scores.add(*task.scored_rows(student_out, teacher_out, batch))
    return scores.means(has_teacher=teacher is not None, unit=task.unit)
