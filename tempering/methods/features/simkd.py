"""SimKD: match the teacher's last feature map and reuse the teacher's classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import FeatureMethod, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class SimKD(FeatureMethod):
    """SimKD: feature * mean squared error of the student's projected map and the teacher's map; no labels, no logits.

    The student is a ``ReusedHead``, which contains the projector because inference needs it.

    Reference: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv:2203.14001,
    equation 2.
    """

    paper = "arXiv:2203.14001"
    relational = False

    def __init__(self, *, feature: TermWeight = 1.0, hard: NonNegative = 0.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        errors = [per_row(F.mse_loss(s, t, reduction="none")) for s, t in pairs]
        return sum(errors[1:], errors[0])


class ReusedHead(nn.Module):
    """A student's backbone, a bottleneck projector (feature "projector"), and the teacher's frozen classifier.

    The projector keeps the spatial size of the student's map, and the teacher's map must have that size; the released
    code average-pools the larger of the two.

    Args:
        trunk: the backbone: inputs -> map (N, channels, H, W).
        student, teacher: channels of the last maps of the backbone and of the teacher.
        head: the teacher's classifier of pooled features.
        factor: reduction of the teacher's channels in the bottleneck.
    """

    def __init__(self, trunk: nn.Module, student: int, teacher: int, head: nn.Module, *, factor: int = 2) -> None:
        super().__init__()
        narrow = max(1, teacher // factor)
        self.trunk = trunk
        self.projector = nn.Sequential(
            nn.Conv2d(student, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, narrow, 3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, teacher, 1, bias=False),
            nn.BatchNorm2d(teacher),
            nn.ReLU(),
        )
        self.head = head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projector(self.trunk(x)).mean((2, 3)))
