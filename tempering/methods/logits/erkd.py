"""Entropy-reweighted KD: weigh rows by the entropy of the teacher's prediction."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import divergence, entropy, softened
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, Positive, RunFraction, TermWeight


class ERKD(Method):
    """Entropy-reweighted KD: soft * H(teacher at tau) * T_s T_t KL(teacher || student) + hard * cross entropy, with the
    entropy H in nats, in [0, log C].

    Args:
        soft: weight of the divergence.
        hard: weight of the cross entropy.
        tau: temperature of the entropy, independent of the policy; default: 4, as released.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; published: none.
        temperature: a temperature policy, or a number for Static; None: Static(4.0).

    Reference: Su et al., "Knowledge From the Dark Side: Entropy-Reweighted Knowledge Distillation for Balanced
    Knowledge Transfer", 2023, arXiv:2311.13621 (version 1; later versions describe another method, EA-KD).
    """

    paper = "arXiv:2311.13621"

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        tau: Positive = 4.0,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.tau, self.warmup = soft, hard, tau, warmup
        self.temperature = check_policy("ERKD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        student, teacher = softened(rows, T)
        teacher_entropy = entropy(upcast_to_float32(rows.teacher) / self.tau).clamp_min(0.0)
        soft = self.soft * linear_warmup(progress, self.warmup)
        terms = {"soft": soft * teacher_entropy * T.scale * divergence(teacher, student)}
        return self.with_hard(terms, rows)
