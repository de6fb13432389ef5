"""TRL 0.15.2: generalized JSD as it was before its mixture was corrected."""

from __future__ import annotations

from typing import Any

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("trl", "0.15.2", dated="the last release before github.com/huggingface/trl/pull/3043")
UNUSED = {
    "trl.models": ("PreTrainedModelWrapper",),
    "trl.models.utils": ("unwrap_model_for_generation",),
    "trl.trainer.gkd_config": ("GKDConfig",),
    "trl.trainer.utils": (
        "DataCollatorForChatML",
        "disable_dropout_in_model",
        "empty_cache",
        "generate_model_card",
        "get_comet_experiment_url",
    ),
}


def register(beta: float, definition: str) -> None:
    @LIBRARY.loss(
        f"GKDTrainer.generalized_jsd_loss, beta={beta:g}",
        kind="tokens",
        promises=Promises(definition=definition, temperature_squared=False, reduction="mean", ignored_rows=True),
        documented="Generalized JSD by equation (1) of 2306.13649, forward KL for beta 0 and reverse KL for 1.",
    )
    def make() -> Any:
        bare("trl", "trl.trainer")
        for module, classes in UNUSED.items():
            stand_in(module, **dict.fromkeys(classes, type("Unused", (), {})))
        stand_in("trl.trainer.sft_trainer", SFTTrainer=type("SFTTrainer", (), {}))
        from trl.trainer.gkd_trainer import GKDTrainer

        loss = GKDTrainer.generalized_jsd_loss
        return lambda student, teacher, labels, temperature=1.0: loss(
            student, teacher, labels, beta=beta, temperature=temperature
        )


for beta, definition in {0.0: "kl", 0.1: "jsd(0.1)", 0.5: "jsd", 1.0: "reverse_kl"}.items():
    register(beta, definition)
