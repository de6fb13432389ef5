"""Ultralytics: the feature loss of its distillation model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("ultralytics", "8.4.190")


@LIBRARY.loss(
    "nn.distill_model.DistillationModel.loss_sl2",
    kind="features",
    promises=Promises(definition=F.mse_loss, feature_shape=(2, 2, 2)),
)
def squared() -> Any:
    """Squared difference of features, weighted by the teacher's scores of the positions."""
    bare("ultralytics", "ultralytics.nn")
    unused = {"nn.modules.head": "Detect", "utils.torch_utils": "copy_attr", "nn.tasks": "load_checkpoint"}
    for module, name in unused.items():
        stand_in(f"ultralytics.{module}", **{name: None})
    from ultralytics.nn.distill_model import DistillationModel

    def loss(student: Any, teacher: Any) -> Any:
        scores = torch.full((len(student), 1, 4), 0.5, dtype=student.dtype)
        return DistillationModel.loss_sl2(SimpleNamespace(), student, teacher, 0, (scores,))

    return loss
