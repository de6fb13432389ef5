"""Build wide ResNets for CIFAR: wrn_40_2 has 40 layers and twice the width.

Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from tempering.models.layers import Staged, conv, fan_out, pooled


class Block(nn.Module):
    """Apply normalization, activation and convolution, twice.

    If the width changes, the shortcut is a 1x1 convolution of the activated input, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            conv(in_channels, out_channels, 3, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            conv(out_channels, out_channels),
        )
        self.shortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.before(x)
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


def wrn(depth: int, widen: int, classes: int, channels: int) -> nn.Module:
    """Build a stem and three stages of (depth - 4) / 6 blocks; (N, channels, 32, 32) -> (N, classes)."""
    count, widths = (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen)
    stages = [
        nn.Sequential(Block(a, b, stride), *(Block(b, b, 1) for _ in range(count - 1)))
        for a, b, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)
    ]
    pool = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), *pooled())
    net = Staged(conv(channels, 16), list(stages), pool, nn.Linear(widths[-1], classes))
    nn.init.zeros_(net.head.bias)
    return fan_out(net)


NETS = {f"wrn_{depth}_{widen}": partial(wrn, depth, widen) for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2))}
