"""Base class of wrapped detectors of other libraries, and what the wrappers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.models.boxes import clipped
from tempering.models.detector import Detector, Target

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ExternalDetector(Detector):
    """Base of detectors that wrap a model of another library and normalize its inputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: int, *, plain: bool = False) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        own: Any = getattr(model, "transform", None)  # torchvision's
        mean = getattr(own, "image_mean", (0.0,) * 3 if plain else MEAN)
        std = getattr(own, "image_std", (1.0,) * 3 if plain else STD)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None], persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize pixels for the model."""
        return (images - self.mean) / self.std


def proper(targets: Sequence[Target], size: Sequence[int], *, needs: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """Clip boxes to images of (height, width) and drop empty ones, which the libraries would count as positives.

    The result has boxes, labels and the parts that are named in ``needs``.
    """
    result = []
    for target in targets:
        boxes = clipped(target["boxes"], (size[0], size[1]))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        result.append({"boxes": boxes[kept]} | {name: target[name][kept] for name in ("labels", *needs)})
    return result


def image_list(images: Tensor) -> Any:
    """Return images of one size as torchvision's ImageList."""
    from torchvision.models.detection.image_list import ImageList  # pyright: ignore[reportMissingImports]

    return ImageList(images, [(images.shape[2], images.shape[3])] * len(images))
