"""Supervised training without a teacher, the baseline."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method
from tempering.objectives import cross_entropy
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative


class Supervised(Method):
    """Supervised baseline: hard * cross entropy with the labels; the teacher is not used.

    Reference: the baseline without distillation; cross entropy as in Hinton et al., 2015, arXiv:1503.02531.
    """

    paper = "arXiv:1503.02531"
    needs_labels = True
    needs_teacher = False
    of_classes = False

    def __init__(self, *, hard: NonNegative = 1.0) -> None:
        super().__init__()
        self.hard = hard

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {"hard": self.hard * cross_entropy(rows)}
