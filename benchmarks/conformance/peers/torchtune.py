"""torchtune: its knowledge distillation losses."""

from __future__ import annotations

from typing import Any

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("torchtune", "0.6.1")
SAID = "KL divergence of logits in float32, divided over the positions that are not labeled -100, which do not "
SAID += "contribute to the gradient."


def register(name: str, definition: Any, chunked: bool) -> None:
    @LIBRARY.loss(
        f"modules.loss.{name}",
        kind="tokens" if chunked else "logits",
        promises=Promises(definition=definition, reduction="mean", ignored_rows=True, low_precision=True),
        documented=SAID,
        said=("NaN in ignored rows",),
    )
    def make() -> Any:
        losses = file_of("torchtune", "modules/loss/kd_losses.py")
        loss = getattr(losses, name)(**({"num_output_chunks": 2} if chunked else {}))
        if not chunked:
            return lambda student, teacher, labels: loss(student, teacher, labels)
        return lambda student, teacher, labels: loss(list(student.chunk(2, 1)), list(teacher.chunk(2, 1)), labels)


def symmetric(student: Any, teacher: Any, temperature: float) -> Any:
    from tempering.conformance.definitions import kl, reverse_kl

    return 0.5 * kl(student, teacher, temperature) + 0.5 * reverse_kl(student, teacher, temperature)


for name, definition in {"Forward": "kl", "Reverse": "reverse_kl", "Symmetric": symmetric}.items():
    register(f"{name}KLLoss", definition, chunked=False)
    register(f"{name}KLWithChunkedOutputLoss", definition, chunked=True)
