"""Snow, frost and fog, at CIFAR-C's strengths; frost is synthesized, since the original blends photographs.

Images are (N, C, H, W) in [0, 1]; ``at`` is the severity, counted from 0. Outputs may leave the range.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.audits.blurs import smeared, zoomed

GRAY = (0.299, 0.587, 0.114)  # of red, green and blue
ICE = (0.8, 0.9, 1.0)


def snow(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Overlay enlarged, thresholded and downward-smeared noise on a paler image."""
    mean, spread, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[at]
    n, _, h, w = p.shape
    flakes = zoomed(mean + spread * torch.randn(n, 1, h, w, generator=generator), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp(0, 1))
    flakes = smeared(flakes, radius, sigma, -45 - 90 * torch.rand(n, generator=generator))
    pale = torch.maximum(p, 1.5 * _gray(p) + 0.5)
    return keep * p + (1 - keep) * pale + flakes + flakes.flip(2, 3)


def frost(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Blend with synthetic frost: veins of ice on a fractal, different for each image.

    These are not CIFAR-C's photographs, so accuracies are not comparable with published ones.
    """
    keep, added = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[at]
    veins = 1 - (2 * plasma(p, 1.5, generator) - 1).abs()
    ice = torch.tensor(ICE if p.shape[1] == 3 else [sum(ICE) / 3] * p.shape[1])
    return keep * p + added * ice.view(1, -1, 1, 1) * veins


def fog(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Add a fractal and keep the image's brightest value."""
    strength, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[at]
    brightest = p.amax((1, 2, 3), keepdim=True)
    return (p + strength * plasma(p, decay, generator)) * brightest / (brightest + strength)


def plasma(p: Tensor, decay: float, generator: torch.Generator) -> Float[Tensor, "N 1 H W"]:
    """Return a fractal per image, in [0, 1], rougher for smaller ``decay``, by midpoint displacement on a torus.

    Noise decreases by ``decay`` squared from one scale to the next, as in the released code.

    Reference: Fournier et al., "Computer Rendering of Stochastic Models", 1982 (the diamond-square algorithm).
    """
    n, _, h, w = p.shape
    heights, size = torch.zeros(n, 1, 1), 1.0

    def middle(*near: Tensor) -> Tensor:
        return torch.stack(near).mean(0) + size * (2 * torch.rand(near[0].shape, generator=generator) - 1)

    while heights.shape[1] < max(h, w, 2):
        right, below = heights.roll(-1, 2), heights.roll(-1, 1)
        center = middle(heights, right, below, right.roll(-1, 1))
        upper = middle(heights, right, center, center.roll(1, 1))
        left = middle(heights, below, center, center.roll(1, 2))
        lines = [torch.stack(pair, 3).flatten(2) for pair in ((heights, upper), (left, center))]
        heights, size = torch.stack(lines, 2).flatten(1, 2), size / decay**2
    heights = heights - heights.amin((1, 2), keepdim=True)
    return (heights / heights.amax((1, 2), keepdim=True))[:, None, :h, :w]


def _gray(p: Tensor) -> Tensor:
    if p.shape[1] != 3:
        return p.mean(1, keepdim=True)
    return (p * torch.tensor(GRAY).view(1, 3, 1, 1)).sum(1, keepdim=True)
