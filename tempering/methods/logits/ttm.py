"""Transformed teacher matching: apply the temperature to the teacher only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import divergence, log_softmax, masked, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class TTM(Method):
    """Transformed teacher matching: soft * KL(p_t^gamma, normalized || p_s) + hard * cross entropy, with gamma = 1 /
    T_t and the student at temperature 1.

    The power of a softmax is a softmax at temperature 1 / gamma, so this is KD without the student's temperature. That
    equals KD plus a Renyi entropy of the student as regularizer. The divergence is not multiplied by T^2, since the
    student is not softened. The gradient is not 0 for a student equal to the teacher, unless T is 1.

    Args:
        soft: weight of the divergence, the paper's beta.
        hard: weight of the cross entropy.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; published: none.
        temperature: a temperature policy; only its teacher temperatures are used. None: Static(10.0), gamma = 0.1.

    The defaults are those of resnet32x4 -> resnet8x4; see the presets in docs/papers.md for other pairs.

    Reference: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
    arXiv:2402.11148, equations 2 and 7.
    """

    paper = "arXiv:2402.11148"
    zero_when_equal = False

    def __init__(
        self,
        *,
        soft: TermWeight = 100.0,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 0.0,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy(type(self).__name__, temperature, default=10.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress).teacher
        matched = divergence(log_softmax(tempered(rows.teacher, T)), log_softmax(rows.student))
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * self.weigh(rows, T) * matched}
        return self.with_hard(terms, rows)

    def weigh(self, rows: Rows, T: Float[Tensor, "#N 1"]) -> Tensor | float:
        """Return the factor of each row's divergence."""
        return 1.0


class WTTM(TTM):
    """Weighted TTM: each row's divergence is multiplied by U = sum of p_t^gamma, (N,), larger for smoother teachers.

    U is in [1, C^(1 - gamma)] for gamma < 1. It is computed as exp(LSE(u / T) - LSE(u) / T).

    Args:
        soft: weight of the divergence, the paper's beta.
        hard: weight of the cross entropy.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; published: none.
        temperature: a temperature policy; only its teacher temperatures are used. None: Static(10.0), gamma = 0.1.

    The defaults are those of resnet32x4 -> resnet8x4; see the presets in docs/papers.md for other pairs.

    Reference: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
    arXiv:2402.11148, section 4.
    """

    def __init__(
        self,
        *,
        soft: TermWeight = 3.0,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 0.0,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__(soft=soft, hard=hard, warmup=warmup, temperature=temperature)

    def weigh(self, rows: Rows, T: Float[Tensor, "#N 1"]) -> Tensor:
        u = masked(upcast_to_float32(rows.teacher))
        return (torch.logsumexp(tempered(u, T), -1) - torch.logsumexp(u, -1) / T.squeeze(-1)).exp()
