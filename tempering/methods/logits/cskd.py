"""Cosine similarity KD: match each class's predictions over the batch, at a fixed and at a per-row temperature."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import (
    Method,
    check_policy,
    linear_warmup,
    zero_term,
)
from tempering.methods.logits.mlkd import STRONG, doubtful
from tempering.methods.logits.relations import (
    Lines,
    Softened,
    block_scale,
    class_distance,
    correlation_distance,
    counted_entries,
    lines,
    mean_over,
    soften,
)
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.cosine import Cosine
from tempering.temperature.static import Static
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class CSKD(Method):
    """Cosine similarity KD: fixed * tau^2 (1 - cosine of the classes at tau) + weighted * mean(T)^2 (1 - cosine of the
    classes at T, a temperature per row) + hard * cross entropy.

    The cosine is between the student's and the teacher's softened probabilities of a class over the rows of the block,
    averaged over classes. It is invariant to the scale of a class, but depends on the whole batch. It is 0 for a block
    of one row. Rows of weight 0 are excluded.

    Args:
        fixed: weight of the term at the policy's reference tau; the code's alpha.
        weighted: weight of the term at the policy's temperatures.
        gram: weight of the cosine distances of the class and batch Gram matrices, at both temperatures, on all blocks
            except "strong"; default: 0, as in the paper. The released copy includes them.
        hard: weight of the cross entropy.
        published: reproduce an error of the copy: on all blocks except "strong", all terms are multiplied by the
            fraction of rows (class Gram: of classes) whose teacher is at most as confident as the median, instead of
            masking entries. The copy also uses the weak view's temperatures for the strong view; here each view has its
            own.
        warmup: fraction of the run over which all terms but ``hard`` rise linearly from 0; published: none.
        temperature: a temperature policy; None: Cosine(), the paper's CSWT, T in [2, 6] by the cosine of the row.
        eps: added to the product of the norms; default: 0. The copy adds 1e-8.

    The source is a third-party copy of the code; the paper's own weights and results are not known.

    Reference: Ham et al., "Cosine Similarity Knowledge Distillation for Individual Class Information Transfer", 2023,
    arXiv:2311.14307.
    """

    paper = "arXiv:2311.14307"
    relational = True
    pairwise = True

    def __init__(
        self,
        *,
        fixed: TermWeight = 2.0,
        weighted: TermWeight = 2.0,
        gram: TermWeight = 0.0,
        hard: NonNegative = 1.0,
        published: bool = False,
        eps: NonNegative = 0.0,
        warmup: RunFraction = 0.0,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        self.fixed, self.weighted, self.gram, self.hard = fixed, weighted, gram, hard
        self.published, self.warmup, self.eps = published, warmup, eps
        self.temperature = check_policy("CSKD", Cosine() if temperature is None else temperature, allow_number=False)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        names = ("fixed", "weighted", "gram") if self._grams(rows) else ("fixed", "weighted")
        terms = self._cosines(rows, progress) if len(rows) else {name: zero_term(rows) for name in names}
        return self.with_hard(terms, rows)

    def _grams(self, rows: Rows) -> bool:
        return self.gram > 0 and rows.name != STRONG

    def _cosines(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        kept, counted = counted_entries(rows)
        levels: list[Temperatures] = [Static(self.temperature.reference_at(progress))(rows), T]
        softened = [soften(kept, counted, level) for level in levels]
        fixed, weighted = (
            block_scale(level, counted) * class_distance(s, centered=False, eps=self.eps)
            for level, s in zip(levels, softened, strict=True)
        )
        row_fraction, class_fraction = 1.0, 1.0
        if self.published and rows.name != STRONG:
            unconfident, rare = doubtful(kept.teacher, counted)
            row_fraction = mean_over(unconfident.to(fixed.dtype), counted.any(1))
            class_fraction = mean_over(rare.to(fixed.dtype), counted.any(0))
        terms = {
            "fixed": self.fixed * rise * row_fraction * expand_to_rows(fixed, rows),
            "weighted": self.weighted * rise * row_fraction * expand_to_rows(weighted, rows),
        }
        if self._grams(rows):
            classes = class_grams(softened[0], self.eps) + class_grams(softened[1], self.eps)
            batch = batch_grams(softened[0], self.eps) + batch_grams(softened[1], self.eps)
            terms["gram"] = self.gram * rise * expand_to_rows(class_fraction * classes + row_fraction * batch, rows)
        return terms


def class_grams(s: Softened, eps: float) -> Tensor:
    """Return 1 - mean cosine of the rows of the class Gram matrices P_s'P_s and P_t'P_t (C, C), ()."""
    counted = s.counted.any(0)
    grams: list[Lines] = []
    for logp, p in zip((s.student, s.teacher), s.exp(), strict=False):
        line = lines(logp, s.counted, 0)
        grams.append(Lines(line.values.T @ p, line.log_scale.T))
    return _mean_distance(grams, counted, eps)


def batch_grams(s: Softened, eps: float) -> Tensor:
    """Return 1 - mean cosine of the rows of the batch Gram matrices P_s P_s' and P_t P_t' (N, N), ()."""
    counted = s.counted.any(1)
    grams: list[Lines] = []
    for logp, p in zip((s.student, s.teacher), s.exp(), strict=False):
        line = lines(logp, s.counted, 1)
        grams.append(Lines(line.values @ p.T, line.log_scale))
    return _mean_distance(grams, counted, eps)


def _mean_distance(grams: list[Lines], counted: Tensor, eps: float) -> Tensor:
    entries = counted.unsqueeze(0) & counted.unsqueeze(1)
    return mean_over(correlation_distance(grams[0], grams[1], entries, 1, eps=eps), counted)
