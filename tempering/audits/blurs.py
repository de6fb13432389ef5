"""Corruptions that move or smear pixels, at CIFAR-C's strengths: glass, motion and zoom blur, and elastic deformation.

Images are (N, C, H, W) in [0, 1]; ``at`` is the severity, counted from 0. Outputs may leave the range slightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

Border = Callable[[Tensor, int], Tensor]  # positions that may be out of bounds, and the length -> positions within


def glass_blur(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Replace each pixel by a neighbor (one row up, one column left, both or neither); blur before and after.

    The released code is meant to swap the two pixels but copies one, because numpy slices are views; CIFAR-C was
    generated with it.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[at]
    n, _, h, w = p.shape
    p = (blurred(p, sigma, _edge) * 255 + 1e-3).floor() / 255
    for _ in range(rounds):
        offsets = torch.randint(2, (2, n, h, w), generator=generator)
        offsets[:, :, :2], offsets[..., :2] = 0, 0
        p = picked(p, torch.arange(h)[:, None] - offsets[0], torch.arange(w) - offsets[1])
    return blurred(p, sigma, _edge)


def motion_blur(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Smear along a line within 45 degrees of the horizontal."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[at]
    return smeared(p, radius, sigma, 90 * torch.rand(len(p), generator=generator) - 45)


def zoom_blur(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Average the image with versions of itself enlarged in steps of 0.01."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[at], 0.01).tolist()
    return (p + torch.stack([zoomed(p, by) for by in factors]).sum(0)) / (len(factors) + 1)


def elastic(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Apply an affine map, then a field of small displacements.

    From severity 1 to 5 the field grows and the affine map shrinks, so the total distance in pixels does not grow.
    """
    n, _, h, w = p.shape
    side = min(h, w)
    strength, smooth, corners = ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[at]  # fmt: skip  # noqa: E501
    middle, reach = torch.tensor([w // 2, h // 2]).double(), max(1, side // 3)
    before = middle + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double()
    moved = before + side * corners * (2 * torch.rand(n, 3, 2, generator=generator).double() - 1)
    # source position of each pixel: the affine map from the moved corners to the original ones
    back = torch.linalg.solve(torch.cat((moved, torch.ones(n, 3, 1).double()), 2), before.expand(n, 3, 2))
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    from_x, from_y = (torch.stack((x, y, torch.ones_like(x)), -1) @ back[:, None]).unbind(-1)
    p = sampled(p, from_y.float(), from_x.float(), _mirror_101)
    bends = 2 * torch.rand(n, 2, h, w, generator=generator) - 1
    bends = side * strength * blurred(bends, side * smooth, _mirror, truncate=3)
    return sampled(p, y.float() + bends[:, 0], x.float() + bends[:, 1], _mirror)


def blurred(p: Tensor, sigma: float, border: Border, *, truncate: float = 4.0) -> Tensor:
    """Blur with a Gaussian cut off at ``truncate`` sigma; return the input if that leaves one pixel."""
    radius = int(truncate * sigma + 0.5)
    if not radius:
        return p
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-(offsets.to(p.dtype) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for dim in (-2, -1):
        length = p.shape[dim]
        mixing = torch.zeros(length, length, dtype=p.dtype)
        positions = border(torch.arange(length)[:, None] + offsets, length)
        mixing.scatter_add_(1, positions, kernel.expand_as(positions))
        p = mixing @ p if dim == -2 else p @ mixing.T
    return p


def smeared(p: Tensor, radius: int, sigma: float, angle: Float[Tensor, " N"]) -> Tensor:
    """Blur with half a Gaussian along a line, one angle in degrees per image; border pixels are repeated.

    Reference: ImageMagick's motion blur, which CIFAR-C uses.
    """
    _, _, h, w = p.shape
    kernel = torch.exp(-(torch.arange(2 * radius + 1).to(p.dtype) ** 2) / (2 * sigma**2))
    kernel, angle = kernel / kernel.sum(), torch.deg2rad(angle)
    out = torch.zeros_like(p)
    for i, weight in enumerate(kernel.tolist()):
        down, right = ((i * f(angle) - 0.5).ceil().long()[:, None, None] for f in (torch.sin, torch.cos))
        out += weight * picked(p, _edge(torch.arange(h)[:, None] + down, h), _edge(torch.arange(w) + right, w))
    return out


def zoomed(p: Tensor, by: float) -> Tensor:
    """Enlarge the center by the factor ``by`` >= 1, cropped to the input size."""
    h, w = p.shape[-2:]
    cut = [math.ceil(length / by) for length in (h, w)]
    top, left = (h - cut[0]) // 2, (w - cut[1]) // 2
    size = [round(length * by) for length in cut]
    part = p[..., top : top + cut[0], left : left + cut[1]]
    large = interpolate(part, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return large[..., top : top + h, left : left + w]


def picked(p: Tensor, rows: Int[Tensor, "#N H #W"], cols: Int[Tensor, "#N #H W"]) -> Tensor:
    """Gather each image's pixels at these positions."""
    n, c = p.shape[:2]
    return p[torch.arange(n).view(n, 1, 1, 1), torch.arange(c).view(c, 1, 1), rows[:, None], cols[:, None]]


def sampled(p: Tensor, rows: Float[Tensor, "N H W"], cols: Float[Tensor, "N H W"], border: Border) -> Tensor:
    """Sample each image at fractional positions by bilinear interpolation."""
    h, w = p.shape[-2:]
    top, left = rows.floor(), cols.floor()
    down, right = (rows - top)[:, None], (cols - left)[:, None]
    y, x = ([border(a.long() + i, length) for i in (0, 1)] for a, length in ((top, h), (left, w)))
    upper, lower = ((1 - right) * picked(p, row, x[0]) + right * picked(p, row, x[1]) for row in y)
    return (1 - down) * upper + down * lower


def _edge(position: Tensor, length: int) -> Tensor:
    """aaa|abcd|ddd"""
    return position.clamp(0, length - 1)


def _mirror(position: Tensor, length: int) -> Tensor:
    """cba|abcd|dcb"""
    position = position % (2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


def _mirror_101(position: Tensor, length: int) -> Tensor:
    """dcb|abcd|cba"""
    position = position % max(1, 2 * length - 2)
    return torch.minimum(position, 2 * length - 2 - position)
