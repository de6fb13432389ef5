"""LightlyTrain: losses of its distillation methods."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("lightly-train", "0.18.0")


@LIBRARY.loss(
    "_methods.distillation.DistillationLoss", kind="logits", promises=Promises(definition="kl", reduction="mean")
)
def queue() -> Any:
    """KL divergence between softmaxes over similarities to a queue, at a temperature."""
    made = file_of("lightly_train", "_methods/distillation/distillation_loss.py").DistillationLoss

    def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
        eye = torch.eye(student.shape[-1], dtype=student.dtype)
        return made(temperature)(teacher, student, eye)

    return loss


@LIBRARY.loss("_methods.distillationv2.DistillationV2Loss", kind="features", promises=Promises(definition=F.mse_loss))
def squared() -> Any:
    """Mean squared error of the features."""
    loss = file_of("lightly_train", "_methods/distillationv2/distillationv2_loss.py").DistillationV2Loss()
    return lambda student, teacher: loss(teacher, student)


def third(index: int, name: str, shape: tuple[int, ...]) -> None:
    @LIBRARY.loss(
        f"_methods.distillationv3.DistillationV3Loss, the {name} loss",
        kind="logits" if index == 0 else "features",
        promises=Promises(definition="kl", reduction="mean")
        if index == 0
        else Promises(feature_shape=shape, identifies_teacher=False),
        documented="KL divergence of similarities to a queue (global), and between tokens of an image (local).",
    )
    def make() -> Any:
        made = file_of("lightly_train", "_methods/distillationv3/distillationv3_loss.py").DistillationV3Loss

        def loss(student: Any, teacher: Any) -> Any:
            if index == 0:
                eye = torch.eye(student.shape[-1], dtype=student.dtype)
                tokens = torch.ones(len(student), 1, 1, dtype=student.dtype)
                return made(1.0, 1.0)(teacher, tokens, student, tokens, eye)[0]
            eye = torch.eye(2, dtype=student.dtype)
            whole = torch.ones(len(student), 2, dtype=student.dtype)
            return made(1.0, 1.0)(whole, teacher, whole, student, eye)[1]

        return loss


third(0, "global", ())
third(1, "local", (3, 2))
