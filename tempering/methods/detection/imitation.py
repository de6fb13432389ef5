"""Neck feature distillation: match the teacher's maps, optionally weighted by the teacher's class scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tempering.methods.detection.base import NeckMethod, over_levels, summed
from tempering.methods.features.base import per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class Imitation(NeckMethod):
    """Neck feature distillation: feature * sum a (P(F_s) - F_t)^2 / (C sum a) over channels and positions, summed over
    levels, plus hard * the task's own loss.

    By default a = 1, the mean squared error of FitNet, with P a 1x1 convolution if the channels differ. With
    ``scored``, a is the teacher's largest class probability at the position, and P is 1x1 convolution - ReLU - 1x1
    convolution at every level, as in Ultralytics' distillation. There the two sums run over the batch and their
    quotient is multiplied by the batch size; here both are per image, so that the term does not depend on the batch.
    Both forms are means over positions, so the weight is independent of the size of the maps.

    Args:
        feature: weight; default: 6, as in Ultralytics; for the form without scores it is our choice.
        hard: weight of the task's own loss.
        scored: whether to weigh positions by scores. The scores are the feature "scores": (N, A), the anchors of all
            levels concatenated, position by position.
        names: feature names; () for the levels "p0", "p1", ....

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, equation 3; the scored
    form has no paper, and is that of Ultralytics 8.4.
    """

    paper = "arXiv:1412.6550"

    def __init__(
        self, *, feature: TermWeight = 6.0, hard: NonNegative = 1.0, scored: bool = False, names: Sequence[str] = ()
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        self.scored = scored

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        return [perceptron(s.shape[1], t.shape[1]) for s, t in pairs] if self.scored else super().build(pairs)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        errors = [(s - t).square().mean(1) for s, t in self.aligned(pairs)]
        if not self.scored:
            return over_levels([per_row(e) for e in errors])
        scores = self._scores(rows, errors)
        return over_levels([summed(a * e) / summed(a).clamp_min(1e-12) for a, e in zip(scores, errors, strict=True)])

    def _scores(self, rows: Rows, errors: Sequence[Tensor]) -> list[Tensor]:
        """Return the maximum score at each position of each level, of the shape of its errors (N, H, W)."""
        scores = self.teacher_feature(rows, "scores", "the teacher's scores")
        cells = [math.prod(e.shape[1:]) for e in errors]
        anchors, rest = divmod(scores.shape[1], sum(cells))
        if rest or not anchors:
            raise ValueError(
                f"Imitation(scored=True) needs the same number of anchors at each of {sum(cells)} positions; got "
                f"{scores.shape[1]} scores. Queries have no position: use scored=False."
            )
        levels = torch.split(scores.clamp_min(0), [anchors * c for c in cells], 1)
        return [x.view(len(x), -1, anchors).amax(-1).view_as(e) for x, e in zip(levels, errors, strict=True)]


def perceptron(s: int, t: int) -> nn.Sequential:
    """Create a two-layer network of 1x1 convolutions from s to t channels."""
    return nn.Sequential(nn.Conv2d(s, t, kernel_size=1), nn.ReLU(), nn.Conv2d(t, t, kernel_size=1))
