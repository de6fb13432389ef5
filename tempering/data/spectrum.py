"""Measure the spatial frequency spectrum of images: the shares of structure (low) and detail (high)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOW = 60  # side of the centered square of low frequencies, as in the released figures
CELLS = 24  # cells per side of the map
LEAST = 1e-8  # smaller than any nonzero magnitude of an 8-bit image


def spectrum(images: Iterable[Float[Tensor, "C H W"]], *, low: int = LOW, bins: int = 32) -> dict[str, Any]:
    """Compute the mean spectrum of images, per channel and without their means; the result is JSON-able.

    Images may differ in size; frequencies are in cycles per pixel.

    Args:
        images: in [0, 1].
        low: side of the centered square of low frequencies, in frequencies; at most half the side of an image.
        bins: number of bins of the profile.

    Returns:
        images: number of images; frequency: centers of ``bins`` rings up to 0.5 cycles per pixel; profile: logarithm of
        the mean magnitude in each ring, None in an empty one; low, high: fractions of the power inside and outside the
        square, which add up to 1; map: mean log magnitude on a 24 x 24 grid, low frequencies in the center.

    Raises:
        ValueError: for no images, or arguments below 1.

    Reference: Liang et al., 2022, arXiv:2209.09841, whose figures show such maps.
    """
    if low < 1 or bins < 1:
        raise ValueError(f"spectrum() needs low >= 1 and bins >= 1; got {low!r} and {bins!r}.")
    maps, sums = torch.zeros(CELLS, CELLS, dtype=torch.float64), torch.zeros(bins + 1).double()
    counts, inside, n = torch.zeros(bins + 1).double(), 0.0, 0
    for image in images:
        height, width = image.shape[-2:]
        centered = image.double().cpu() - image.double().cpu().mean((-2, -1), keepdim=True)
        magnitude = torch.fft.fftshift(torch.fft.fft2(centered, norm="ortho"), dim=(-2, -1)).abs()
        log_magnitude = (magnitude + LEAST).log().mean(0)
        power = magnitude.square().sum(0)
        y, x = (torch.fft.fftshift(torch.fft.fftfreq(side)).double() for side in (height, width))
        ring = ((y[:, None].square() + x.square()).sqrt() / 0.5 * bins).long().clamp_max(bins)
        mask = ring.new_ones(ring.shape, dtype=torch.float64)
        mask[height // 2, width // 2] = 0.0  # the mean, which was subtracted
        sums.index_add_(0, ring.flatten(), (magnitude.mean(0) * mask).flatten())
        counts.index_add_(0, ring.flatten(), mask.flatten())
        square = _square(height, low)[:, None] & _square(width, low)
        inside += float(power[square].sum() / power.sum()) if power.sum() > 0 else 1.0
        maps += F.adaptive_avg_pool2d(log_magnitude[None], (CELLS, CELLS))[0]
        n += 1
    if not n:
        raise ValueError("spectrum() got no images.")
    profile = [math.log(s / c + LEAST) if c else None for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]
    return {
        "images": n,
        "frequency": [0.5 * (i + 0.5) / bins for i in range(bins)],
        "profile": profile[:bins],
        "low": inside / n,
        "high": 1.0 - inside / n,
        "map": (maps / n).tolist(),
    }


def _square(side: int, low: int) -> Tensor:
    """Return a mask (side,) of the low ones of the shifted frequencies."""
    half = min(low, side // 2 + side % 2) / 2
    frequency = torch.arange(side) - side // 2
    return (frequency >= -half) & (frequency < half)
