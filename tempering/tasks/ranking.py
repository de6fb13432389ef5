"""Ranking: one row per query, whose classes are its candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.data.batches import LabeledBatch
from tempering.rows import Rows, class_labels, is_labeled, is_scored, is_soft
from tempering.tasks.base import NothingToScoreError, TeacherForward, evaluating
from tempering.tasks.embeddings import EncoderTask

Candidates = Literal["given", "batch"]
Scale = Literal["cosine", "dot"]


class Ranking(EncoderTask):
    """Task of queries and candidates: retrievers and rerankers, with logits (Q, K) of Q queries and K candidates.

    Each model returns embeddings (M, D) of the M = Q + documents texts of a batch, queries first, whose similarities
    are the logits; or scores (Q, K), (Q K,) or (Q K, 1), such as a cross-encoder's of all pairs, query by query. Either
    model may be of either kind, so a cross-encoder can teach a retriever. Scores that are stored are the teacher's
    inputs, with torch.nn.Identity() as the teacher.

    Labels are (Q,) positions of the relevant candidate, from 0, and -100 or -1 where unknown, or (Q, K) probabilities,
    floating point. So hard terms are InfoNCE, and KD, DKD, DTKD and all other methods of single rows, with their
    temperature policies, are those of ``Classification``; ``methods.MarginMSE`` compares margins. Batches that are
    mappings may have a "mask" (Q, K), False for candidates that do not count, as in lists of unequal length.

    Scores: ndcg (of the first ``top``), mrr, accuracy (of the first), loss, agreement with the teacher's first.

    Args:
        candidates: "given": the documents are K per query, query by query. "batch": the candidates of each query are
            all documents of the batch, of which the first Q usually are the relevant ones, labels 0 to Q - 1. They
            depend on the batch, so a step is not split.
        similarity: "cosine", or "dot" product.
        scale: factor of the similarities of embeddings; cosines of 1 and -1 need one to be logits.
        top: number of candidates that count in ndcg.

    Raises:
        ValueError: for another option.
    """

    unit = "query"

    def __init__(
        self, *, candidates: Candidates = "given", similarity: Scale = "cosine", scale: float = 20.0, top: int = 10
    ) -> None:
        if candidates not in get_args(Candidates) or similarity not in get_args(Scale) or not scale > 0 or top < 1:
            raise ValueError(
                "Ranking needs candidates 'given' or 'batch', similarity 'cosine' or 'dot', scale > 0 and top >= 1; "
                f"got {candidates!r}, {similarity!r}, {scale!r} and {top!r}."
            )
        self.candidates, self.similarity, self.scale, self.top = candidates, similarity, scale, top
        self.splittable = candidates == "given"

    def headline(self) -> tuple[str, bool]:
        return "ndcg", True

    def parts(self, batch: Any) -> LabeledBatch:
        named = isinstance(batch, Mapping) and "mask" in batch
        parts = super().parts({name: x for name, x in batch.items() if name != "mask"} if named else batch)
        none = any(x is None for x in batch.values()) if isinstance(batch, Mapping) else batch[1] is None
        if none or len(parts.labels) == 0:
            raise ValueError("Ranking needs labels, one per query, since they count the queries; -100 where unknown.")
        return parts

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts = self.parts(batch)
        s = self.logits(student, len(parts.labels), "student")
        t = s.detach() if teacher is None else self.logits(teacher, len(parts.labels), "teacher")
        if s.shape != t.shape:
            raise ValueError(
                f"Ranking needs logits of the same candidates; got {tuple(s.shape)} of the student and "
                f"{tuple(t.shape)} of the teacher (queries, candidates)."
            )
        mask, y = self._mask(batch), parts.labels
        if mask is not None:
            if mask.shape != s.shape:
                raise ValueError(f"Ranking needs a mask {tuple(s.shape)}, as the logits; got {tuple(mask.shape)}.")
            chosen = y > 0 if is_soft(y) else F.one_hot(y.long().clamp(0, s.shape[1] - 1), s.shape[1]).bool()
            if mask.device.type == "cpu" and bool((chosen & ~mask)[is_labeled(y) & mask.any(1)].any()):
                raise ValueError("a query's label is a candidate that its mask leaves out.")
            out = ~mask & mask.any(1, keepdim=True)  # a query without candidates has weight 0
            s, t = s.masked_fill(out, -torch.inf), t.masked_fill(out, -torch.inf)
        ids = None if parts.ids is None or len(parts.ids) < len(y) else parts.ids[: len(y)]
        return [Rows(s, t, y, self._weight(parts, mask), name="logits", ids=ids)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = self.parts(batch)
        weight = self._weight(parts, self._mask(batch))
        return {"logits": float(len(parts.labels)) if weight is None else weight.sum()}

    @staticmethod
    def _mask(batch: Any) -> Tensor | None:
        return batch["mask"].bool() if isinstance(batch, Mapping) and "mask" in batch else None

    @staticmethod
    def _weight(parts: LabeledBatch, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return parts.weight
        there = mask.any(1).float()
        return there if parts.weight is None else parts.weight * there

    def logits(self, output: Any, queries: int, side: str) -> Tensor:
        """Return a model's logits, (Q, K)."""
        x = self.output(output, side)
        texts = x.ndim == 2 and x.shape[1] > 1 and len(x) > queries  # embeddings; others are scores
        documents = len(x) - queries
        if not texts and len(x) >= queries > 0 and x.numel() % queries == 0:
            scores = x.view(queries, -1)
            if scores.shape[1] > 1:
                return scores
        elif texts and (self.candidates == "batch" or documents % queries == 0):
            x = F.normalize(x, dim=1) if self.similarity == "cosine" else x
            q, d = x[:queries], x[queries:]
            if self.candidates == "batch":
                return self.scale * (q @ d.T)
            return self.scale * torch.einsum("qd,qkd->qk", q, d.view(queries, -1, d.shape[1]))
        wanted = "any number of" if self.candidates == "batch" else "K >= 2 for each, query by query, in all Q K"
        raise ValueError(
            f"Ranking(candidates={self.candidates!r}) needs embeddings of Q = {queries} queries (there are as many as "
            f"labels), then of the documents, {wanted}; or scores (Q, K). The {side} returns {tuple(x.shape)}."
        )

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return ndcg, mrr, accuracy and agreement in [0, 1], and the loss in nats, over queries with a label."""
        from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG

        from tempering.objectives import cross_entropy

        metrics = {"ndcg": RetrievalNormalizedDCG(top_k=self.top), "mrr": RetrievalMRR()}
        loss, hits, agreement, count = 0.0, 0.0, 0.0, 0
        with evaluating(student, batches) as on_device:
            for batch in on_device:
                student_in, teacher_in, ids = self.inputs(batch)
                answer = None if teacher is None else teacher(teacher_in, ids)
                (rows,) = self.rows(student(student_in), answer, batch)
                assert rows.target is not None
                rows = rows.select(is_scored(rows.target, rows.weight))
                s, y, n = rows.student, rows.target, len(rows)
                if not n or y is None:
                    continue
                relevant = y if is_soft(y) else F.one_hot(y, s.shape[1]).to(s.dtype)
                there = ~torch.isneginf(s)
                index = torch.arange(count, count + n, device=s.device).unsqueeze(1).expand_as(s)[there].cpu()
                z, gain = s[there].cpu(), relevant[there].cpu()
                metrics["ndcg"].update(z, gain, index)
                metrics["mrr"].update(z, gain > 0, index)
                loss += float(cross_entropy(rows).double().sum())
                hits += float((s.argmax(1) == class_labels(y)).sum())
                agreement += float((s.argmax(1) == rows.teacher.argmax(1)).sum())
                count += n
        if not count:
            raise NothingToScoreError("there is nothing to score: no query has a label and candidates.")
        out = {name: float(metric.compute()) for name, metric in metrics.items()}
        out |= {"accuracy": hits / count, "loss": loss / count}
        return out | ({} if teacher is None else {"agreement": agreement / count})
