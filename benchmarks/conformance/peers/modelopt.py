"""NVIDIA Model Optimizer: losses of its distillation modules."""

from __future__ import annotations

from types import SimpleNamespace
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
        promises=Promises(definition="kl", temperature_squared=True, reduction=promised, sequences=True),
        documented="KL divergence of the paper of Hinton et al. on output logits, scaled by T^2; classes are the last "
        "dimension; the reduction is of the pointwise loss.",
        said=("no gradient into the teacher",),
    )
    def make() -> Any:
        made = losses().LogitsDistillationLoss
        return lambda student, teacher, temperature=1.0: made(temperature, reduction)(student, teacher)


register("mean", "elements")
register("batchmean", None)
register("none", "none")


@LIBRARY.loss(
    "torch.distill.MFTLoss",
    kind="logits",
    promises=Promises(temperature_squared=True, divergence=False, reduction=None),
    documented="KL divergence to the teacher's distribution, corrected so that the label leads by a threshold; which "
    "class leads changes where probabilities are equal.",
    unsaid=("order of the classes",),
)
def minifinetuning() -> Any:
    made = losses().MFTLoss
    return lambda student, teacher, labels, temperature=1.0: made(temperature)(student, teacher, labels.clamp(min=0))


@LIBRARY.loss(
    "torch.distill.plugins.huggingface.KDTrainer._standard_kd_loss",
    kind="tokens",
    promises=Promises(definition="kl", reduction="mean", ignored_rows=True, shift=1, low_precision=True),
    documented="The criterion per token in float32, with the causal shift, a mean over tokens not labeled -100.",
)
def trainer() -> Any:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    criterion = losses().LogitsDistillationLoss(reduction="none")

    def loss(student: Any, teacher: Any, labels: Any) -> Any:
        held = SimpleNamespace(_last_teacher_outputs=SimpleNamespace(logits=teacher), _kd_criterion=criterion)
        return KDTrainer._standard_kd_loss(held, SimpleNamespace(logits=student), labels)

    return loss
