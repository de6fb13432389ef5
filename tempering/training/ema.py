"""Average the student's weights over the steps of a run (EMA), by torch's AveragedModel."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tempering.training.evaluator import Evaluator
from tempering.utils.tensors import copy_model


class WeightAverage:
    """The exponential moving average of a student's parameters and buffers, updated after every step.

    Args:
        student: the plain model, on its device.
        decay: share of the average that a step keeps, in (0, 1).

    Attributes:
        model: the average, of the student's class, in eval mode.
        state: the AveragedModel, for checkpoints.

    Raises:
        ValueError: for trained weights of 16 bits, in which small changes of the average vanish.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if low := next((p.dtype for p in student.parameters() if p.requires_grad and p.element_size() < 4), None):
            raise ValueError(
                f"ema={decay:g} (--ema) of weights in {low} would be lost to rounding. Train float32 weights: "
                "precision='bf16-mixed' (--precision bf16-mixed), student.float()."
            )
        self.student = student
        self.state = AveragedModel(
            copy_model(student), multi_avg_fn=cast("Any", get_ema_multi_avg_fn(decay)), use_buffers=True
        )
        self.state.requires_grad_(False).eval()
        self.model: nn.Module = self.state.module

    @torch.no_grad()
    def update(self) -> None:
        """Add the student's present weights to the average."""
        self.state.update_parameters(self.student)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Context in which the student has the averaged weights; it gets its own ones back, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # in place: compiled models and CUDA graphs keep the tensors
        for module_of in (nn.Module.parameters, nn.Module.buffers):
            for own, average in zip(module_of(self.student), module_of(self.model), strict=True):
                kept = own.clone()
                own.copy_(average)
                average.copy_(kept)

    def scores(self, evaluator: Evaluator, model: nn.Module) -> dict[str, dict[str, float]]:
        """Score the average on every split, run as the wrapper ``model``: "<split>_ema" -> metric -> value."""
        with self.applied():
            return {f"{name}_ema": values for name, values in evaluator.score(model).items()}
