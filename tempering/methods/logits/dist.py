"""DIST: match the teacher's inter-class and intra-class relations by Pearson correlation."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup, zero_term
from tempering.methods.logits.relations import block_scale, class_distance, counted_entries, row_distance, soften
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class DIST(Method):
    """DIST: inter * T_s T_t (1 - r of the row) + intra * T_s T_t (1 - mean r of the classes) + hard * cross entropy.

    r is the Pearson correlation of the softened probabilities: of a row over the classes (inter), and of a class over
    the rows of the block (intra). It is invariant to the scale and offset of either side. Rows of weight 0 are
    excluded; the weights of other rows apply to "inter" only.

    Args:
        inter: weight of the row term; the paper's 2 beta.
        intra: weight of the class term; the paper's 2 gamma.
        hard: weight of the cross entropy.
        warmup: fraction of the run over which both terms rise linearly from 0; published: none.
        temperature: a temperature policy; None: Static(4.0), the CIFAR value (ImageNet: 1). If it gives one temperature
            per row, "intra" is scaled by mean(T_s) mean(T_t).
        eps: added to the product of the norms; default: 0. The released code adds 1e-8, so that its term is about 1e-7
            where both sides agree.

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536.
    """

    paper = "arXiv:2205.10536"
    relational = True

    def __init__(
        self,
        *,
        inter: TermWeight = 2.0,
        intra: TermWeight = 2.0,
        hard: NonNegative = 1.0,
        eps: NonNegative = 0.0,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.inter, self.intra, self.hard, self.warmup, self.eps = inter, intra, hard, warmup, eps
        self.temperature = check_policy("DIST", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        terms = self._relations(rows, progress) if len(rows) else {"inter": zero_term(rows), "intra": zero_term(rows)}
        return self.with_hard(terms, rows)

    def _relations(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        warmup, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        kept, counted = counted_entries(rows)
        softened = soften(kept, counted, T)
        inter = T.scale * row_distance(softened, centered=True, eps=self.eps)
        intra = block_scale(T, counted) * class_distance(softened, centered=True, eps=self.eps)
        return {"inter": self.inter * warmup * inter, "intra": self.intra * warmup * expand_to_rows(intra, rows)}
