"""Masked generative distillation: generate the teacher's map from the student's masked map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tempering.methods.base import step_seed
from tempering.methods.detection.base import NeckMethod, over_levels, summed
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight
from tempering.utils.tensors import on_host

MODULUS = 2**63
STRIDE = 0x9E3779B97F4A7C15  # odd, so that different ids give different seeds


class MGD(NeckMethod):
    """Masked generative distillation: feature * sum (G(m F_s) - F_t)^2 over positions, channels and levels, plus hard *
    the task's own loss.

    m masks a random fraction ``masked`` of the positions, drawn at every call; G is 3x3 convolution - ReLU - 3x3
    convolution, one trained per level. The sum is per image; ``total`` computes the mean over images, which is the
    released code's sum / N.

    Each image's mask is seeded by its id (its index, if rows have no ids) and the seed of the step, which all
    micro-batches and processes of a step of ``distill`` share; in a custom training loop, torch's generator draws it.
    So resumed and distributed runs draw the same masks. The released code draws masks in each process.

    Args:
        feature: weight; default: the released value for RetinaNet.
        hard: weight of the task's own loss.
        masked: probability that a position is masked.
        names: feature names; () for the levels "p0", "p1", ....

    Reference: Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529.
    """

    paper = "arXiv:2205.01529"
    zero_when_equal = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self, *, feature: TermWeight = 2e-5, hard: NonNegative = 1.0, masked: float = 0.65, names: Sequence[str] = ()
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if not 0.0 <= masked <= 1.0:
            raise ValueError(f"MGD needs masked in [0, 1], the fraction of positions to mask; got {masked!r}.")
        self.masked = masked
        self.generators = nn.ModuleList()

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        self.generators.extend(generator(t.shape[1]) for _, t in pairs)
        return super().build(pairs)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        generators = self._draws(rows)
        errors: list[Tensor] = []
        for generate, (s, t) in zip(self.generators, self.aligned(pairs), strict=True):
            size = (1, t.shape[-2], t.shape[-1])
            kept = torch.stack([torch.rand(size, generator=g) >= self.masked for g in generators])
            kept = kept.to(s.device, non_blocking=True)
            errors.append(summed((generate(s * kept) - t).square()))
        return over_levels(errors)

    def _draws(self, rows: Rows) -> list[torch.Generator]:
        """Return a seeded generator for each row of weight > 0."""
        ids = torch.arange(len(rows)) if rows.ids is None else on_host(rows.ids).cpu()
        kept = ids if rows.weight is None else ids[(rows.weight > 0).cpu()]
        if rows.ids is None:
            kept = torch.arange(len(kept))
        seed = step_seed()
        return [torch.Generator().manual_seed((seed + STRIDE * (1 + int(i))) % MODULUS) for i in kept]


def generator(channels: int) -> nn.Sequential:
    """Create the generation block: 3x3 convolution - ReLU - 3x3 convolution."""
    convolutions = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2)]
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])
