"""Mean teacher: the exponential moving average of the student's own weights."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.live import Live
from tempering.utils.state import unwrapped
from tempering.utils.tensors import copy_model


class MeanTeacher(Teacher):
    """A teacher that is the moving average of the student (EMA), updated after every step of the optimizer.

    It starts with the student's weights. After step n = 1, 2, ... every weight and every floating point buffer w of
    the student changes the average to d * average + (1 - d) * w, with d = min(decay, 1 - 1 / (n + 1)), so that the
    average is the plain mean of all weights at first; other buffers are copied. It runs in eval mode; ``model`` is the
    averaged network. Checkpoints contain it. With several processes it is equal on all, as the student is.

    At first it equals the student, so that a loss without labels has no gradient: give the method a hard term, or the
    two models different views (``tasks.TwoView``), as published.

    Args:
        decay: in [0, 1), the share that a step keeps of the average.
        ramp: False uses ``decay`` from the first step.

    Raises:
        ValueError: for another decay, or trained weights of 16 bits, in which small changes of the average vanish.
        RuntimeError: if it runs before a run has given it its student.

    Reference: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
    """

    trained = False  # its first weights are the student's
    follows_student = True

    def __init__(self, decay: float = 0.999, *, ramp: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"MeanTeacher needs decay in [0, 1); got {decay!r}.")
        self.decay, self.ramp = decay, ramp
        self.identity = key_digest({"mean teacher": decay, "ramp": ramp})
        self._live: Live | None = None

    @property
    def model(self) -> nn.Module | None:
        return None if self._live is None else self._live.model

    def follow(self, student: nn.Module) -> None:
        """Start with the student's weights, at the beginning of a run."""
        student = unwrapped(student)
        if low := next((p.dtype for p in student.parameters() if p.requires_grad and p.element_size() < 4), None):
            raise ValueError(
                f"an average of weights in {low} would be lost to rounding. Train float32 weights: "
                "precision='bf16-mixed' (--precision bf16-mixed), student.float()."
            )
        self._student = student
        self._live = Live(copy_model(student), normalization="data")
        self.state = _Average(self._live.model)

    @torch.no_grad()
    def update(self) -> None:
        if not isinstance(self.state, _Average):
            raise self._no_student()
        self.state.steps += 1
        decay = min(self.decay, 1.0 - 1.0 / (int(self.state.steps) + 1)) if self.ramp else self.decay
        average, own = list(map(_values, (self.state.model, self._student)))
        floats = [(a, w) for a, w in zip(average, own, strict=True) if a.is_floating_point()]
        if floats:
            torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1.0 - decay)  # pyright: ignore
        for a, w in zip(average, own, strict=True):
            if not a.is_floating_point():
                a.copy_(w)

    def to(self, device: torch.device | str) -> Self:
        if self._live is not None:
            self._live.to(device)
        return self

    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        if self._live is None:
            raise self._no_student()
        return self._live(inputs, ids)

    def _no_student(self) -> RuntimeError:
        return RuntimeError(
            "MeanTeacher has no student yet. A run gives it the student; in your own loop call teacher.follow(student) "
            "first, and teacher.update() after each step."
        )


class _Average(nn.Module):
    """What checkpoints contain of a mean teacher."""

    steps: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def _values(model: nn.Module) -> list[Tensor]:
    return cast("list[Tensor]", [*model.parameters(), *model.buffers()])
