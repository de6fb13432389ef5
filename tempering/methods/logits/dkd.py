"""Decoupled KD: separate weights for the target class and the non-target classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import divergence, log_softmax, masked, require_labels, tempered
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class DKD(Method):
    """Decoupled KD: target * TCKD + non_target * NCKD + hard * cross entropy, with TCKD and NCKD multiplied by T_s T_t.

    TCKD is the KL divergence of (p(target), 1 - p(target)), NCKD the KL divergence of the softmaxes over the other
    classes. Both are 0 on rows without a label. ``DKD(non_target=0.0)`` distills the target class only,
    ``DKD(target=0.0)`` the non-target classes only.

    Args:
        target: weight of TCKD (the paper's alpha).
        non_target: weight of NCKD (the paper's beta).
        hard: weight of the cross entropy.
        warmup: fraction of the run over which ``target`` and ``non_target`` rise linearly from 0; published for
            CIFAR-100: 20 of 240 epochs.
        temperature: a temperature policy; None: Static(4.0). With Sharpness this is DTKD applied to DKD: temperatures
            are computed from the full logits, and each row of both terms is multiplied by its T_s T_t.

    The released code computes log(sum of softmax) and masks the target with -1000, which is infinite once the margin
    over T exceeds about 104 in float32 (18 in float16). Here log(1 - p(target)) is a difference of logsumexps and the
    target is excluded exactly; both agree where the released value is finite.

    Reference: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, equations 3 to 7.
    """

    paper = "arXiv:2203.08679"
    needs_labels = True

    def __init__(
        self,
        *,
        target: TermWeight = 1.0,
        non_target: TermWeight = 8.0,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 20 / 240,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.target, self.non_target, self.hard, self.warmup = target, non_target, hard, warmup
        self.temperature = check_policy("DKD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        label = require_labels(rows, "DKD")
        is_target = torch.zeros_like(rows.student, dtype=torch.bool)
        is_target.scatter_(1, label.clamp_min(0).unsqueeze(1).long(), True)
        pair_s, others_s = split_target(tempered(rows.student, T.student), is_target)
        pair_t, others_t = split_target(tempered(rows.teacher, T.teacher), is_target)
        # a teacher that masks all other classes says nothing of them
        others_s = torch.where(torch.isneginf(pair_t[:, 1:]), others_t, others_s)
        scale = torch.where(label >= 0, T.scale, 0.0) * linear_warmup(progress, self.warmup)
        terms = {
            "target": self.target * scale * divergence(pair_t, pair_s),
            "non_target": self.non_target * scale * divergence(others_t, others_s),
        }
        return self.with_hard(terms, rows)


def split_target(z: Float[Tensor, "N C"], is_target: Tensor) -> tuple[Float[Tensor, "N 2"], Float[Tensor, "N C"]]:
    """Return log-probabilities of (target, any other class), and of the other classes with minus infinity at the
    target.

    If all other classes are masked, the pair is (0, -inf) and the other classes are uniform: both divergences are 0.
    """
    z = masked(z)
    others = z.masked_fill(is_target, -torch.inf)
    no_others = torch.isneginf(others.amax(-1, keepdim=True)) if z.shape[-1] else is_target
    log_others = torch.logsumexp(others.masked_fill(no_others, 0.0), -1, keepdim=True)
    log_others = log_others.masked_fill(no_others, -torch.inf)
    log_target = z.masked_fill(~is_target, -torch.inf).amax(-1, keepdim=True)
    pair = log_softmax(torch.cat((log_target, log_others), -1))
    return pair, log_softmax(others)
