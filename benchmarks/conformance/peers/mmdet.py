"""MMDetection: its distillation loss on logits."""

from __future__ import annotations

from typing import Any

from peers import Library, Unregistered, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("mmdet", "3.3.0")


@LIBRARY.loss(
    "models.losses.KnowledgeDistillationKLDivLoss",
    kind="logits",
    promises=Promises(definition="kl", temperature_squared=True),
    said=("no gradient into the teacher",),
)
def divergence() -> Any:
    """Loss for knowledge distillation with KL divergence at a temperature; a value per row, then a mean."""
    bare("mmdet", "mmdet.models", "mmdet.models.losses")
    stand_in("mmdet.registry", MODELS=Unregistered())
    from mmdet.models.losses.kd_loss import KnowledgeDistillationKLDivLoss

    def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
        made = KnowledgeDistillationKLDivLoss()
        made.T = temperature  # the constructor asks for at least 1
        return made(student, teacher)

    return loss
