"""The spectrum of images: how much of them is structure, and how much detail."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOW = 60  # side of the centered square of low frequencies, in the released figures
CELLS = 24  # of a figure's side
LEAST = 1e-8  # no image in bytes has a magnitude as small as that


def spectrum(images: Iterable[Float[Tensor, "C H W"]], *, low: int = LOW, bins: int = 32) -> dict[str, Any]:
    """What frequencies the images hold, each channel by itself, JSON-able; nothing is said of their means.

    Images may differ in size; each is looked at in its own frequencies, in cycles a pixel.

    Args:
        images: in [0, 1].
        low: side in frequencies of the centered square that counts as low; half the side, where an image has fewer than
            twice as many.
        bins: of the profile.

    Returns:
        images: how many; frequency: the middles of ``bins`` rings up to 0.5 cycles a pixel; profile: the logarithm of
        the mean magnitude in each ring, None in an empty one; low, high: shares of the power within and outside the
        square, which add up to 1; map: the mean log-magnitude on a square grid, 24 x 24, low frequencies in the middle.

    Raises:
        ValueError: for no images, or options that are not positive.

    Reference: Liang et al., 2022, arXiv:2209.09841, whose figures show such maps.
    """
    if low < 1 or bins < 1:
        raise ValueError(f"spectrum() needs low >= 1 and bins >= 1; got {low!r} and {bins!r}.")
    maps, sums = torch.zeros(CELLS, CELLS, dtype=torch.float64), torch.zeros(bins + 1).double()
    weighed, inside, n = torch.zeros(bins + 1).double(), 0.0, 0
    for image in images:
        height, width = image.shape[-2:]
        centered = image.double().cpu() - image.double().cpu().mean((-2, -1), keepdim=True)
        magnitude = torch.fft.fftshift(torch.fft.fft2(centered, norm="ortho"), dim=(-2, -1)).abs()
        level = (magnitude + LEAST).log().mean(0)
        power = magnitude.square().sum(0)
        y, x = (torch.fft.fftshift(torch.fft.fftfreq(side)).double() for side in (height, width))
        ring = ((y[:, None].square() + x.square()).sqrt() / 0.5 * bins).long().clamp_max(bins)
        there = ring.new_ones(ring.shape, dtype=torch.float64)
        there[height // 2, width // 2] = 0.0  # the mean, which was taken away
        sums.index_add_(0, ring.flatten(), (magnitude.mean(0) * there).flatten())
        weighed.index_add_(0, ring.flatten(), there.flatten())
        square = _square(height, low)[:, None] & _square(width, low)
        inside += float(power[square].sum() / power.sum()) if power.sum() > 0 else 1.0
        maps += F.adaptive_avg_pool2d(level[None], (CELLS, CELLS))[0]
        n += 1
    if not n:
        raise ValueError("spectrum() got no images.")
    profile = [math.log(s / c + LEAST) if c else None for s, c in zip(sums.tolist(), weighed.tolist(), strict=True)]
    return {
        "images": n,
        "frequency": [0.5 * (i + 0.5) / bins for i in range(bins)],
        "profile": profile[:bins],
        "low": inside / n,
        "high": 1.0 - inside / n,
        "map": (maps / n).tolist(),
    }


def _square(side: int, low: int) -> Tensor:
    """Which of so many shifted frequencies lie in the middle."""
    half = min(low, side // 2 + side % 2) / 2
    at = torch.arange(side) - side // 2
    return (at >= -half) & (at < half)
