"""Build the layers that the model families share."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def conv(in_channels: int, wide_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(in_channels, wide_out, size, stride, size // 2, groups=groups, bias=False)


def conv_norm(in_channels: int, wide_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Build a convolution and its batch normalization."""
    return [conv(in_channels, wide_out, size, stride, groups), nn.BatchNorm2d(wide_out)]


def pooled() -> nn.Sequential:
    """Build global average pooling, (N, C, H, W) -> (N, C)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def row_entropy(shares: Float[Tensor, "rows parts"]) -> Float[Tensor, " rows"]:
    """Return the entropy of each row of probabilities in nats; the gradient stays finite where a probability is 0."""
    return -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)


class Staged(nn.Sequential):
    """Chain stem -> stage1 -> ... -> pool -> head, the structure of all classifiers of the zoo.

    Attributes:
        stages: names of the stages.
    """

    stages: list[str]

    def __init__(self, stem: nn.Module, stages: list[nn.Module], pool: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.stem = stem
        self.stages = [f"stage{i}" for i in range(1, len(stages) + 1)]
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        self.pool, self.head = pool, head


def fan_out(net: nn.Module, *, head: float | None = None) -> nn.Module:
    """Apply He initialization by fan-out to convolutions, in place; ``head``: standard deviation of linear layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and head is not None:
            nn.init.normal_(module.weight, 0.0, head)
            nn.init.zeros_(module.bias)
    return net
