"""timm: the losses of its distillation tasks, with a teacher and a student that return given logits or features."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("timm", "1.0.31", absent=("timm.models", "timm.utils", "timm.task.classification", "timm.task.task"))


class Teacher:
    """Returns given logits or features."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def normalize_input(self, x: Any, *args: Any) -> Any:
        return x

    def __call__(self, *args: Any, **kw: Any) -> Any:
        return self.output


def task(name: str, student: Any, teacher: Any, **fields: Any) -> Any:
    """The loss of one task, whose forward method is called without the training loop's state."""
    sys.modules["timm.task.task"].TrainingTask = nn.Module  # pyright: ignore[reportAttributeAccessIssue]
    made = getattr(file_of("timm", "task/distillation.py", package="timm.task"), name)
    rows = len(student[0] if isinstance(student, tuple) else student)
    weights = {"task_loss_weight": 0.0, "distill_loss_weight": 1.0, "student_mean": None, "student_std": None}
    held = SimpleNamespace(criterion=lambda x, y: x.sum() * 0, teacher=Teacher(teacher), **weights, **fields)
    held.trainable_module = lambda x: student
    return made.forward(held, torch.zeros(rows, 1), torch.zeros(rows))["kd_loss"]


@LIBRARY.loss(
    "task.LogitDistillationTask, kd_loss",
    kind="logits",
    promises=Promises(definition="kl", temperature_squared=True, reduction="mean"),
)
def logits() -> Any:
    """Logit distillation by KL divergence with temperature scaling; the teacher runs without gradients."""

    def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
        return task("LogitDistillationTask", student, teacher, temperature=temperature)

    return loss


@LIBRARY.loss(
    "task.FeatureDistillationTask, kd_loss", kind="features", promises=Promises(definition=nn.functional.mse_loss)
)
def features() -> Any:
    """Mean squared error of the pooled features before the classifier."""
    return lambda student, teacher: task("FeatureDistillationTask", (student, student), teacher)
