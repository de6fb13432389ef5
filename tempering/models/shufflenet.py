"""Build ShuffleNets for CIFAR: a 1x1 stem that keeps the size, and three stages that halve it.

References: Zhang et al., "ShuffleNet", CVPR 2018, arXiv:1707.01083; Ma et al., "ShuffleNet V2", ECCV 2018,
arXiv:1807.11164; sizes as in the distillation literature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempering.models.layers import Staged, conv_norm, pooled


class Shuffle(nn.Module):
    """Interleave the channels of ``groups`` groups, (N, C, H, W)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class BlockV1(nn.Module):
    """Apply grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; add the input, or at stride 2 concatenate it, pooled."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, groups: int = 3) -> None:
        super().__init__()
        added = out_channels - in_channels if stride == 2 else out_channels
        inner = added // 4
        first = 1 if in_channels == 24 else groups
        self.residual = nn.Sequential(
            *conv_norm(in_channels, inner, 1, groups=first),
            nn.ReLU(),
            Shuffle(first),
            *conv_norm(inner, inner, 3, stride, groups=inner),
            nn.ReLU(),
            *conv_norm(inner, added, 1, groups=groups),
        )
        self.shrink = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        r = self.residual(x)
        return self.relu(r + x if self.shrink is None else torch.cat((r, self.shrink(x)), 1))


class BlockV2(nn.Module):
    """Convolve half of the channels, pass the other half through, and shuffle both."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.kept = half
        self.residual = nn.Sequential(
            *conv_norm(half, half, 1),
            nn.ReLU(),
            *conv_norm(half, half, 3, groups=half),
            *conv_norm(half, half, 1),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(torch.cat((x[:, : self.kept], self.residual(x[:, self.kept :])), 1))


class HalveV2(nn.Module):
    """Concatenate two convolutional branches of stride 2, and shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(
            *conv_norm(in_channels, in_channels, 3, 2, groups=in_channels), *conv_norm(in_channels, half, 1), nn.ReLU()
        )
        self.right = nn.Sequential(
            *conv_norm(in_channels, half, 1),
            nn.ReLU(),
            *conv_norm(half, half, 3, 2, groups=half),
            *conv_norm(half, half, 1),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(torch.cat((self.left(x), self.right(x)), 1))


def shuffle_v1(classes: int, channels: int) -> nn.Module:
    """Build ShuffleNetV1 with three groups; (N, channels, 32, 32) -> (N, classes)."""
    stages, in_channels = [], 24
    for out_channels, count in ((240, 4), (480, 8), (960, 4)):
        stages.append(
            nn.Sequential(
                BlockV1(in_channels, out_channels, 2),
                *(BlockV1(out_channels, out_channels, 1) for _ in range(count - 1)),
            )
        )
        in_channels = out_channels
    stem = nn.Sequential(*conv_norm(channels, 24, 1), nn.ReLU())
    return Staged(stem, stages, pooled(), nn.Linear(in_channels, classes))


def shuffle_v2(classes: int, channels: int) -> nn.Module:
    """Build ShuffleNetV2 of width 1; (N, channels, 32, 32) -> (N, classes)."""
    stages, in_channels = [], 24
    for out_channels, count in ((116, 3), (232, 7), (464, 3)):
        stages.append(nn.Sequential(HalveV2(in_channels, out_channels), *(BlockV2(out_channels) for _ in range(count))))
        in_channels = out_channels
    stem = nn.Sequential(*conv_norm(channels, 24, 1), nn.ReLU())
    pool = nn.Sequential(*conv_norm(in_channels, 1024, 1), nn.ReLU(), *pooled())
    return Staged(stem, stages, pool, nn.Linear(1024, classes))


NETS = {"ShuffleV1": shuffle_v1, "ShuffleV2": shuffle_v2}
