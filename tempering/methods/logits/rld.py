"""Refined logit distillation: the teacher's confidence, and its ranking of the classes below the label."""

from __future__ import annotations

import torch
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.methods.logits.dkd import split_target
from tempering.methods.logits.labeled import label_index, one_hot
from tempering.objectives import divergence, log_softmax, require_labels, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, Positive, RunFraction, TermWeight


class RLD(Method):
    """Refined logit distillation: sample * tau^2 KL of (top-1 or label, all others) + masked * T_s T_t KL of the
    classes below the label + hard * cross entropy.

    "sample" compares the teacher's pair (its top class, all others) with the student's pair (the label, all others), so
    a wrong teacher supervises the confidence but not the class. "masked" excludes every class whose teacher logit is at
    least that of the label, so the classes that the teacher wrongly ranks above it. Both are 0 on rows without a label.
    For a student equal to the teacher they are not 0 where the teacher is wrong.

    Args:
        sample: weight of sample confidence, the paper's alpha.
        masked: weight of masked correlation, the paper's beta.
        hard: weight of the cross entropy.
        tau: temperature of the pairs.
        warmup: fraction of the run over which ``sample`` and ``masked`` rise linearly from 0.
        temperature: a temperature policy for ``masked``; None: Static(4.0).

    The released code computes logarithms of sums of probabilities and masks with -1e9; see DKD for the consequences.

    Reference: Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv:2408.07703.
    """

    paper = "arXiv:2408.07703"
    needs_labels = True
    zero_when_equal = False

    def __init__(
        self,
        *,
        sample: TermWeight = 1.0,
        masked: TermWeight = 8.0,
        hard: NonNegative = 1.0,
        tau: Positive = 1.0,
        warmup: RunFraction = 20 / 240,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.sample, self.masked, self.hard, self.tau, self.warmup = sample, masked, hard, tau, warmup
        self.temperature = check_policy("RLD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T, label = self.temperature(rows, progress), require_labels(rows, "RLD")
        student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
        rise = torch.where(label >= 0, linear_warmup(progress, self.warmup), 0.0).to(student.dtype)
        pair_s, _ = split_target(student / self.tau, one_hot(label, student))
        pair_t, _ = split_target(teacher / self.tau, one_hot(teacher.argmax(1), teacher))
        above = teacher >= teacher.gather(1, label_index(label))
        # without a class of the teacher below the label there is nothing to compare, on either side
        above = above | (above | torch.isneginf(teacher)).all(-1, keepdim=True)
        below_s = log_softmax(tempered(student, T.student).masked_fill(above, -torch.inf))
        below_t = log_softmax(tempered(teacher, T.teacher).masked_fill(above, -torch.inf))
        terms = {
            "sample": self.sample * rise * self.tau**2 * divergence(pair_t, pair_s),
            "masked": self.masked * rise * T.scale * divergence(below_t, below_s),
        }
        return self.with_hard(terms, rows.replace(student=student))
