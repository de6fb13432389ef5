"""Universal logit distillation: compare sorted probabilities, for models with different vocabularies."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import divergence, mixture, softened
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight, UnitInterval


class ULD(Method):
    """Universal logit distillation: soft * T_s T_t sum over ranks of |p_(i) - q_(i)| + hard * cross entropy, with p and
    q sorted in descending order.

    The distance is 0 whenever the student has the teacher's probabilities in any order: it supervises confidence, not
    the predicted class. So use it with ``hard`` > 0, or as part of ``HybridULD``. Unscaled it is in [0, 2]. If one side
    has fewer classes, the missing ones are minus infinity there (``tasks.CrossTokenizer`` pads them). The gradient of
    an absolute difference is 0 where both are equal.

    Args:
        soft: weight of the distance.
        hard: weight of the cross entropy with the labels at temperature 1; with 0 no labels are needed.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; default: none, as published.
        temperature: a temperature policy, or a number for Static; None: Static(1.0), as published.

    Unlike in the released code, the distance is multiplied by T_s T_t, which is 1 with the published setting, and rows
    are aligned beforehand (released: position by position, whatever the tokens).

    Reference: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    2024, arXiv:2402.12030.
    """

    paper = "arXiv:2402.12030"
    up_to_order: ClassVar[bool] = True  # 0 for the teacher's probabilities in any order

    def __init__(
        self,
        *,
        soft: TermWeight = 1.0,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy("ULD", temperature, default=1.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        student, teacher = softened(rows, T)
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * T.scale * by_rank(teacher, student)}
        return self.with_hard(terms, rows)


class HybridULD(Method):
    """Hybrid ULD: exact * T_s T_t JSD over the tokens in both vocabularies + ranked * T_s T_t ULD over the other tokens
    + hard * cross entropy.

    The JSD is over ``matched`` + 1 outcomes, the last being any other token, so it is never negative, and 0 only if
    both sides agree on all of them. The other tokens are compared by rank, as in ``ULD``.

    Args:
        matched: number of leading classes that are the same token on both sides: ``tasks.CrossTokenizer(...).matched``.
        exact: weight of the divergence over the matched tokens.
        ranked: weight of the distance over the other tokens.
        hard: weight of the cross entropy with the labels at temperature 1; with 0 no labels are needed.
        beta: parameter of the JSD, as in ``objectives.jsd``; 0 is KL and 1 is reverse KL.
        warmup: fraction of the run over which ``exact`` and ``ranked`` rise linearly from 0.
        temperature: a temperature policy, or a number for Static; None: Static(1.0), as in the source.

    The source's divergence is over the matched tokens only, whose probabilities do not sum to 1 there, and its weights
    are the fraction of matched tokens in the teacher's vocabulary and 1 minus that fraction.

    Reference: TRL's GOLD trainer, "Unlocking On-Policy Distillation for Any Model Family", 2025; Boizard et al., 2024,
    arXiv:2402.12030, for the distance.
    """

    paper = "arXiv:2402.12030"
    up_to_order: ClassVar[bool] = False

    def __init__(
        self,
        *,
        matched: int,
        exact: TermWeight = 1.0,
        ranked: TermWeight = 1.0,
        hard: NonNegative = 1.0,
        beta: UnitInterval = 0.5,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        if matched < 0:
            raise ValueError(
                f"HybridULD needs matched >= 0, the number of classes that both sides have; got {matched!r}."
            )
        self.matched, self.exact, self.ranked, self.hard, self.beta = matched, exact, ranked, hard, beta
        self.warmup = warmup
        self.temperature = check_policy("HybridULD", temperature, default=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(matched=2)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        student, teacher = softened(rows, T)
        scale, m = linear_warmup(progress, self.warmup) * T.scale, self.matched
        terms = {
            "exact": self.exact * scale * self._jsd(folded(teacher, m), folded(student, m)),
            "ranked": self.ranked * scale * by_rank(teacher[:, m:], student[:, m:]),
        }
        return self.with_hard(terms, rows)

    def _jsd(self, p: Tensor, q: Tensor) -> Tensor:
        if self.beta in (0.0, 1.0):
            return divergence(p, q) if self.beta == 0.0 else divergence(q, p)
        middle = mixture(p, q, self.beta)
        return self.beta * divergence(p, middle) + (1.0 - self.beta) * divergence(q, middle)


def by_rank(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Return the sum of absolute differences of two sorted sets of probabilities, (N,), in [0, 2]."""
    p, q = (x.exp().sort(dim=-1, descending=True).values for x in (logp, logq))
    return (p - q).abs().sum(-1)


def folded(logp: Float[Tensor, "N C"], kept: int) -> Float[Tensor, "N K"]:
    """Merge all classes after the first ``kept`` into one, (N, min(kept, C) + 1); minus infinity if there are none."""
    others = logp[:, kept:]
    if not others.shape[1]:
        return torch.cat((logp, torch.full_like(logp[:, :1], -torch.inf)), 1)
    is_empty = torch.isneginf(others.amax(-1, keepdim=True))
    merged = torch.logsumexp(others.masked_fill(is_empty, 0.0), -1, keepdim=True).masked_fill(is_empty, -torch.inf)
    return torch.cat((logp[:, :kept], merged), 1)
