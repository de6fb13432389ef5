"""Distillation of DETR-like detectors: the teacher's queries are matched to the student's one to one."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.methods.base import zero_term
from tempering.methods.detection.base import BLOCKS_WITHOUT_MAPS
from tempering.methods.features.base import FeatureMethod, samples_kept
from tempering.models.boxes import cornered, giou, match_costs, match_one_to_one
from tempering.objectives import divergence
from tempering.rows import Rows, binary_logits, upcast_to_float32
from tempering.utils.search_space import NonNegative, TermWeight

HEADS = ("query_sigmoid", "query_softmax")  # the names of the logits, by the kind of head


class QueryKD(FeatureMethod):
    """Query matching: classes * sum w KL(teacher's classes || student's) + l1 * sum w |b_s - b_t| + giou * sum w (1 -
    GIoU), each over matched queries and divided by max(1, sum w), plus hard * the task's own loss.

    w is the teacher's largest class probability of a query. The ``keep`` queries per image of the largest w are matched
    one to one to the student's by the Hungarian algorithm, at the smallest total of 2 * L1 of the class probabilities
    + 5 * L1 of the boxes + 2 * (1 - GIoU). So neither side's order of queries matters, and their numbers may differ.
    Boxes are center, width and height in [0, 1] of the image. A head with sigmoids has a Bernoulli KL for each class,
    summed over classes; a softmax a KL over classes and background. Where the teacher sees no object, sum w is small,
    and so are the terms.

    The terms are per image and do not depend on the batch. With layers="all" each decoder layer is matched on its own,
    the last one to the last one, the one before to the one before, and the terms are summed over layers; layers without
    a partner are not compared.

    From the papers: the one-to-one matching of predictions and the stages of the decoder are DETRDistill's, whose
    weights of positive and negative queries, feature and assignment distillation are not here; the weight w is the
    foreground rebalance weight of KD-DETR, whose extra queries that are shared by both models are not here. Both papers
    have KL, L1 and GIoU terms.

    Args:
        classes, l1, giou: weights. Not published in this form: 1, 5 and 2 are those of the losses of DETR and its
            successors (DETR: arXiv:2005.12872; the costs of a match: Deformable DETR, arXiv:2010.04159).
        hard: weight of the task's own loss.
        keep: number of the teacher's queries per image.
        layers: "last" decoder layer, or "all" that both models return.

    Reference: Chang et al., "DETRDistill", ICCV 2023, arXiv:2211.10156; Wang et al., "KD-DETR", CVPR 2024,
    arXiv:2211.08071.
    """

    paper = "arXiv:2211.10156"
    relational = False
    weighs = ("classes", "l1", "giou")
    hint = "tasks.Detection gives the queries of both models, if both are DETR-like."

    def __init__(
        self,
        *,
        classes: TermWeight = 1.0,
        l1: TermWeight = 5.0,
        giou: TermWeight = 2.0,
        hard: NonNegative = 1.0,
        keep: int = 100,
        layers: Literal["all", "last"] = "all",
    ) -> None:
        super().__init__(feature=1.0, hard=hard)  # unused: it has three weights of its own
        if keep < 1:
            raise ValueError(f"QueryKD needs keep >= 1, the number of queries to match; got {keep}.")
        self.classes, self.l1, self.giou, self.keep, self.layers = classes, l1, giou, keep, layers

    @classmethod
    def example(cls) -> Self:
        return cls(keep=4)

    def select_features(self, stages: object) -> tuple[str, ...]:
        return ()  # the task provides the queries

    def chosen(self, rows: Rows) -> tuple[str, ...]:
        head = next((name for name in HEADS if name in rows.features), HEADS[0])
        return (head, "query_boxes")

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if rows.name in BLOCKS_WITHOUT_MAPS:
            return dict.fromkeys(self.weighs, zero_term(rows))
        return super().forward(rows, progress)

    def pairs(self, rows: Rows) -> list[tuple[Tensor, Tensor]]:
        missing = [name for name in self.chosen(rows) if name not in rows.features]
        if missing:
            raise ValueError(
                f"QueryKD matches queries, and Rows(name={rows.name!r}) has {sorted(rows.features) or 'no features'}; "
                f"missing: {', '.join(missing)}. {self.hint}"
            )
        kept = None if rows.weight is None else samples_kept(rows, 1).nonzero().squeeze(1)
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in self.chosen(rows):
            s, t = (upcast_to_float32(x) for x in rows.features[name])
            if s.ndim != 4 or t.ndim != 4 or s.shape[-1] != t.shape[-1]:
                raise ValueError(
                    f"QueryKD needs {name!r} as (N, layers, queries, {'4' if name == 'query_boxes' else 'classes'}) on "
                    f"both sides, with the same classes in the same order; got {tuple(s.shape)} and {tuple(t.shape)}."
                )
            pairs.append((s, t.detach()) if kept is None else (s.index_select(0, kept), t.detach()[kept]))
        return pairs

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> dict[str, Tensor]:
        count = 1 if self.layers == "last" else min(x.shape[1] for x in pairs[0])
        last = [[x[:, -count:].flatten(0, 1) for x in pair] for pair in pairs]  # a layer of an image is one of N * L
        (s_logits, t_logits), (s_boxes, t_boxes) = last
        values = self._of_layers(self.chosen(rows)[0], (s_logits, s_boxes), (t_logits, t_boxes))
        return {name: value.view(-1, count).sum(1) for name, value in values.items()}

    def _of_layers(
        self, head: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
    ) -> dict[str, Float[Tensor, " N"]]:
        """Return the unweighted terms of decoder layers, (N,), of logits (N, Q, C) and boxes (N, Q, 4) each."""
        score = _foreground(teacher[0], head).amax(-1)
        weight, best = score.topk(min(self.keep, score.shape[1], student[0].shape[1]))
        t_logits, t_boxes = (_take(x, best) for x in teacher)
        index = _matched(
            _foreground(student[0].detach(), head), student[1].detach(), _foreground(t_logits, head), t_boxes
        )
        s_logits, s_boxes = (_take(x, index) for x in student)
        logp, logq = (_log_probabilities(x, head).flatten(0, -2) for x in (t_logits, s_logits))
        values = {
            "classes": divergence(logp, logq).view(*weight.shape, -1).sum(-1),
            "l1": (s_boxes - t_boxes).abs().sum(-1),
            "giou": 1.0 - giou(cornered(s_boxes), cornered(t_boxes)),
        }
        divisor = weight.sum(1).clamp_min(1.0)
        return {name: (weight * value).sum(1) / divisor for name, value in values.items()}


def _foreground(logits: Float[Tensor, "N Q C"], head: str) -> Tensor:
    """Probabilities of the classes without the background."""
    return logits.sigmoid() if head == "query_sigmoid" else logits.softmax(-1)[..., :-1]


def _log_probabilities(logits: Float[Tensor, "N Q C"], head: str) -> Tensor:
    """Log-probabilities (N, Q, C, 2) of every class on its own, or (N, Q, C) of all."""
    return (binary_logits(logits) if head == "query_sigmoid" else logits).log_softmax(-1)


def _take(x: Float[Tensor, "N Q C"], index: Int[Tensor, "N K"]) -> Float[Tensor, "N K C"]:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def _matched(p: Tensor, s_boxes: Tensor, q: Tensor, t_boxes: Tensor) -> Int[Tensor, "N K"]:
    """Return the student's query of each of the teacher's K: class probabilities and boxes are (N, Q, C), (N, Q, 4)."""
    return match_one_to_one(match_costs(q, t_boxes, p, s_boxes))
