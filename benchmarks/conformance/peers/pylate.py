"""PyLate: its loss for distillation of ColBERT models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peers import Library, bare, stand_in
from tempering.conformance import Promises
from tempering.conformance.definitions import kl

LIBRARY = Library("pylate", "1.6.0")


def normalized(student: Tensor, teacher: Tensor) -> Tensor:
    low, high = student.amin(1, keepdim=True), student.amax(1, keepdim=True)
    return kl((student - low) / (high - low), teacher, 1.0).mean()


def register(normalize: bool, definition: Any) -> None:
    @LIBRARY.loss(
        f"losses.Distillation, normalize_scores={normalize}{' (its default)' if normalize else ''}",
        kind="scores",
        promises=Promises(definition=definition, divergence=not normalize, identifies_teacher=False),
        documented="Divergence of the softmaxes of the student's scores and of the given logits"
        + ("; the student's scores are min-max normalized before." if normalize else "."),
        unsaid=("ties", "slope") if normalize else (),  # one of equal extremes is the extreme
    )
    def make() -> Any:
        bare("pylate", "pylate.losses")
        stand_in("pylate.models", ColBERT=object)
        stand_in("pylate.scores", colbert_kd_scores=None)
        stand_in("pylate.losses.contrastive", extract_skiplist_mask=lambda **kw: (None, Same()))
        from pylate.losses.distillation import Distillation

        def loss(student: Tensor, teacher: Tensor) -> Any:
            model = Model(student)
            made = Distillation(model, score_metric=lambda *a, **kw: student, normalize_scores=normalize)
            return made([{"x": 0}, {"x": 1}], teacher)

        return loss


class Same:
    """Masks that nothing looks at."""

    shape = (1, 1)

    def view(self, *shape: Any) -> Any:
        return None


class Model(nn.Module):
    """Embeddings of the shapes that the loss asks for."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.shape, self.skiplist, self.do_query_expansion = scores.shape, (), True
        self.made = [scores.new_ones(scores.shape[0], 1, 1), scores.new_ones(scores.numel(), 1, 1)]

    def forward(self, features: Any) -> Any:
        return {"token_embeddings": self.made[features["x"]]}


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(student, teacher, 1.0).mean()


register(True, normalized)
register(False, divergence)
