"""Channel-wise distillation: match each channel's distribution over positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tempering.methods.detection.base import NeckMethod, over_levels
from tempering.objectives import divergence
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, Positive, TermWeight


class CWD(NeckMethod):
    """Channel-wise distillation: feature * tau^2 KL(softmax over positions of F_t / tau || softmax over positions of
    F_s / tau), averaged over channels, summed over levels, plus hard * the task's own loss.

    The released code's sum / (C N) is the mean of this term over images, as computed by ``total``.

    Args:
        feature: weight; released for detectors' necks: 10 per level at tau = 1.
        hard: weight of the task's own loss.
        tau: temperature over an image's positions, a number: rows are images here, so there is no temperature policy.
        names: feature names; () for the levels "p0", "p1", ....

    Reference: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256;
    values as in open-mmlab/mmrazor.
    """

    paper = "arXiv:2011.13256"

    def __init__(
        self, *, feature: TermWeight = 10.0, hard: NonNegative = 1.0, tau: Positive = 1.0, names: Sequence[str] = ()
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.tau = tau

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        divergences: list[Tensor] = []
        for s, t in self.aligned(pairs):
            student, teacher = ((x.flatten(2) / self.tau).log_softmax(-1).flatten(0, 1) for x in (s, t))
            divergences.append(self.tau**2 * divergence(teacher, student).view(len(t), -1).mean(1))
        return over_levels(divergences)
