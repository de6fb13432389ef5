"""Asymmetric temperature scaling: a higher teacher temperature for the label than for the other classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.methods.logits.labeled import one_hot
from tempering.objectives import divergence, log_softmax, require_labels, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, Tau, TermWeight


class ATS(Method):
    """Asymmetric temperature scaling: soft * T_s T_t KL(softmax(u_y / correct, u_others / wrong) || student at T_s) +
    hard * cross entropy.

    A higher teacher temperature for the label than for the other classes keeps the differences between the other
    classes, which are small for a large, confident teacher. This is not a temperature policy, since a row has two
    teacher temperatures. The soft term is 0 on rows without a label.

    Args:
        soft: weight of the divergence, the code's lambda.
        hard: weight of the cross entropy, the code's 1 - lambda.
        correct: the teacher's temperature for the label, the paper's tau_1.
        wrong: the teacher's temperature for the other classes, the paper's tau_2.
        centered: subtract the mean over the classes from the teacher's logits first. Unlike softmax, this method is not
            invariant to shifts: u + c adds c / correct - c / wrong to the label's logit only. The released code does
            not center.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; published: none.
        temperature: a temperature policy for the student. The teacher's two temperatures are multiplied by its T_t
            divided by its reference tau. None: Static(1.0), as released.

    The value is the released cross entropy minus the teacher's entropy; the gradient is the same. The defaults are
    those of the authors' second release (CIFAR-100, ResNet-110 -> VGG-8); the paper sweeps both temperatures.

    Reference: Li et al., "Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again", NeurIPS 2022,
    arXiv:2210.04427.
    """

    paper = "arXiv:2210.04427"
    needs_labels = True
    zero_when_equal = False

    def __init__(
        self,
        *,
        soft: TermWeight = 0.5,
        hard: NonNegative = 0.5,
        correct: Tau = 4.0,
        wrong: Tau = 2.0,
        centered: bool = True,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.soft, self.hard, self.correct, self.wrong = soft, hard, correct, wrong
        self.centered, self.warmup = centered, warmup
        self.shift_invariant = centered  # pyright: ignore[reportAttributeAccessIssue]
        self.temperature = check_policy("ATS", temperature, default=1.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T, label = self.temperature(rows, progress), require_labels(rows, "ATS")
        teacher = log_softmax(self._scaled_logits(rows, label, T.teacher / self.temperature.tau))
        student = log_softmax(tempered(rows.student, T.student))
        scale = torch.where(label >= 0, T.scale, 0.0) * linear_warmup(progress, self.warmup)
        terms = {"soft": self.soft * scale * divergence(teacher, student)}
        return self.with_hard(terms, rows)

    def _scaled_logits(self, rows: Rows, label: Tensor, factor: Float[Tensor, "#N 1"]) -> Float[Tensor, "N C"]:
        """Return the teacher's logits divided by their two temperatures, each multiplied by ``factor``."""
        u = upcast_to_float32(rows.teacher)
        is_masked = torch.isneginf(u)
        u = u.masked_fill(is_masked, 0.0)
        if self.centered:
            mean = u.sum(1, keepdim=True) / (~is_masked).sum(1, keepdim=True).clamp_min(1)
            u = u - mean
        T = torch.where(one_hot(label, u), self.correct, self.wrong).to(u.dtype) * factor
        return (u / T).masked_fill(is_masked, -torch.inf)
