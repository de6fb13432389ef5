"""Build MobileNetV2 at half width, as used in the distillation literature on CIFAR.

Reference: Sandler et al., "MobileNetV2", CVPR 2018, arXiv:1801.04381; strides and widths as in that literature.
"""

from __future__ import annotations

from torch import Tensor, nn

from tempering.models.layers import Staged, conv_norm, fan_out, pooled

# stages of (expansion, width, blocks, stride); half of the paper's widths
STAGES = (
    ((1, 8, 1, 1), (6, 12, 2, 1)),
    ((6, 16, 3, 2),),
    ((6, 32, 4, 2), (6, 48, 3, 1)),
    ((6, 80, 3, 2), (6, 160, 1, 1)),
)


class Block(nn.Module):
    """Apply an inverted residual: expand, depthwise convolution, project; with a shortcut if the size is unchanged."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.same = stride == 1 and in_channels == out_channels
        self.residual = nn.Sequential(
            *conv_norm(in_channels, inner, 1),
            nn.ReLU(),
            *conv_norm(inner, inner, 3, stride, groups=inner),
            nn.ReLU(),
            *conv_norm(inner, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.same else self.residual(x)


def mobilenet_v2(classes: int, channels: int) -> nn.Module:
    """Build the network (N, channels, 32, 32) -> (N, classes)."""
    stem, in_channels = nn.Sequential(*conv_norm(channels, 16, 3, 2), nn.ReLU()), 16
    stages = []
    for groups in STAGES:
        blocks = []
        for expansion, out_channels, count, stride in groups:
            for number in range(count):
                blocks.append(Block(in_channels, out_channels, stride if number == 0 else 1, expansion))
                in_channels = out_channels
        stages.append(nn.Sequential(*blocks))
    pool = nn.Sequential(*conv_norm(in_channels, 1280, 1), nn.ReLU(), *pooled())
    return fan_out(Staged(stem, stages, pool, nn.Linear(1280, classes)), head=0.01)


NETS = {"MobileNetV2": mobilenet_v2}
