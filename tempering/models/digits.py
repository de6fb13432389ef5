"""Build small networks for the 8 x 8 digits; a run takes seconds on one core."""

from __future__ import annotations

from functools import partial

from torch import nn

from tempering.models.layers import Staged, conv_norm, pooled


def digits_net(widths: tuple[int, ...], classes: int, channels: int) -> nn.Module:
    """Build convolutions of these widths, of stride 2 after the first; (N, channels, 8, 8) -> (N, classes)."""
    stem, *stages = (
        nn.Sequential(*conv_norm(a, b, 3, 1 if number == 0 else 2), nn.ReLU())
        for number, (a, b) in enumerate(zip((channels, *widths[:-1]), widths, strict=True))
    )
    return Staged(stem, list(stages), pooled(), nn.Linear(widths[-1], classes))


NETS = {"digits_large": partial(digits_net, (32, 64, 128)), "digits_small": partial(digits_net, (4, 8))}
