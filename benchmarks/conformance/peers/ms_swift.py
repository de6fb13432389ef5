"""ms-swift: losses of generalized knowledge distillation."""

from __future__ import annotations

from typing import Any

from peers import Library, file_of, of_generalized_jsd
from tempering.conformance import Promises

LIBRARY = Library("ms-swift", "4.6.0")


def losses() -> Any:
    return file_of("swift", "rlhf_trainers/gkd_loss.py")


def register(beta: float, definition: str) -> None:
    @LIBRARY.loss(
        f"rlhf_trainers.gkd_loss.gkd_loss, beta={beta:g}",
        kind="tokens",
        promises=of_generalized_jsd(definition),
        documented="Generalized JSD of active positions, to be divided by their number; vocabularies of unequal size "
        "are aligned.",
    )
    def make() -> Any:
        module = losses()

        def loss(student: Any, teacher: Any, labels: Any, temperature: float = 1.0, chunk_size: int = 512) -> Any:
            output = module.TeacherOutput(full_logits=teacher, labels=labels)
            total, count = module.gkd_loss(student, output, labels, beta, temperature, chunk_size=chunk_size)
            return total / count if count else total * 0

        return loss


for beta, definition in {0.0: "kl", 0.5: "jsd", 1.0: "reverse_kl"}.items():
    register(beta, definition)


@LIBRARY.loss(
    "rlhf_trainers.gkd_loss.gkd_loss, beta=0, top-k of a teacher API",
    kind="top_k",
    promises=Promises(definition="kl", tail="renormalized", identifies_teacher=False),
)
def top_k() -> Any:
    """Divergence on the teacher's top-k log-probabilities; both sides are renormalized over the list."""
    module = losses()

    def loss(student: Any, values: Any, indices: Any, labels: Any) -> Any:
        output = module.TeacherOutput(topk_logprobs=values[None], topk_indices=indices[None], labels=labels[None])
        total, count = module.gkd_loss(student[None], output, labels[None], 0.0, 1.0)
        return total / count if count else total * 0

    return loss
