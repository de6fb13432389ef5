"""A temperature per row and side that keeps the ratio of the largest logit to the temperature constant."""

from __future__ import annotations

import torch

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, mask_constants
from tempering.temperature.sharpness import statistics
from tempering.utils.search_space import Positive, Tau


class ConstantRatio(Policy):
    """T = tau * max(z) / peak per row and side, (N, 1), so that max(z) / T is peak / tau in every row.

    z are the logits minus their mean over the unmasked classes, so that a shift changes nothing. The entropy of a
    softened row is governed by this ratio: rows get labels of about the same softness, whatever the scale of their
    logits, and the student is not asked for the teacher's scale. Rows without spread get tau.

    Args:
        tau: temperature of a row whose largest logit is ``peak``.
        peak: a typical largest logit above the mean, of a trained teacher; about 12 on CIFAR-100.

    This is the part of CIST that the paper's abstract states. Its equations were not read, so these are open: whether
    the logits are centered, the ratio's value, whether both sides share it, and the weights of rows by the teacher's
    confidence and the student's difficulty, which this policy leaves out.

    Reference: Luong et al., "Consistently Informative Soft-Label Temperature for Knowledge Distillation", 2026,
    arXiv:2605.20357.
    """

    paper = "arXiv:2605.20357"

    def __init__(self, tau: Tau = 4.0, *, peak: Positive = 12.0) -> None:
        super().__init__()
        self.tau, self.peak = tau, peak

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        student, teacher = (statistics(mask_constants(upcast_to_float32(z))) for z in (rows.student, rows.teacher))
        is_constant = student.flat | teacher.flat
        sides = (torch.where(is_constant, self.tau, self.tau * side.top / self.peak) for side in (student, teacher))
        return Temperatures(*sides)
