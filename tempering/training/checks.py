"""Check models, method and config before a run starts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tempering.rows import Rows, total

if TYPE_CHECKING:
    from tempering.methods.base import Method
    from tempering.teachers.base import Teacher
    from tempering.training.config import TrainConfig


def check_models_are_distinct(student: nn.Module, teacher: Teacher | None) -> None:
    """Check that the student has something to train and that neither model contains the other.

    Raises:
        ValueError: if one of them contains the other, or no parameter of the student requires grad.
    """
    model = None if teacher is None else teacher.model
    if model is not None and (model in student.modules() or student in model.modules()):
        raise ValueError(
            "the teacher is a part of the student, or the student of the teacher, so freezing the teacher would freeze "
            "parameters to train. Give copies: copy.deepcopy(model)."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("the student has no parameter that requires grad: there is nothing to train.")


def validate_step_method(method: Method, teacher: Teacher | None, config: TrainConfig) -> None:
    """Check that teacher and config allow the gradients that the method takes within its step.

    Raises:
        ValueError: for a teacher without gradient, or an option that rules out a second derivative.
    """
    owner = type(method).__name__
    if method.needs_live and (teacher is None or teacher.model is None):
        raise ValueError(
            f"{owner} differentiates through the teacher, and {'None' if teacher is None else type(teacher).__name__} "
            "has no gradient. Give the model itself: teachers.Live(model)."
        )
    if method.needs_double_backward:
        options = {
            f"compile={config.compile!r}": bool(config.compile),
            "strategy='fsdp'": config.strategy == "fsdp",
            "precision='16-mixed'": config.precision == "16-mixed",
        }
        if unsupported := [name for name, is_set in options.items() if is_set]:
            raise ValueError(
                f"{owner} takes derivatives within its step, which {', '.join(unsupported)} does not support. Leave it "
                "out; strategy='ddp' and precision='bf16-mixed' work."
            )


def validate_sampled_teacher(method: Method, teacher: Teacher | None) -> None:
    """Check that a method's gradient is linear in the teacher's probabilities, if those are sampled.

    Only then does the gradient to the samples equal that to the teacher in expectation: forward KL at temperature 1. A
    method that cannot be computed without features or a task is not checked.

    Raises:
        ValueError: for another divergence or temperature.
    """
    if teacher is None or teacher.samples is None or method.owns_step:
        return
    student, *logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (x.softmax(-1) for x in logits)

    def gradient(probabilities: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        rows = Rows(leaf, probabilities.log(), torch.arange(4))
        return torch.autograd.grad(total(copy.deepcopy(method)(rows, 1.0), rows), leaf)[0]

    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # pyright: ignore[reportUnknownMemberType]
            expected, got = (gradient(p) + gradient(q)) / 2, gradient((p + q) / 2)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return
    if not torch.allclose(expected, got, rtol=1e-5, atol=1e-8):
        raise ValueError(
            f"{type(method).__name__} does not suit a teacher of {teacher.samples} sampled tokens: they are unbiased "
            "for forward KL at temperature 1 only: Divergence(objective='kl', temperature=1). For others and other "
            "temperatures keep the likeliest tokens and the tail: teachers.TopKTeacher(teacher, top=16)."
        )
