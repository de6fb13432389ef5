"""Dynamic temperature KD: the released objective with any temperature policy."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import kl
from tempering.rows import Rows
from tempering.temperature.base import Policy, Temperatures, constant
from tempering.temperature.sharpness import Sharpness
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class DTKD(Method):
    """Dynamic temperature KD: ramp * (dynamic * T_s T_t KL at the policy's temperatures + soft * tau^2 KL at tau) +
    hard * cross entropy, with ramp the linear warm-up.

    Args:
        dynamic: weight of the divergence at the policy's temperatures (the paper's alpha).
        soft: weight of plain KD at the policy's reference temperature (the paper's beta).
        hard: weight of the cross entropy (the paper's gamma).
        warmup: fraction of the run over which the two soft terms rise linearly from 0; published: 20 of 240 epochs.
        temperature: a temperature policy; None: Sharpness(4.0), the exact solution. ``Sharpness(4.0,
            solve="published", differentiable=True)`` is the released code without its divisions by zero.

    The dynamic term does not supervise the student's overall scale (it is 0 for v = c u, any c > 0); plain KD and the
    labels do, so use it with at least one of them. Its total soft weight is ``dynamic + soft``: compare it with
    ``KD(soft=dynamic + soft, hard=hard, warmup=warmup)``, since part of the published gain may come from the weights.

    Reference: Wei & Bai, "Dynamic Temperature Knowledge Distillation", 2024, arXiv:2404.12711, equation 6, with the
    weights and the warm-up of the released code for resnet32x4 -> resnet8x4.
    """

    paper = "arXiv:2404.12711"

    def __init__(
        self,
        *,
        dynamic: TermWeight = 3.0,
        soft: TermWeight = 1.0,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 20 / 240,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        self.dynamic, self.soft, self.hard, self.warmup = dynamic, soft, hard, warmup
        self.temperature = check_policy(
            "DTKD", Sharpness(4.0) if temperature is None else temperature, allow_number=False
        )

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise = linear_warmup(progress, self.warmup)
        T = self.temperature(rows, progress)
        terms = {"dynamic": self.dynamic * rise * kl(rows, T)}
        if self.soft:
            tau = constant(self.temperature.reference_at(progress), rows.student)
            terms["soft"] = self.soft * rise * kl(rows, Temperatures(tau, tau))
        return self.with_hard(terms, rows)
