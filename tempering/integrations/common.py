"""Shared by the integrations: check that a method works in an external trainer, and turn a batch into rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.checks import check_models_are_distinct, validate_sampled_teacher
from tempering.training.features import PairedFeatures, extracting

ENGINE = "Run it with tempering.distill."


def fitting(method: Method, teacher: nn.Module | Teacher | None, student: nn.Module) -> Teacher | None:
    """Return the teacher, a bare module wrapped in ``Live``, if an external trainer supports the method.

    A bare module is as it was until its first forward; ``release()`` at the end of training gives it back.

    Raises:
        TypeError: if ``teacher`` is not a teacher, or the method owns its step.
        ValueError: if the teacher is missing or shares weights with the student, or a policy is adaptive.
    """
    if method.owns_step:
        raise TypeError(f"{type(method).__name__} owns its step, and so does this trainer. {ENGINE}")
    if adaptive := method.adaptive_policies():
        raise ValueError(
            f"{type(adaptive[0]).__name__} learns from a second forward after every step, which this trainer does not "
            f"run. {ENGINE}"
        )
    if teacher is None:
        if method.needs_teacher:
            raise ValueError(
                f"{type(method).__name__} needs a teacher, and teacher is None. Alone it is methods.Supervised()."
            )
        return None
    if not isinstance(teacher, (nn.Module, Teacher)):
        raise TypeError(f"teacher must be a module, a Teacher or None; got {type(teacher).__name__}.")
    check_models_are_distinct(student, teacher)
    if isinstance(teacher, nn.Module):
        return Live(teacher).release()
    validate_sampled_teacher(method, teacher)
    return teacher


def whole_batches(method: Method, **splits: int) -> None:
    """Reject a method that compares rows with each other if a step is split.

    Args:
        splits: the trainer's options that split a step -> number of parts.

    Raises:
        ValueError: if one of them is not 1; names the first.
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
    """Return the student's output, and the blocks of rows of both outputs."""
    student_in, teacher_in, ids = task.inputs(batch)
    with extracting(features):
        student_output = student(student_in)
        teacher_output = None if teacher is None else teacher(teacher_in, ids)
        blocks = task.rows(student_output, teacher_output, batch)
        if features is not None:
            blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **features.features()})
    return student_output, blocks
