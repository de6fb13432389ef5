"""LD: where the teacher thinks a box's side may lie."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from tempering.methods.base import Method, check_policy, check_weights, zero_term
from tempering.objectives import cross_entropy, kl
from tempering.rows import Rows
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Weight

OTHER = ("classes", "images")  # a detector's blocks whose rows are no sides
BINS = 17  # of the released heads, whose reg_max is 16


class LD(Method):
    """soft * T_s T_t KL(teacher || student) over the bins of a box's side, plus hard * the task's own loss.

    A row is a side of an anchor's box, which a detector with binned boxes gives as the block "sides"; on its blocks of
    anchors and of images the divergence is 0. The rows' weights say which anchors count, and how much: those of the
    main region, and a valuable region beside it with the weight that the task gives it.

    Args:
        soft: weight of the divergence. The released code has 0.25 in both regions and takes the mean over its 17 bins,
            where we take the sum as everywhere: so 0.25 / 17. It also weighs an anchor by its class score.
        hard: weight of the task's own loss.
        temperature: any policy; None is Static(10.0), as released.

    Reference: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv:2102.12252.
    """

    paper = "arXiv:2102.12252"

    def __init__(
        self, *, soft: Annotated[float, Weight()] = 0.25 / BINS, hard: float = 1.0, temperature: Policy | None = None
    ) -> None:
        super().__init__()
        check_weights("LD", soft=soft, hard=hard)
        self.soft, self.hard = soft, hard
        self.temperature = check_policy("LD", Static(10.0) if temperature is None else temperature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        other = rows.name in OTHER
        terms = {"soft": zero_term(rows) if other else self.soft * kl(rows, self.temperature(rows, progress))}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms
