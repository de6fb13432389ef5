"""Embeddings and similarities of texts, or other samples: a row is a text, or a pair of texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tempering.data.batches import LabeledBatch, labeled_batch, with_teacher_outputs
from tempering.rows import Rows, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, Task, TeacherForward, evaluating
from tempering.tasks.parts import Unlabeled, check_unlabeled
from tempering.utils.tensors import described, logits_of


class EncoderTask(Task):
    """Base of tasks of encoders, whose models return embeddings (M, D) of all texts of a batch, or scores.

    Batches are as those of ``Classification``; inputs of {"student": ..., "teacher": ...} are different ones of the two
    models, such as other tokens or another language. Models return a tensor (``models.Encoder`` does), or a mapping
    with "sentence_embedding", as SentenceTransformer.
    """

    remember = False  # embeddings are large

    def parts(self, batch: Any) -> LabeledBatch:
        """Return the parts of a batch."""
        return labeled_batch(batch, type(self).__name__)

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        parts = self.parts(batch)
        student, teacher = (_of_side(parts.inputs, side) for side in ("student", "teacher"))
        return student, with_teacher_outputs(teacher, batch), parts.ids

    def output(self, output: Any, side: str) -> Tensor:
        """Return a model's output in at least float32, (M, D), (M,) or (M, 1)."""
        if isinstance(output, Mapping) and "sentence_embedding" in output:
            output = output["sentence_embedding"]
        output = logits_of(output)
        if isinstance(output, Tensor) and output.ndim in (1, 2) and output.is_floating_point():
            return upcast_to_float32(output)
        if hasattr(output, "last_hidden_state"):
            got = "a model of transformers without pooling. Wrap it: models.Encoder(model, pooling='mean')"
        else:
            got = described(output)
        raise ValueError(f"{type(self).__name__} needs embeddings (M, D), or scores, of the {side}; got {got}.")


class PairScored(EncoderTask):
    """Base of tasks that are scored by the similarities of pairs of texts."""

    def headline(self) -> tuple[str, bool]:
        return "spearman", True

    @abstractmethod
    def similarities(self, output: Tensor, pairs: int, side: str) -> Tensor:
        """Return the similarities (N,) of the N pairs of a labeled batch."""

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return spearman and pearson of the student's similarities and the labels of pairs, and spearman_teacher.

        Labels are (N,) floating point similarities of 2 N texts: all first ones, then all second ones; NaN is unknown.
        The last is the rank correlation with the teacher's similarities of these pairs.
        """
        from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

        found: list[tuple[Tensor, ...]] = []
        with evaluating(student, batches) as on_device:
            for batch in on_device:
                y = self.parts(batch).labels
                if not y.is_floating_point():
                    continue
                student_in, teacher_in, ids = self.inputs(batch)
                sides = [(student(student_in), "student")]
                sides += [] if teacher is None else [(teacher(teacher_in, ids), "teacher")]
                values = [self.similarities(self.output(x, side), len(y), side) for x, side in sides]
                known = ~torch.isnan(y)
                found.append(tuple(x[known].double().cpu() for x in (y, *values)))
        y, s, *t = (torch.cat(x) for x in zip(*found, strict=True)) if found else (torch.zeros(0),) * 2
        if len(y) < 2:
            raise NothingToScoreError(
                f"there is nothing to score: tasks.{type(self).__name__} scores pairs, batches of 2 N texts with N "
                "floating point labels, the similarities of text i and text N + i, and there are "
                f"{len(y)} of them. Retrieval is scored by tasks.Ranking()."
            )
        out = {"spearman": spearman_corrcoef(s, y), "pearson": pearson_corrcoef(s, y)}
        out |= {"spearman_teacher": spearman_corrcoef(s, t[0])} if t else {}
        return {name: float(value) for name, value in out.items()}


class Embeddings(PairScored):
    """Task of texts, or other samples, and models that return their embeddings (M, D), without labels.

    A row is a text. Its embeddings are the feature "embedding", of which the teacher's may have another size:
    ``methods.EmbeddingKD`` compares them one by one, and RKD, SP, PKT and others over vectors by their relations.
    Methods over logits are refused. A row's logits are no more than the first number of its embedding.

    Multilingual by translated pairs: where the teacher has fewer texts than the student, its embeddings are repeated.
    With inputs {"student": N sources, then their N translations, "teacher": the N sources}, both are drawn to the
    embedding that the teacher gives the source.

    Batches are (inputs, labels), with labels for scores alone, or None; ids and weights are of the teacher's texts.
    Weight 0 leaves a text out. Scores: see ``score``.
    """

    predicts = "vectors"
    unit = "text"

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts, s = self.parts(batch), self._embeddings(student, "student")
        t = s.detach() if teacher is None else self._embeddings(teacher, "teacher")
        count = _count(parts.inputs, "student")
        if len(s) != count or not len(t) or len(s) % len(t):
            raise ValueError(
                f"Embeddings needs one embedding per text, and a multiple of the teacher's texts as the student's; "
                f"got {len(s)} of the student for {count} texts, and {len(t)} of the teacher."
            )
        t = t.repeat(len(s) // len(t), 1)
        ids = None if parts.ids is None or len(s) % len(parts.ids) else parts.ids.repeat(len(s) // len(parts.ids))
        return [
            Rows(
                s[:, :1],
                t[:, :1],
                weight=self._weight(parts, count),
                name="embeddings",
                ids=ids,
                features={"embedding": (s, t)},
                task_loss=s.new_zeros(len(s)),
            )
        ]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = self.parts(batch)
        count = _count(parts.inputs, "student")
        weight = self._weight(parts, count)
        return {"embeddings": float(count) if weight is None else weight.sum()}

    def _weight(self, parts: LabeledBatch, count: int) -> Tensor | None:
        if parts.weight is None:
            return None
        if not len(parts.weight) or count % len(parts.weight):
            raise ValueError(f"Embeddings needs one weight per text; got {len(parts.weight)} for {count} texts.")
        return parts.weight.repeat(count // len(parts.weight))

    def _embeddings(self, output: Any, side: str) -> Tensor:
        x = self.output(output, side)
        if x.ndim == 2:
            return x
        raise ValueError(f"Embeddings needs embeddings (M, D) of the {side}; got {tuple(x.shape)}.")

    def similarities(self, output: Tensor, pairs: int, side: str) -> Tensor:
        return cosine_of_halves(output.repeat(2, 1) if len(output) == pairs else output, pairs, side)


class Similarity(PairScored):
    """Task of pairs of texts with the similarity as label, (N,) floating point, such as 0 to 1; NaN is unknown.

    A row is a pair, and its number the cosine of the embeddings of text i and text N + i, of 2 N texts; or the score
    (N,) or (N, 1) of a cross-encoder, which reads both texts of a pair. Either model may be of either kind, so a
    cross-encoder can teach an encoder. ``methods.RegressionKD`` compares the numbers, ``Supervised`` learns the labels
    by their squared error; embeddings are the features "first" and "second" if both models have them, for
    ``EmbeddingKD`` and other methods over vectors. Scores: see ``score``.

    Args:
        unlabeled: pairs without a label are left out ("ignore"), or learned from the teacher alone ("teach").

    Raises:
        ValueError: for another ``unlabeled``.
    """

    predicts = "numbers"
    unit = "pair"

    def __init__(self, *, unlabeled: Unlabeled = "teach") -> None:
        self.unlabeled = check_unlabeled("Similarity", unlabeled)

    def parts(self, batch: Any) -> LabeledBatch:
        parts = super().parts(batch)
        if parts.labels.ndim == 1 and parts.labels.is_floating_point():
            return parts
        raise ValueError(
            "Similarity needs labels (N,) of floating point, one similarity per pair, NaN where unknown; got "
            f"{tuple(parts.labels.shape)} {parts.labels.dtype}. Of texts without labels, use tasks.Embeddings()."
        )

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts, s = self.parts(batch), self.output(student, "student")
        y, known = parts.labels, ~torch.isnan(parts.labels)
        t = s.detach() if teacher is None else self.output(teacher, "teacher")
        student, teacher = (self.similarities(x, len(y), side) for x, side in ((s, "student"), (t, "teacher")))
        label = torch.where(known, y, 0.0).to(student.dtype)
        losses = [torch.where(known, (z - label).square(), 0.0) for z in (student, teacher.to(student.dtype))]
        n, features = len(y), {}
        if len(s) == len(t) == 2 * n:
            features = {"first": (s[:n], t[:n]), "second": (s[n:], t[n:])}
        return [
            Rows(
                student.unsqueeze(1), teacher.unsqueeze(1), weight=self._weight(parts), name="similarities",
                ids=parts.ids if parts.ids is not None and len(parts.ids) == len(y) else None, features=features,
                task_loss=losses[0], teacher_loss=losses[1],
            )
        ]  # fmt: skip

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        return {"similarities": self._weight(self.parts(batch)).sum()}

    def _weight(self, parts: LabeledBatch) -> Tensor:
        known = torch.ones_like(parts.labels) if self.unlabeled == "teach" else (~torch.isnan(parts.labels)).float()
        return known if parts.weight is None else parts.weight * known

    def similarities(self, output: Tensor, pairs: int, side: str) -> Tensor:
        scores = len(output) == pairs and output.numel() == pairs
        return output.flatten() if scores else cosine_of_halves(output, pairs, side)


def cosine_of_halves(vectors: Tensor, pairs: int, side: str) -> Tensor:
    """Return the cosines (N,) of vectors i and N + i of (2 N, D).

    Raises:
        ValueError: for another number of vectors.
    """
    if vectors.ndim != 2 or len(vectors) != 2 * pairs:
        raise ValueError(
            f"{pairs} pairs are {2 * pairs} texts, all first ones and then all second ones; the {side} returns "
            f"{tuple(vectors.shape)}."
        )
    return F.cosine_similarity(vectors[:pairs], vectors[pairs:])


def _of_side(inputs: Any, side: str) -> Any:
    return inputs.get(side, inputs) if isinstance(inputs, Mapping) else inputs


def _count(inputs: Any, side: str) -> int:
    """Return the number of texts of one side: the length of its first tensor."""
    return next((len(x) for x in tree_leaves(_of_side(inputs, side)) if isinstance(x, Tensor) and x.ndim), 0)
