"""Distillation with other divergences than KL, with any temperature policy."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from tempering import objectives
from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.methods.logits._sampled import reference_term
from tempering.objectives import check_skew
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight, UnitInterval

Objective = Literal["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd"]


class Divergence(Method):
    """KD with a choice of divergence: soft * T_s T_t D(teacher, student) + hard * cross entropy, with the divergences
    used to distill language models.

    Args:
        objective: name of a function of ``tempering.objectives``; "kl" is KD.
        soft: weight of the divergence.
        hard: weight of the cross entropy with the labels at temperature 1; with 0 no labels are needed.
        beta: parameter of "jsd": 0 is "kl", 1 is "reverse_kl" (discontinuous at both, as in the source).
        skew: parameter of "skew_kl" and "skew_reverse_kl".
        head: parameter of "adaptive_kl".
        warmup: fraction of the run over which ``soft`` rises linearly from 0; default: none, as published.
        student_top: compare the student's likeliest classes alone, this many, with all others as one; 0: all classes.
        reference: weight of the term "reference", KL(student || reference) at temperature 1, with
            ``teachers.WithReference``, such as the initial student.
        temperature: a temperature policy, or a number for Static; None: Static(1.0), as in the sources.

    Unlike in the released trainers (GKD, DistiLLM), the divergence is multiplied by T_s T_t, which is 1 with their
    settings.

    Reference: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv:2306.13649, for "jsd"; see
    ``tempering.objectives`` for the others.
    """

    paper = "arXiv:2306.13649"

    def __init__(
        self,
        *,
        objective: Objective = "jsd",
        soft: TermWeight = 1.0,
        hard: NonNegative = 0.0,
        beta: UnitInterval = 0.5,
        skew: float = 0.1,
        head: UnitInterval = 0.5,
        warmup: RunFraction = 0.0,
        student_top: int = 0,
        reference: NonNegative = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        if student_top < 0:
            raise ValueError(f"Divergence needs student_top >= 0; got {student_top!r}.")
        if objective not in get_args(Objective):
            raise ValueError(
                f"Divergence needs objective {', '.join(map(repr, get_args(Objective)))}; got {objective!r}."
            )
        check_skew("Divergence", skew)
        self.objective, self.soft, self.hard, self.warmup = objective, soft, hard, warmup
        self.beta, self.skew, self.head = beta, skew, head
        self.student_top, self.reference = student_top, reference
        self.temperature = check_policy("Divergence", temperature, default=1.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        parameters = {
            "jsd": {"beta": self.beta},
            "skew_kl": {"skew": self.skew},
            "skew_reverse_kl": {"skew": self.skew},
            "adaptive_kl": {"head": self.head},
        }
        compared = objectives.on_student_top_k(rows, T, self.student_top) if self.student_top else (rows, T)
        value = getattr(objectives, self.objective)(*compared, **parameters.get(self.objective, {}))
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * value}
        return self.with_hard(terms | reference_term(rows, self.reference, "Divergence"), rows)
