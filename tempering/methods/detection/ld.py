"""Localization distillation: match the teacher's distributions of the sides of boxes."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import Method, check_policy, zero_term
from tempering.objectives import kl
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, TermWeight

OTHER = ("classes", "images")  # a detector's blocks whose rows are not sides of boxes
BINS = 17  # number of bins of the released heads, whose reg_max is 16


class LD(Method):
    """Localization distillation: soft * T_s T_t KL(teacher || student) over the bins of a box's side, plus hard * the
    task's own loss.

    A row is one side of an anchor's box; detectors with binned boxes provide these rows as the block "sides". On the
    blocks of anchors and of images the divergence is 0. The rows' weights select the anchors: those of the main region,
    and those of the valuable localization region with the weight that the task gives them.

    Args:
        soft: weight of the divergence. The released code has 0.25 in both regions and takes the mean over its 17 bins,
            while this is the sum over bins, so the default is 0.25 / 17. It also weighs an anchor by its class score.
        hard: weight of the task's own loss.
        temperature: a temperature policy, or a number for Static; None: Static(10.0), as released.

    Reference: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252.
    """

    paper = "arXiv:2102.12252"

    def __init__(
        self, *, soft: TermWeight = 0.25 / BINS, hard: NonNegative = 1.0, temperature: PolicyLike = None
    ) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        self.temperature = check_policy("LD", temperature, default=10.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        other = rows.name in OTHER
        terms = {"soft": zero_term(rows) if other else self.soft * kl(rows, self.temperature(rows, progress))}
        return self.with_hard(terms, rows)
