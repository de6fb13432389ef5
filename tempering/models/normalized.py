"""A net that takes pixels: its normalization lies inside, so that slopes and attacks are in pixels of [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """(pixels - mean) / std, and then the net. Its batches come unnormalized, such as ``cifar100(pixels=True)``.

    Args:
        net: the net, of images (N, C, H, W); its modules are ``net.stage1`` and so on.
        mean, std: one value a channel, of pixels in [0, 1].

    Raises:
        ValueError: for lengths that differ, or a spread that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not len(mean) == len(std) > 0 or min(std) <= 0:
            raise ValueError(f"Normalized needs a mean and a std > 0 a channel; got mean {mean} and std {std}.")
        self.net = net
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @property
    def stages(self) -> list[str]:
        """Names of the net's stages in this module, shallow to deep."""
        return [f"net.{name}" for name in getattr(self.net, "stages", [])]

    def forward(self, pixels: Tensor) -> Any:
        return self.net((pixels - self.mean) / self.std)
