"""SuperGradients: its losses for knowledge distillation."""

from __future__ import annotations

from typing import Any

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("super-gradients", "3.7.1")
PACKAGES = "super_gradients", "super_gradients.training", "super_gradients.training.losses", "super_gradients.common"


@LIBRARY.loss("training.losses.KDklDivLoss", kind="logits", promises=Promises(definition="kl", reduction="mean"))
def divergence() -> Any:
    """KL divergence for knowledge distillation."""
    bare(*PACKAGES)
    for name, given in {
        "decorators.factory_decorator": {"resolve_param": lambda *a: lambda f: f},
        "factories.losses_factory": {"LossesFactory": lambda: None},
        "object_names": {"Losses": type("Losses", (), {"KD_LOSS": "kd"})},
        "registry.registry": {"register_loss": lambda **kw: lambda made: made},
    }.items():
        parent = name.partition(".")[0]
        stand_in(f"super_gradients.common.{parent}", __path__=[])
        stand_in(f"super_gradients.common.{name}", **given)
    from super_gradients.training.losses.kd_losses import KDklDivLoss

    made = KDklDivLoss()
    return lambda student, teacher: made(student, teacher)


def channels(mode: str) -> None:
    @LIBRARY.loss(
        f"training.losses.ChannelWiseKnowledgeDistillationLoss, normalization_mode={mode}",
        kind="features",
        promises=Promises(feature_shape=(3, 2, 2), identifies_teacher=False),
        documented="Divergence of softmaxes over positions, or over channels, at temperature 4.",
    )
    def make() -> Any:
        bare(*PACKAGES)
        from super_gradients.training.losses.cwd_loss import ChannelWiseKnowledgeDistillationLoss

        made = ChannelWiseKnowledgeDistillationLoss(normalization_mode=mode)
        return lambda student, teacher: made(student, teacher)


channels("channel_wise")
channels("spatial_wise")
