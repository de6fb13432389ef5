"""Build VGG for CIFAR, with batch normalization and one linear layer.

Reference: Simonyan and Zisserman, 2015, arXiv:1409.1556; layer counts as in the distillation literature.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from tempering.models.layers import Staged, fan_out, pooled

WIDTHS = (64, 128, 256, 512, 512)
COUNTS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, classes: int, channels: int) -> nn.Module:
    """Build five groups of convolutions, max pooling between the first four; (N, channels, 32, 32) -> (N, classes)."""
    groups, in_channels = [], channels
    for number, (out_channels, count) in enumerate(zip(WIDTHS, COUNTS[depth], strict=True)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if 0 < number < 4 else []
        for _ in range(count):
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
            in_channels = out_channels
        groups.append(nn.Sequential(*layers))
    stem, *stages = groups
    return fan_out(Staged(stem, stages, pooled(), nn.Linear(in_channels, classes)), head=0.01)


NETS = {f"vgg{depth}": partial(vgg, depth) for depth in COUNTS}
