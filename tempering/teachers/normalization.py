"""Convert images from the data's normalization to the one that a teacher was trained with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, of pixels in [0, 1]
WRITE = (
    "Live(model, normalization='own') reads the teacher's from its config, normalization=(mean, std) gives it, and "
    "normalization='data' says that the teacher was trained with the data's"
)


class Renormalize:
    """Convert images (N, C, H, W) normalized with ``data`` to images normalized with ``own``, each (mean, std).

    Raises:
        ValueError: for different numbers of channels.
    """

    def __init__(self, own: Statistics, data: Statistics) -> None:
        if len(own[0]) != len(data[0]):
            raise ValueError(
                f"the teacher's normalization has {len(own[0])} channels, and the data's {len(data[0])}. {WRITE}."
            )
        (mean, std), (data_mean, data_std) = (map(torch.tensor, side) for side in (own, data))
        self.scale = (data_std / std)[:, None, None]
        self.shift = ((data_mean - mean) / std)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point() or x.shape[1] != len(self.scale):
            return x
        return x * self.scale.to(x) + self.shift.to(x)


def statistics(value: object) -> Statistics | None:
    """Return (mean, std) of a pair, a config of timm or an image processor of transformers; None if it has none.

    Raises:
        ValueError: for a pair of other lengths, or a standard deviation that is not positive.
    """
    found: Any = value
    if isinstance(value, Mapping):
        found = (value.get("mean"), value.get("std"))
    elif hasattr(value, "image_mean"):
        used = getattr(value, "do_normalize", True)
        found = (value.image_mean, value.image_std) if used else ((0.0,) * 3, (1.0,) * 3)  # pyright: ignore
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != 2 or None in tuple(found):
        return None
    mean, std = (tuple(map(float, side)) for side in found)
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ValueError(f"a normalization needs a mean and a std > 0 per channel; got {mean} and {std}.")
    return mean, std


def own_statistics(model: nn.Module, *, download: bool = True) -> Statistics | None:
    """Return (mean, std) from the config of a timm model, or the image processor of a transformers model; else None.

    Args:
        download: whether to load the image processor by the model's name or path.
    """
    for module in (model, getattr(model, "model", None)):
        if isinstance(cfg := getattr(module, "pretrained_cfg", None), Mapping):
            return statistics(cfg)
        name = getattr(getattr(module, "config", None), "_name_or_path", "")
        if name and download:
            from transformers import AutoImageProcessor

            return statistics(AutoImageProcessor.from_pretrained(name))
    return None


def of_loader(batches: object) -> Statistics | None:
    """Return (mean, std) of a loader that has both, such as ``data.Batches``; else None."""
    return statistics((getattr(batches, "mean", None), getattr(batches, "std", None)))


def warn_if_other(model: nn.Module, data: Statistics) -> None:
    """Warn of a timm model whose config has another normalization than the data."""
    own = own_statistics(model, download=False)
    if own is not None and any(abs(a - b) > 1e-3 for x, y in zip(own, data, strict=True) for a, b in zip(x, y)):  # noqa: B905
        warnings.warn(
            f"the config of the teacher {type(model).__name__} has mean {own[0]} and std {own[1]}, and the data is "
            f"normalized with mean {data[0]} and std {data[1]}. {WRITE}.",
            stacklevel=5,
        )
