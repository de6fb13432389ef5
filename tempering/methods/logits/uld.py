"""Universal logit distillation: probabilities compared by rank, for vocabularies that mean different tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, check_run_fraction, check_weights, linear_warmup
from tempering.objectives import check_fraction, cross_entropy, divergence, mixture, softened
from tempering.rows import Rows
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Weight


class ULD(Method):
    """soft * T_s T_t sum over ranks of |p_(i) - q_(i)| + hard * cross entropy, p and q sorted from their largest.

    The distance is 0 at agreement, and wherever the student has the teacher's probabilities in any order: it says how
    sure to be, never of what. So it needs ``hard``, or is one part of ``HybridULD``. Unscaled it lies in [0, 2]. Where
    one side has fewer classes the others are minus infinity there, ``tasks.CrossTokenizer`` sees to that. As with every
    distance of absolute values, its slope is 0 where two are equal.

    Args:
        soft: weight of the distance.
        hard: weight of the cross entropy with the labels at temperature 1; 0 needs no labels.
        temperature: any policy; None is Static(1.0), as published.
        warmup: share of the run over which ``soft`` rises linearly from 0; 0 for none, as published.

    Unlike the released code the distance is multiplied by T_s T_t, which is 1 at the published setting, and rows are
    aligned before it is asked (there: position by position, whatever stands there).

    Reference: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    2024, arXiv:2402.12030.
    """

    paper = "arXiv:2402.12030"
    up_to_order: ClassVar[bool] = True  # 0 for the teacher's probabilities in any order, not only at agreement

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight()] = 1.0,
        hard: float = 1.0,
        temperature: Policy | None = None,
        warmup: Annotated[float, Fraction()] = 0.0,
    ) -> None:
        super().__init__()
        check_weights("ULD", soft=soft, hard=hard)
        check_run_fraction("ULD", warmup=warmup)
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy("ULD", Static(1.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        student, teacher = softened(rows, T)
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * T.scale * by_rank(teacher, student)}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms


class HybridULD(Method):
    """exact * T_s T_t JSD over the tokens that both sides have + ranked * T_s T_t ULD over the others + hard * CE.

    The JSD is over ``matched`` + 1 outcomes, the last being any other token, so it is never negative and 0 only where
    the two agree on all of them. The others are compared by rank, as ``ULD`` does.

    Args:
        matched: so many classes, from the first on, mean the same on both sides: ``tasks.CrossTokenizer(...).matched``.
        exact: weight of the divergence over them.
        ranked: weight of the distance over the others.
        hard: weight of the cross entropy with the labels at temperature 1; 0 needs no labels.
        beta: of the JSD, as ``objectives.jsd`` has it, but for the ends 0 and 1, which are KL and reverse KL.
        temperature: any policy; None is Static(1.0), as in the source.
        warmup: share of the run over which ``exact`` and ``ranked`` rise linearly from 0.

    The source's divergence is over the matched tokens alone, which do not add up to 1 there, and its weights are the
    matched tokens' share of the teacher's vocabulary and what is left of 1.

    Reference: TRL's GOLD trainer, "Unlocking On-Policy Distillation for Any Model Family", 2025; Boizard et al., 2024,
    arXiv:2402.12030, for the distance.
    """

    paper = "arXiv:2402.12030"
    up_to_order: ClassVar[bool] = False

    def __init__(
        self,
        *,
        matched: int,
        exact: Annotated[float, Weight()] = 1.0,
        ranked: Annotated[float, Weight()] = 1.0,
        hard: float = 1.0,
        beta: float = 0.5,
        temperature: Policy | None = None,
        warmup: Annotated[float, Fraction()] = 0.0,
    ) -> None:
        super().__init__()
        check_weights("HybridULD", exact=exact, ranked=ranked, hard=hard)
        check_run_fraction("HybridULD", warmup=warmup)
        check_fraction("HybridULD", beta=beta)
        if matched < 0:
            raise ValueError(f"HybridULD needs matched >= 0, the classes that both sides have; got {matched!r}.")
        self.matched, self.exact, self.ranked, self.hard, self.beta = matched, exact, ranked, hard, beta
        self.warmup = warmup
        self.temperature = check_policy("HybridULD", Static(1.0) if temperature is None else temperature)

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
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms

    def _jsd(self, p: Tensor, q: Tensor) -> Tensor:
        if self.beta in (0.0, 1.0):
            return divergence(p, q) if self.beta == 0.0 else divergence(q, p)
        middle = mixture(p, q, self.beta)
        return self.beta * divergence(p, middle) + (1.0 - self.beta) * divergence(q, middle)


def by_rank(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """The sum of absolute differences of two sets of probabilities, each sorted from its largest, (N,), in [0, 2]."""
    p, q = (x.exp().sort(dim=-1, descending=True).values for x in (logp, logq))
    return (p - q).abs().sum(-1)


def folded(logp: Float[Tensor, "N C"], kept: int) -> Float[Tensor, "N K"]:
    """The first ``kept`` classes and one bucket of all others, (N, min(kept, C) + 1), minus infinity if empty."""
    others = logp[:, kept:]
    if not others.shape[1]:
        return torch.cat((logp, torch.full_like(logp[:, :1], -torch.inf)), 1)
    none = torch.isneginf(others.amax(-1, keepdim=True))
    rest = torch.logsumexp(others.masked_fill(none, 0.0), -1, keepdim=True).masked_fill(none, -torch.inf)
    return torch.cat((logp[:, :kept], rest), 1)
