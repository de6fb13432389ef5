"""NVIDIA Model Optimizer: losses of its distillation modules."""

from __future__ import annotations

from typing import Any

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("nvidia-modelopt", "0.47.0", absent=("omegaconf", "nvidia_resiliency_ext", "deepspeed"))


def losses() -> Any:
    return file_of("modelopt", "torch/distill/losses.py")


def register(reduction: str, promised: Any) -> None:
    @LIBRARY.loss(
        f"torch.distill.LogitsDistillationLoss, reduction={reduction}",
        kind="logits",
        promises=Promises(definition="kl", temperature_squared=True, reduction=promised),
        documented="Implements the loss of 1503.02531, KL divergence on output logits, times T^2; `reduction`, 'mean' "
        "unless given, says how the final pointwise loss is reduced.",
        said=("no gradient into the teacher",),
        unsaid=("(B, T, V) as (N, V)",),
    )
    def make() -> Any:
        made = losses().LogitsDistillationLoss
        return lambda student, teacher, temperature=1.0: made(temperature, reduction)(student, teacher)


register("mean", "mean")
register("batchmean", "mean")
register("none", "none")


@LIBRARY.loss(
    "torch.distill.MFTLoss",
    kind="logits",
    promises=Promises(temperature_squared=True, divergence=False, reduction=None),
    unsaid=("order of the classes",),
)
def minifinetuning() -> Any:
    """KL divergence to the teacher's distribution, corrected so that the label leads by a threshold; which class
    leads changes where probabilities are equal."""
    made = losses().MFTLoss
    return lambda student, teacher, labels, temperature=1.0: made(temperature)(student, teacher, labels.clamp(min=0))
