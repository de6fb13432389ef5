"""DIST: the teacher's relations between classes and between samples, matched by correlation instead of by value."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from tempering.methods.base import Method, check_policy, check_run_fraction, check_weights, linear_warmup, zero_term
from tempering.methods.logits.relations import block_scale, class_distance, counted_entries, row_distance, soften
from tempering.objectives import cross_entropy
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Weight


class DIST(Method):
    """inter * T_s T_t (1 - r of a row) + intra * T_s T_t (1 - mean r of the classes) + hard * cross entropy.

    r is Pearson's correlation of the softened probabilities: of a row over the classes (inter), and of a class over
    the block's rows (intra). It ignores the scale and the offset of either side. Rows of weight 0 take no part; the
    others' weights count in "inter" alone.

    Args:
        inter: weight of the rows' term; the paper's 2 beta.
        intra: weight of the classes' term; the paper's 2 gamma.
        hard: weight of the cross entropy.
        warmup: share of the run over which both terms rise linearly; published: none.
        temperature: any policy; None is Static(4.0), the CIFAR value (ImageNet: 1). Where it gives a temperature a row,
            "intra" is scaled by mean(T_s) mean(T_t).
        eps: the released code adds 1e-8 to the product of the norms, which makes the term 1e-7 and not 0 where both
            agree; 0 leaves it out.

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536.
    """

    paper = "arXiv:2205.10536"
    relational = True

    def __init__(
        self,
        *,
        inter: Annotated[float, Weight()] = 2.0,
        intra: Annotated[float, Weight()] = 2.0,
        hard: float = 1.0,
        warmup: Annotated[float, Fraction()] = 0.0,
        temperature: Policy | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        check_weights("DIST", inter=inter, intra=intra, hard=hard, eps=eps)
        check_run_fraction("DIST", warmup=warmup)
        self.inter, self.intra, self.hard, self.warmup, self.eps = inter, intra, hard, warmup, eps
        self.temperature = check_policy("DIST", Static(4.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        terms = self._relations(rows, progress) if len(rows) else {"inter": zero_term(rows), "intra": zero_term(rows)}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms

    def _relations(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        kept, counted = counted_entries(rows)
        both = soften(kept, counted, T)
        inter = T.scale * row_distance(both, centered=True, eps=self.eps)
        intra = block_scale(T, counted) * class_distance(both, centered=True, eps=self.eps)
        return {"inter": self.inter * rise * inter, "intra": self.intra * rise * expand_to_rows(intra, rows)}
