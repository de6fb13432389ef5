"""FlagEmbedding: the distillation of its embedders from the scores of a reranker."""

from __future__ import annotations

from typing import Any

from peers import Library, bare
from tempering.conformance import Promises

LIBRARY = Library("FlagEmbedding", "1.4.2")


@LIBRARY.loss(
    "abc.finetune.embedder.AbsEmbedderModel.distill_loss, kl_div", kind="scores", promises=Promises(divergence=False)
)
def scores() -> Any:
    """Distillation loss of the kind kl_div, of the student's scores and the teacher's targets, which its callers
    make by a softmax."""
    bare("FlagEmbedding", "FlagEmbedding.abc", "FlagEmbedding.abc.finetune", "FlagEmbedding.abc.finetune.embedder")
    from FlagEmbedding.abc.finetune.embedder.AbsModeling import AbsEmbedderModel

    return lambda student, teacher: AbsEmbedderModel.distill_loss("kl_div", teacher.softmax(-1), student)
