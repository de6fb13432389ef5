"""Avalanche: the distillation of Learning without Forgetting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("avalanche-lib", "0.6.0")


@LIBRARY.loss(
    "training.regularization.LearningWithoutForgetting._distillation_loss",
    kind="logits",
    promises=Promises(definition="kl", reduction="mean"),
)
def forgetting() -> Any:
    """KL divergence at a softmax temperature to the previous model, on the classes that are active."""
    bare("avalanche", "avalanche.training")
    stand_in("avalanche.models", MultiTaskModule=object, avalanche_forward=None)
    from avalanche.training.regularization import LearningWithoutForgetting

    def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
        held = SimpleNamespace(temperature=temperature)
        return LearningWithoutForgetting._distillation_loss(held, student, teacher, range(student.shape[-1]))

    return loss
