"""Checks of a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tempering.methods.base import StepMethod
    from tempering.teachers.base import Teacher
    from tempering.training.config import TrainConfig


def apart(student: nn.Module, teacher: Teacher | None) -> None:
    """Refuse a student with nothing to train, or one that is a part of its teacher or has it as a part.

    Raises:
        ValueError: saying which.
    """
    model = None if teacher is None else teacher.model
    if model is not None and (model in student.modules() or student in model.modules()):
        raise ValueError(
            "the teacher is a part of the student, or the student of the teacher, so a frozen teacher would freeze "
            "what is to be trained. Give copies: copy.deepcopy(model)."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("the student has no parameter that requires grad: there is nothing to train.")


def fits(method: StepMethod, teacher: Teacher | None, settings: TrainConfig) -> None:
    """Refuse a setting or a teacher with which a method that owns its step cannot work.

    Raises:
        ValueError: saying which, and what to do.
    """
    owner = type(method).__name__
    if method.needs_live and (teacher is None or teacher.model is None):
        raise ValueError(
            f"{owner} goes back through the teacher, and {'None' if teacher is None else type(teacher).__name__} has "
            "no gradient. Give the model itself: teachers.Live(model)."
        )
    if method.needs_double_backward:
        cannot = {
            f"compile={settings.compile!r}": bool(settings.compile),
            "strategy='fsdp'": settings.strategy == "fsdp",
            "precision='16-mixed'": settings.precision == "16-mixed",
        }
        if found := [name for name, here in cannot.items() if here]:
            raise ValueError(
                f"{owner} takes derivatives within its step, which does not go with {', '.join(found)}. Leave it out; "
                "strategy='ddp' and precision='bf16-mixed' work."
            )
