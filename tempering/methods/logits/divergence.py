"""Any divergence in the place of Hinton's, with any temperature policy."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from torch import Tensor

from tempering import objectives
from tempering.methods.base import Method, check_policy, check_run_fraction, check_weights, linear_warmup
from tempering.objectives import check_fraction, check_skew
from tempering.rows import Rows
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Weight

Objective = Literal["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd"]


class Divergence(Method):
    """soft * T_s T_t D(teacher, student) + hard * cross entropy, for the D that language models are distilled by.

    Args:
        objective: the function of ``tempering.objectives``; "kl" is KD.
        soft: weight of the divergence.
        hard: weight of the cross entropy with the labels at temperature 1; 0 needs no labels.
        beta: of "jsd": 0 is "kl", 1 is "reverse_kl" (the value jumps there, as in the source).
        skew: of "skew_kl" and "skew_reverse_kl".
        head: of "adaptive_kl".
        temperature: any policy; None is Static(1.0), as the sources have it.
        warmup: share of the run over which ``soft`` rises linearly from 0; 0 for none, as published.

    Unlike the released trainers (GKD, DistiLLM) the divergence is multiplied by T_s T_t, which is 1 at their setting.

    Reference: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv:2306.13649, for "jsd"; the
    others as ``tempering.objectives`` says.
    """

    paper = "arXiv:2306.13649"

    def __init__(
        self,
        *,
        objective: Objective = "jsd",
        soft: Annotated[float, Weight()] = 1.0,
        hard: float = 0.0,
        beta: float = 0.5,
        skew: float = 0.1,
        head: float = 0.5,
        temperature: Policy | None = None,
        warmup: Annotated[float, Fraction()] = 0.0,
    ) -> None:
        super().__init__()
        if objective not in get_args(Objective):
            raise ValueError(
                f"Divergence needs objective {', '.join(map(repr, get_args(Objective)))}; got {objective!r}."
            )
        check_weights("Divergence", soft=soft, hard=hard)
        check_run_fraction("Divergence", warmup=warmup)
        check_fraction("Divergence", beta=beta, head=head)
        check_skew("Divergence", skew)
        self.objective, self.soft, self.hard, self.warmup = objective, soft, hard, warmup
        self.beta, self.skew, self.head = beta, skew, head
        self.temperature = check_policy("Divergence", Static(1.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        own = {
            "jsd": {"beta": self.beta},
            "skew_kl": {"skew": self.skew},
            "skew_reverse_kl": {"skew": self.skew},
            "adaptive_kl": {"head": self.head},
        }
        value = getattr(objectives, self.objective)(rows, T, **own.get(self.objective, {}))
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * value}
        if self.hard:
            terms["hard"] = self.hard * objectives.cross_entropy(rows)
        return terms
