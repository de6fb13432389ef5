"""What the adapters share: which methods fit into a foreign loop, and one batch as rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.features import PairedFeatures

ENGINE = "Run it by tempering.distill."


def fitting(method: Method, teacher: nn.Module | Teacher | None, student: nn.Module) -> Teacher | None:
    """The teacher, a bare module wrapped in ``Live``, for a method that a foreign loop can serve.

    Raises:
        TypeError: for what is no method, no teacher, or a method that owns its step.
        ValueError: for a teacher that is missing or shares weights with the student, or policies that learn.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, such as methods.DTKD(); got {type(method).__name__}.")
    if method.owns_step:
        raise TypeError(f"{type(method).__name__} owns its step, and so does this trainer. {ENGINE}")
    if learners := method.adaptive_policies():
        raise ValueError(
            f"{type(learners[0]).__name__} learns from a second forward after every step, which this trainer does not "
            f"make. {ENGINE}"
        )
    if teacher is None:
        if method.needs_teacher:
            raise ValueError(
                f"{type(method).__name__} needs a teacher, and teacher is None. Alone it is methods.Supervised()."
            )
        return None
    if not isinstance(teacher, (nn.Module, Teacher)):
        raise TypeError(f"teacher must be a module, a Teacher or None; got {type(teacher).__name__}.")
    model = teacher if isinstance(teacher, nn.Module) else teacher.model
    if model is not None and {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}:
        raise ValueError(
            "the teacher shares weights with the student: frozen, they would not be trained. Give copy.deepcopy(model) "
            "as teacher."
        )
    return Live(teacher) if isinstance(teacher, nn.Module) else teacher


def whole_batches(method: Method, **splits: int) -> None:
    """Refuse a method over pairs of rows where a step is split.

    Args:
        splits: the trainer's own names of what splits a step, and into how many parts.

    Raises:
        ValueError: naming the first of them that is not 1.
    """
    for flag, parts in splits.items():
        if parts > 1 and method.is_batch_dependent():
            raise ValueError(
                f"{type(method).__name__} compares rows with each other, so its loss depends on how a step is split: "
                f"{flag}={parts} would change it. Use {flag}=1 and smaller batches, or a method over single rows."
            )


def blocks_of(
    batch: Any, student: Callable[[Any], Any], teacher: Teacher | None, task: Task, features: PairedFeatures | None
) -> tuple[Any, list[Rows]]:
    """The student's output, and the blocks of rows that both outputs make."""
    student_in, teacher_in, ids = task.inputs(batch)
    said = student(student_in)
    taught = None if teacher is None else teacher(teacher_in, ids)
    blocks = task.rows(said, taught, batch)
    if features is not None:
        blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **features.features()})
    return said, blocks
