"""Common corruptions at CIFAR-C's strengths: all fifteen, in torch and Pillow.

Frost is synthesized where the original blends photographs, and random numbers differ, so accuracies are close to those
on the published files but not equal. A mean over them is not an mCE, which is relative to a baseline.

Reference: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
2019, arXiv:1903.12261; the constants of the authors' make_cifar_c.py, made for 32 x 32 images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tempering.audits.blurs import elastic, glass_blur, motion_blur, zoom_blur
from tempering.audits.weather import fog, frost, snow

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(p: Float[Tensor, "N C H W"], name: str, severity: int, *, seed: int = 0) -> Float[Tensor, "N C H W"]:
    """Corrupt images with pixels in [0, 1]; round down to 8 bits, as CIFAR-C is stored.

    Raises:
        ValueError: if the corruption is unknown, or the severity is outside 1 to 5.
        ImportError: if pixelate or jpeg is used without Pillow.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"corruptions are {', '.join(CORRUPTIONS)}, at 1 to 5; got {name!r} at {severity}.")
    p = p.detach().cpu().float()
    out = CORRUPTIONS[name](p, severity - 1, torch.Generator().manual_seed(seed))
    # add a small offset, since 17 / 255 * 255 is slightly below 17 in floats
    return (out.clamp(0, 1) * 255 + 1e-3).floor() / 255


def _gaussian_noise(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return p + (0.04, 0.06, 0.08, 0.09, 0.10)[at] * torch.randn(p.shape, generator=generator)


def _shot_noise(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[at]
    return torch.poisson(p * photons, generator=generator) / photons


def _impulse_noise(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Add salt and pepper, independently per channel."""
    hit = torch.rand(p.shape, generator=generator) < (0.01, 0.02, 0.03, 0.05, 0.07)[at]
    return torch.where(hit, (torch.rand(p.shape, generator=generator) < 0.5).to(p.dtype), p)


def _defocus_blur(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Blur with a disk whose edge is smoothed by a 3 x 3 Gaussian."""
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[at]
    grid = torch.arange(-3, 4).float()
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).float()
    kernel = torch.exp(-(torch.arange(-1, 2).float() ** 2) / (2 * soft**2))
    kernel = kernel / kernel.sum()
    disk = conv2d((disk / disk.sum())[None, None], (kernel[:, None] * kernel)[None, None], padding=1)
    channels = p.shape[1]
    return conv2d(pad(p, (3, 3, 3, 3), mode="reflect"), disk.expand(channels, 1, 7, 7), groups=channels)


def _brightness(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Increase V of HSV: scale all channels by one factor; black becomes gray."""
    value = p.max(1, keepdim=True).values
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[at]).clamp(max=1)
    return torch.where(value > 0, p * brighter / value.clamp_min(1e-9), brighter)


def _contrast(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    middle = p.mean((2, 3), keepdim=True)
    return (p - middle) * (0.75, 0.5, 0.4, 0.3, 0.15)[at] + middle


def _pixelate(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    by = (0.95, 0.9, 0.85, 0.75, 0.65)[at]

    def change(image: Any) -> Any:
        from PIL.Image import Resampling

        wide, high = image.size
        small = image.resize((max(1, int(wide * by)), max(1, int(high * by))), Resampling.BOX)
        return small.resize((wide, high), Resampling.BOX)

    return _by_pillow(p, change)


def _jpeg(p: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return _by_pillow(p, partial(_through_jpeg, quality=(80, 65, 58, 50, 40)[at]))


def _through_jpeg(image: Any, quality: int) -> Any:
    from PIL import Image

    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _by_pillow(p: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """Apply a Pillow operation to each image as 8-bit gray or RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pixelate and jpeg need Pillow: pip install "tempering[data]"') from error
    if p.shape[1] not in (1, 3):
        raise ValueError(f"pixelate and jpeg need images of 1 or 3 channels; got {p.shape[1]}.")
    images = (p * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out = [np.array(change(Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x))) for x in images]
    result = torch.from_numpy(np.stack(out)).float() / 255
    return result[:, None] if result.ndim == 3 else result.permute(0, 3, 1, 2)


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
