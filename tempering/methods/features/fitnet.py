"""FitNet: regress the student's intermediate features onto the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import Projected, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class FitNet(Projected):
    """FitNet hints: feature * mean squared error of regressor(student map) and teacher map, summed over the pairs.

    The regressor is a convolution to the teacher's channels and size (1x1; 3x3 with stride 2; transposed with stride 2;
    or without padding), batch norm and ReLU, as in mdistiller. Batch norm makes a row depend on its block.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, equation 3.
    """

    paper = "arXiv:1412.6550"

    def __init__(self, *, feature: TermWeight = 100.0, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)

    def usual(self, stages: Sequence[str]) -> tuple[str, ...]:
        return tuple(stages[len(stages) // 2 :][:1])  # the middle stage, as in published tables

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [regressor(s, t) for s, t in pairs]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        errors = [
            per_row(F.mse_loss(project(s), t, reduction="none"))
            for project, (s, t) in zip(self.projectors, pairs, strict=True)
        ]
        return sum(errors[1:], errors[0])


def regressor(s: Tensor, t: Tensor) -> nn.Sequential:
    """Create a convolution, batch norm and ReLU from maps like ``s`` to maps like ``t``.

    Raises:
        ValueError: if the teacher's map is larger, but not by a factor of two.
    """
    channels, size_s, size_t = (s.shape[1], t.shape[1]), s.shape[2], t.shape[2]
    if size_s == size_t:
        conv: nn.Module = nn.Conv2d(*channels, kernel_size=1)
    elif size_s == 2 * size_t:
        conv = nn.Conv2d(*channels, kernel_size=3, stride=2, padding=1)
    elif 2 * size_s == size_t:
        conv = nn.ConvTranspose2d(*channels, kernel_size=4, stride=2, padding=1)
    elif size_s > size_t:
        conv = nn.Conv2d(*channels, kernel_size=1 + size_s - size_t)
    else:
        raise ValueError(f"no regressor from a {size_s} x {size_s} map to {size_t} x {size_t}; tap a larger stage.")
    return nn.Sequential(conv, nn.BatchNorm2d(channels[1]), nn.ReLU())
