"""Robustness-reinforced KD: correlation of probabilities and of ranks, with differentiable ranks."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from tempering.methods.base import Method, check_policy, linear_warmup, zero_term
from tempering.methods.logits.relations import (
    Lines,
    block_scale,
    class_distance,
    correlation_distance,
    counted_entries,
    row_distance,
    soften,
)
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, Positive, RunFraction, TermWeight

PAIRS = 1 << 24  # maximum number of comparisons in memory during ranking: 64 MiB in float32


class R2KD(Method):
    """Robustness-reinforced KD: value * T_s T_t [(1 - cosine of the row) + (1 - mean cosine of the classes)] + order *
    (1 - rank r) + hard * cross entropy.

    Cosines are of the softened probabilities, of a row over the classes ("rows") and of a class over the rows of the
    block ("classes"); "order" is 1 - Spearman's correlation of the row's two rankings. Rows of weight 0 are excluded.

    Args:
        value: weight of both cosine distances.
        order: weight of the rank distance.
        hard: weight of the cross entropy. The paper has none on an augmented view: ``tasks.TwoView(labeled=False)``.
        rank: "soft" is the correlation of soft ranks, the sums of pairwise sigmoids of standardized logits: it has a
            gradient, is invariant to the row's scale, and converges to Spearman's as ``softness`` goes to 0.
            "published" ranks by argsort, as the released code does; its gradient is 0, so the term is constant.
        softness: width of the sigmoids, in standard deviations of the row's logits.
        warmup: fraction of the run over which all terms but ``hard`` rise linearly from 0; published: none.
        temperature: a temperature policy, or a number for Static; None: Static(4.0). It does not affect ranks.
        eps: added to the product of the norms; default: 0. The released code adds 1e-8.

    The paper has two parts beside this loss, which recipes add for this method: a teacher that is an ensemble with its
    pruned copy (``teachers.Ensemble``, --teacher-pruned 0.1) and a mixed view (``tasks.TwoView``, --views cutmix).
    Ranking costs O(N C^2).

    Reference: Kim et al., "Robustness-Reinforced Knowledge Distillation With Correlation Distance and Network Pruning",
    IEEE TKDE 2024, arXiv:2311.13934. Soft ranks: Qin et al., "A general approximation framework for direct optimization
    of information retrieval measures", Information Retrieval 2010.
    """

    paper = "arXiv:2311.13934"
    relational = True
    second_view = "cutmix"
    teacher_pruned = 0.1

    def __init__(
        self,
        *,
        value: TermWeight = 2.0,
        order: TermWeight = 2.0,
        hard: NonNegative = 1.0,
        rank: Literal["soft", "published"] = "soft",
        softness: Positive = 0.1,
        eps: NonNegative = 0.0,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        if rank not in ("soft", "published"):
            raise ValueError(f"R2KD needs rank 'soft' or 'published'; got {rank!r}.")
        self.value, self.order, self.hard, self.rank, self.softness = value, order, hard, rank, softness
        self.warmup, self.eps = warmup, eps
        self.temperature = check_policy("R2KD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        names = ("rows", "classes", "order")
        terms = self._correlations(rows, progress) if len(rows) else {name: zero_term(rows) for name in names}
        return self.with_hard(terms, rows)

    def _correlations(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        kept, counted = counted_entries(rows)
        softened = soften(kept, counted, T)
        classes = block_scale(T, counted) * class_distance(softened, centered=False, eps=self.eps)
        ranked = kept if self.rank == "soft" else softened.exp()
        sides = (self._ranks(ranked.student, counted), self._ranks(ranked.teacher, counted))
        return {
            "rows": self.value * rise * T.scale * row_distance(softened, centered=False, eps=self.eps),
            "classes": self.value * rise * expand_to_rows(classes, rows),
            "order": self.order * rise * correlation_distance(*sides, counted, 1, centered=True, eps=self.eps),
        }

    def _ranks(self, z: Tensor, counted: Tensor) -> Lines:
        """Return ranks divided by their number, so that eps is independent of the number of classes, as released."""
        n = counted.sum(1, keepdim=True).clamp_min(1)
        rank = soft_ranks(z, counted, self.softness) if self.rank == "soft" else hard_ranks(z, counted)
        return Lines(rank / n, (2.0 / (n + 1)).log().to(z.dtype))


@torch.no_grad()
def hard_ranks(z: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Rank the counted entries, 1 the smallest, ties as ordered by argsort; 0 elsewhere."""
    order = z.masked_fill(~counted, torch.inf).argsort(1).argsort(1)
    return torch.where(counted, order + 1, 0).to(z.dtype)


def soft_ranks(z: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], softness: float) -> Float[Tensor, "N C"]:
    """Return 0.5 + sum over j of sigmoid((z_i - z_j) / (softness * std)) over the counted entries, (N, C); 0 elsewhere.

    Large inputs are computed in chunks of rows with activation checkpointing, so that memory is bounded.
    """
    n = counted.sum(1, keepdim=True).clamp_min(1)
    z = torch.where(counted, z, 0.0)
    noise = 8.0 * torch.finfo(z.dtype).eps * z.detach().abs().amax(1, keepdim=True)
    z = torch.where(counted, z - z.sum(1, keepdim=True) / n, 0.0)
    square = z.square().sum(1, keepdim=True) / n
    is_constant = square <= noise.square()
    z = z / (softness * torch.where(is_constant, 1.0, square).sqrt())
    step = max(1, PAIRS // max(1, z.shape[1] ** 2))
    if len(z) <= step:
        return _pairwise(z, counted)
    chunks = zip(torch.split(z, step), torch.split(counted, step), strict=True)
    return torch.cat([checkpoint(_pairwise, a, b, use_reentrant=False) for a, b in chunks])  # pyright: ignore


def _pairwise(z: Tensor, counted: Tensor) -> Tensor:
    above = torch.sigmoid(z.unsqueeze(2) - z.unsqueeze(1)).masked_fill(~counted.unsqueeze(1), 0.0)
    return torch.where(counted, above.sum(2), 0.0)
