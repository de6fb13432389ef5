"""NVIDIA Model Optimizer 0.42.0: the default reduction before it was changed."""

from __future__ import annotations

from typing import Any

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library(
    "nvidia-modelopt", "0.42.0", dated="the last release before github.com/NVIDIA/Model-Optimizer/pull/1009"
)


@LIBRARY.loss(
    "torch.distill.LogitsDistillationLoss (its default, reduction=batchmean)",
    kind="logits",
    promises=Promises(definition="kl", temperature_squared=True, reduction="mean"),
    said=("no gradient into the teacher",),
    unsaid=("(B, T, V) as (N, V)",),
)
def default() -> Any:
    """Implements the loss of 1503.02531, KL divergence on output logits, times T^2."""
    made = file_of("modelopt", "torch/distill/losses.py").LogitsDistillationLoss
    return lambda student, teacher, temperature=1.0: made(temperature)(student, teacher)
