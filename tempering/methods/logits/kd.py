"""Knowledge distillation (Hinton et al.) with any temperature policy."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import kl
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class KD(Method):
    """Knowledge distillation: soft * T_s T_t KL(teacher || student) + hard * cross entropy.

    Args:
        soft: weight of the divergence.
        hard: weight of the cross entropy with the labels at temperature 1; with 0 no labels are needed.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; default: none, as published.
        temperature: a temperature policy, or a number for Static; None: Static(4.0).

    The defaults 0.9 and 0.1 at T = 4 are those of mdistiller for CIFAR-100.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.
    """

    paper = "arXiv:1503.02531"

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy("KD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * kl(rows, T)}
        return self.with_hard(terms, rows)
