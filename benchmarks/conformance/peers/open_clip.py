"""OpenCLIP: the loss of its distillation from another CLIP model."""

from __future__ import annotations

from typing import Any

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("open-clip-torch", "3.3.0")


@LIBRARY.loss(
    "DistillClipLoss.dist_loss", kind="logits", promises=Promises(definition="cross_entropy", reduction="mean")
)
def distance() -> Any:
    """Nothing is said; the name and arguments are those of a cross entropy with the teacher's probabilities."""
    made = file_of("open_clip", "loss.py").DistillClipLoss()
    return lambda student, teacher: made.dist_loss(teacher, student)
