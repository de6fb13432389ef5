"""Sentence Transformers: losses on a teacher's scores and embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("sentence-transformers", "6.2.0")


def columns(scores: Tensor) -> list[Tensor]:
    """Embeddings of a query, (1,), and of candidates, whose dot products are the scores."""
    one = torch.ones(len(scores), 1, dtype=scores.dtype)
    return [one, *scores.split(1, dim=1)]


def kl_of_scores(student: Tensor, teacher: Tensor) -> Tensor:
    from tempering.conformance.definitions import kl

    return kl(student, teacher, 1.0).mean()


@LIBRARY.loss(
    "sentence_transformer.losses.DistillKLDivLoss",
    kind="scores",
    promises=Promises(definition=kl_of_scores),
    said=("no gradient into the teacher",),
)
def divergence() -> Any:
    """KL divergence between softmaxes of the teacher's and the student's scores, times T^2."""
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    loss = DistillKLDivLoss(nn.Identity())
    return lambda student, teacher: loss.compute_loss_from_embeddings(columns(student), teacher)


def margins(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (x[:, :1] - x[:, 1:] for x in (student, teacher))
    return (s - t).square().mean()


@LIBRARY.loss(
    "sentence_transformer.losses.MarginMSELoss", kind="scores", promises=Promises(definition=margins), unsaid=("ties",)
)
def margin() -> Any:
    """Mean squared difference between the student's and the teacher's margins of the positive over each negative;
    labels may be scores."""
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss

    loss = MarginMSELoss(nn.Identity())
    return lambda student, teacher: loss.compute_loss_from_embeddings(columns(student), teacher)


class GivenScores(nn.Module):
    """A cross encoder that returns given scores, one pair of texts after another."""

    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns, self.num_labels, self.device = columns, 1, torch.device("cpu")

    def preprocess(self, pairs: Any, **kw: Any) -> Any:
        return {"column": int(pairs[0][1])}

    def tokenizer(self, pairs: Any, **kw: Any) -> Any:
        column = int(pairs[0][1])

        class Tokens(dict[str, int]):
            def to(self, device: Any) -> Any:
                return self

        return Tokens(column=column)

    def forward(self, features: Any = None, column: int | None = None, **kw: Any) -> Any:
        at = features["column"] if features is not None else column
        assert at is not None
        if features is not None:
            return {"scores": self.columns[at], "logits": self.columns[at]}
        return (self.columns[at][:, None],)


@LIBRARY.loss(
    "cross_encoder.losses.MarginMSELoss", kind="scores", promises=Promises(definition=margins), unsaid=("ties",)
)
def cross_encoder_margin() -> Any:
    """Mean squared difference between the student's and the teacher's margins of the positive over each negative."""
    from sentence_transformers.cross_encoder.losses import MarginMSELoss

    def loss(student: Tensor, teacher: Tensor) -> Any:
        model = GivenScores(list(student.unbind(1)))
        made = MarginMSELoss.__new__(MarginMSELoss)
        nn.Module.__init__(made)
        made.model, made.activation_fn, made.loss_fct = model, nn.Identity(), nn.MSELoss()
        texts = [["q"] * len(student), *([str(k)] * len(student) for k in range(student.shape[1]))]
        return made(texts, teacher)

    return loss


DISTANCES = {
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t)).mean(),
    "l2": lambda s, t: (s - t).norm(dim=1).mean(),
    "mse": lambda s, t: (s - t).square().mean(),
}


def embeddings(metric: str) -> None:
    @LIBRARY.loss(
        f"sentence_transformer.losses.EmbedDistillLoss, distance_metric={metric}",
        kind="features",
        promises=Promises(definition=DISTANCES[metric], identifies_teacher=metric != "cosine"),
        documented="The distance of the student's embeddings to the teacher's precomputed ones.",
    )
    def make() -> Any:
        from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

        class Same(nn.Module):
            def forward(self, features: Any) -> Any:
                return {"sentence_embedding": features["x"]}

            def get_embedding_dimension(self) -> int:
                return 4

            get_sentence_embedding_dimension = get_embedding_dimension

        loss = EmbedDistillLoss(Same(), distance_metric=metric)
        return lambda student, teacher: loss([{"x": student}], teacher)


for metric in DISTANCES:
    embeddings(metric)
