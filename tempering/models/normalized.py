"""Normalize inputs inside the model, so that gradients and attacks are in pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """Apply ``net`` to (pixels - mean) / std.

    Batches must not be normalized, such as those of ``cifar100(pixels=True)``.

    Args:
        net: model of images (N, C, H, W); its modules are ``net.stage1`` and so on.
        mean, std: one value per channel, for pixels in [0, 1].

    Raises:
        ValueError: for different lengths, or a standard deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not len(mean) == len(std) > 0 or min(std) <= 0:
            raise ValueError(f"Normalized needs a mean and a std > 0 per channel; got mean {mean} and std {std}.")
        self.net = net
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @property
    def stages(self) -> list[str]:
        """Names of the stages of ``net`` in this module, shallow to deep."""
        return [f"net.{name}" for name in getattr(self.net, "stages", [])]

    def forward(self, pixels: Tensor) -> Any:
        return self.net((pixels - self.mean) / self.std)
