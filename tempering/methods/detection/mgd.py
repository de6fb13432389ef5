"""MGD: from a part of its map the student makes the whole of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from tempering.methods.base import step_seed
from tempering.methods.detection.base import NeckMethod, over_levels, summed
from tempering.rows import Rows
from tempering.utils.search_space import Weight

WHOLE = 2**63
STRIDE = 0x9E3779B97F4A7C15  # odd: no two ids fall together


class MGD(NeckMethod):
    """feature * sum (G(m F_s) - F_t)^2 over positions, channels and levels, plus hard * the task's own loss.

    m leaves out a share ``masked`` of the positions, anew at every call; G is 3x3 convolution - ReLU - 3x3 convolution,
    one a level, trained along. The sum is an image's own; ``total`` takes the mean over images, which is the released
    code's sum / N.

    Each image's mask is drawn by its id (its place, where rows have no ids) and the step's own number, which all parts
    and processes of a step of ``distill`` share; in a loop of one's own torch's generator draws it. So a run that is
    taken up again, or shared out to processes, draws the same masks. The released code draws by each process.

    Args:
        feature: weight; the released value of RetinaNet.
        hard: weight of the task's own loss.
        masked: probability that a position is left out.
        names: which features; () for the levels "p0", "p1", ....

    Reference: Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529.
    """

    paper = "arXiv:2205.01529"
    zero_when_equal = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self,
        *,
        feature: Annotated[float, Weight()] = 2e-5,
        hard: float = 1.0,
        masked: float = 0.65,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if not 0.0 <= masked <= 1.0:
            raise ValueError(f"MGD needs masked in [0, 1], the share of positions left out; got {masked!r}.")
        self.masked = masked
        self.generators = nn.ModuleList()

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        self.generators.extend(generator(t.shape[1]) for _, t in pairs)
        return super().build(pairs)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        draws = self._draws(rows)
        errors = []
        for generate, (s, t) in zip(self.generators, self.aligned(pairs), strict=True):
            size = (1, t.shape[-2], t.shape[-1])
            kept = torch.stack([torch.rand(size, generator=draw) >= self.masked for draw in draws]).to(s.device)
            errors.append(summed((generate(s * kept) - t).square()))
        return over_levels(errors)

    def _draws(self, rows: Rows) -> list[torch.Generator]:
        """A generator for each row of weight > 0."""
        ids = torch.arange(len(rows)) if rows.ids is None else rows.ids.cpu()
        kept = ids if rows.weight is None else ids[(rows.weight > 0).cpu()]
        if rows.ids is None:
            kept = torch.arange(len(kept))
        number = step_seed()
        return [torch.Generator().manual_seed((number + STRIDE * (1 + i)) % WHOLE) for i in kept.tolist()]


def generator(channels: int) -> nn.Sequential:
    """From a map with holes to a whole one."""
    convolutions = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2)]
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])
