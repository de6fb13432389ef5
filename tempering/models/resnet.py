"""Build ResNets for CIFAR: thin ones of depth 6n + 2 (resnet20, resnet32x4), and ResNet18/50 with a small stem.

Reference: He et al., "Deep Residual Learning", CVPR 2016, arXiv:1512.03385, section 4.2; widths of "x4" and the
projections at a change of width as in the distillation literature (CRD, mdistiller).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tempering.models.layers import Staged, conv_norm, fan_out, pooled


class Block(nn.Module):
    """Apply two 3x3 convolutions, or 1x1, 3x3, 1x1 if ``expansion`` is 4, with an identity or projection shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int = 1) -> None:
        super().__init__()
        wide_out = out_channels * expansion
        if expansion == 1:
            parts = [
                *conv_norm(in_channels, out_channels, 3, stride),
                nn.ReLU(),
                *conv_norm(out_channels, out_channels),
            ]
        else:
            parts = [
                *conv_norm(in_channels, out_channels, 1),
                nn.ReLU(),
                *conv_norm(out_channels, out_channels, 3, stride),
                nn.ReLU(),
            ]
            parts += conv_norm(out_channels, wide_out, 1)
        self.residual = nn.Sequential(*parts)
        same = stride == 1 and in_channels == wide_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(in_channels, wide_out, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


def _stage(in_channels: int, out_channels: int, count: int, stride: int, expansion: int = 1) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride, expansion)
    return nn.Sequential(
        first, *(Block(out_channels * expansion, out_channels, 1, expansion) for _ in range(count - 1))
    )


def resnet(depth: int, widths: tuple[int, int, int, int], classes: int, channels: int) -> nn.Module:
    """Build a stem and three stages of (depth - 2) / 6 blocks; (N, channels, 32, 32) -> (N, classes)."""
    count, (first, *rest) = (depth - 2) // 6, widths
    stem = nn.Sequential(*conv_norm(channels, first), nn.ReLU())
    strides = (1, 2, 2)
    stages = [_stage(a, b, count, s) for a, b, s in zip(widths[:-1], rest, strides, strict=True)]
    return fan_out(Staged(stem, list(stages), pooled(), nn.Linear(rest[-1], classes)))


def wide_stem(counts: tuple[int, int, int, int], expansion: int, classes: int, channels: int) -> nn.Module:
    """Build ResNet18/50 for 32 x 32 images: a 3x3 stem of stride 1, without pooling."""
    stem = nn.Sequential(*conv_norm(channels, 64), nn.ReLU())
    stages, in_channels = [], 64
    for out_channels, count, stride in zip((64, 128, 256, 512), counts, (1, 2, 2, 2), strict=True):
        stages.append(_stage(in_channels, out_channels, count, stride, expansion))
        in_channels = out_channels * expansion
    return fan_out(Staged(stem, stages, pooled(), nn.Linear(in_channels, classes)))


NETS = {f"resnet{depth}": partial(resnet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)}
NETS |= {f"resnet{depth}x4": partial(resnet, depth, (32, 64, 128, 256)) for depth in (8, 32)}
# "resnet18" in the literature is ResNet18: no thin ResNet has that depth, so names are not case-sensitive
NETS |= {"ResNet18": partial(wide_stem, (2, 2, 2, 2), 1), "ResNet50": partial(wide_stem, (3, 4, 6, 3), 4)}
