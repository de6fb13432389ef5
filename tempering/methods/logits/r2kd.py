"""Robustness-reinforced KD: correlation of values and of ranks, with a rank term that has a gradient."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tempering.methods.base import Method, check_policy, check_run_fraction, check_weights, linear_warmup, zero_term
from tempering.methods.logits.relations import (
    Lines,
    block_scale,
    class_distance,
    correlation_distance,
    counted_entries,
    row_distance,
    soften,
)
from tempering.objectives import cross_entropy
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import Policy, check_positive
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Weight

PAIRS = 1 << 24  # comparisons held at once while ranking: 64 MiB in float32


class R2KD(Method):
    """value * T_s T_t [(1 - cosine of a row) + (1 - mean cosine of the classes)] + order * (1 - rank r) + hard * CE.

    Cosines are of the softened probabilities, of a row over the classes ("rows") and of a class over the block's rows
    ("classes"); "order" is one less Spearman's correlation of each row's two rankings. Rows of weight 0 take no part.

    Args:
        value: weight of both cosine distances.
        order: weight of the rank distance.
        hard: weight of the cross entropy. On an augmented view the paper has none: ``tasks.TwoView(labeled=False)``.
        rank: "soft" is the correlation of soft ranks, the sums of pairwise sigmoids of standardized logits: it has a
            gradient, ignores the row's scale, and tends to Spearman's as ``softness`` tends to 0. "published" ranks by
            argsort, whose gradient is 0: a constant, as in the released code.
        softness: width of the sigmoids, in standard deviations of the row's logits.
        warmup: share of the run over which all terms but ``hard`` rise linearly; published: none.
        temperature: any policy; None is Static(4.0). Ranks do not see it.
        eps: the released code adds 1e-8 to the product of the norms; 0 leaves it out.

    The paper's teacher is a blend with its pruned copy: ``teachers.blended.Blended``. Ranking costs O(N C^2).

    Reference: Kim et al., "Robustness-Reinforced Knowledge Distillation With Correlation Distance and Network Pruning",
    IEEE TKDE 2024, arXiv:2311.13934. Soft ranks: Qin et al., "A general approximation framework for direct optimization
    of information retrieval measures", Information Retrieval 2010.
    """

    paper = "arXiv:2311.13934"
    relational = True

    def __init__(
        self,
        *,
        value: Annotated[float, Weight()] = 2.0,
        order: Annotated[float, Weight()] = 2.0,
        hard: float = 1.0,
        rank: Literal["soft", "published"] = "soft",
        softness: float = 0.1,
        warmup: Annotated[float, Fraction()] = 0.0,
        temperature: Policy | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        check_weights("R2KD", value=value, order=order, hard=hard, eps=eps)
        check_run_fraction("R2KD", warmup=warmup)
        check_positive("R2KD", softness=softness)
        if rank not in ("soft", "published"):
            raise ValueError(f"R2KD needs rank 'soft' or 'published'; got {rank!r}.")
        self.value, self.order, self.hard, self.rank, self.softness = value, order, hard, rank, softness
        self.warmup, self.eps = warmup, eps
        self.temperature = check_policy("R2KD", Static(4.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        names = ("rows", "classes", "order")
        terms = self._correlations(rows, progress) if len(rows) else {name: zero_term(rows) for name in names}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms

    def _correlations(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        kept, counted = counted_entries(rows)
        both = soften(kept, counted, T)
        classes = block_scale(T, counted) * class_distance(both, centered=False, eps=self.eps)
        of = kept if self.rank == "soft" else both.exp()
        sides = (self._ranked(of.student, counted), self._ranked(of.teacher, counted))
        return {
            "rows": self.value * rise * T.scale * row_distance(both, centered=False, eps=self.eps),
            "classes": self.value * rise * expand_to_rows(classes, rows),
            "order": self.order * rise * correlation_distance(*sides, counted, 1, centered=True, eps=self.eps),
        }

    def _ranked(self, z: Tensor, counted: Tensor) -> Lines:
        """Ranks as shares of their number, so that one eps serves any number of classes, as released."""
        n = counted.sum(1, keepdim=True).clamp_min(1)
        rank = soft_ranks(z, counted, self.softness) if self.rank == "soft" else hard_ranks(z, counted)
        return Lines(rank / n, (2.0 / (n + 1)).log().to(z.dtype))


@torch.no_grad()
def hard_ranks(z: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Ranks of the entries that count, 1 the smallest, ties by place as argsort has them; 0 elsewhere."""
    order = z.masked_fill(~counted, torch.inf).argsort(1).argsort(1)
    return torch.where(counted, order + 1, 0).to(z.dtype)


def soft_ranks(z: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], softness: float) -> Float[Tensor, "N C"]:
    """0.5 + sum over j of sigmoid((z_i - z_j) / (softness * std)), (N, C), among the entries that count; 0 elsewhere.

    Held in chunks of rows that are computed again on the way back, so memory stays bounded for many classes.
    """
    n = counted.sum(1, keepdim=True).clamp_min(1)
    z = torch.where(counted, z, 0.0)
    noise = 8.0 * torch.finfo(z.dtype).eps * z.detach().abs().amax(1, keepdim=True)
    z = torch.where(counted, z - z.sum(1, keepdim=True) / n, 0.0)
    square = z.square().sum(1, keepdim=True) / n
    flat = square <= noise.square()
    z = z / (softness * torch.where(flat, 1.0, square).sqrt())
    step = max(1, PAIRS // max(1, z.shape[1] ** 2))
    if len(z) <= step:
        return _pairwise(z, counted)
    parts = zip(z.split(step), counted.split(step), strict=True)
    return torch.cat([checkpoint(_pairwise, a, b, use_reentrant=False) for a, b in parts])  # pyright: ignore


def _pairwise(z: Tensor, counted: Tensor) -> Tensor:
    above = torch.sigmoid(z.unsqueeze(2) - z.unsqueeze(1)).masked_fill(~counted.unsqueeze(1), 0.0)
    return torch.where(counted, above.sum(2), 0.0)
