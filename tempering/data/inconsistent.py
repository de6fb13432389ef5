"""Augment images by the size of their objects: add noise if all objects are small, crop otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

FILL = (124, 116, 104)  # mean of ImageNet, 0 after normalization; the fill value of the released code


class SampleSpecific:
    """Apply the sample-specific augmentation of Inconsistent KD, in a loader of detection data (``augment=``).

    Images whose objects are all small, or that have no objects, get Gaussian noise with probability ``probability``.
    Other images are cropped to a random fraction of their height and width; the crop is pasted into the upper left
    corner of an image of the original size, boxes are clipped to it, and empty boxes are dropped. If the crop would
    contain no object, the image is left unchanged. In the paper, noise is to emphasize detail and the crop structure;
    docs/detection.md shows their effect on the spectra.

    Differences to the released code: it has a second rule, which replaces patches of single objects and which its flags
    turn off; it adds noise before, and crops after, the image is resized and flipped.

    Args:
        small: an object is small if its area is below ``small`` squared, in pixels of the original image.
        noise: standard deviation of the noise, for pixels in [0, 1]; 0.08 is "severity 1".
        probability: of noise, if all objects are small.
        crop: minimal fraction of height and width of a crop.
        until: fraction of the run after which images are not augmented; default: 16 of 24 epochs, as released.

    Raises:
        ValueError: for values outside their range.

    Reference: Liang et al., "Inconsistent Knowledge Distillation for Object Detection", ACM MM 2023, arXiv:2209.09841;
    the rule is the released code's.
    """

    def __init__(
        self,
        *,
        small: float = 32.0,
        noise: float = 0.08,
        probability: float = 0.3,
        crop: float = 0.8,
        until: float = 16 / 24,
    ) -> None:
        fractions = {"noise": noise, "probability": probability, "until": until}
        wrong = {name: value for name, value in fractions.items() if not 0.0 <= value <= 1.0}
        if wrong or not 0.0 < crop <= 1.0 or not 0.0 <= small < float("inf"):
            raise ValueError(
                f"SampleSpecific needs noise, probability and until in [0, 1], crop in (0, 1] and small >= 0; got "
                f"{wrong or {'crop': crop, 'small': small}}."
            )
        self.small, self.noise, self.probability = small, noise, probability
        self.crop, self.until = crop, until

    def __call__(
        self,
        image: UInt8[Tensor, "3 H W"],
        target: Mapping[str, Any],
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> tuple[UInt8[Tensor, "3 H W"], dict[str, Any]]:
        """Return the augmented image and its target; all random numbers come from ``generator``.

        Args:
            image: in uint8.
            target: boxes (M, 4) as xyxy in pixels, labels (M,), and the image's scale if it was resized.
            generator: for this image in this epoch.
            progress: completed fraction of the run, in [0, 1].
        """
        if progress >= self.until:
            return image, dict(target)
        if self.all_small(target):
            return self._add_noise(image, generator), dict(target)
        return self._crop_image(image, dict(target), generator)

    def all_small(self, target: Mapping[str, Any]) -> bool:
        """Return whether all objects are small in the original image; True for an image without objects."""
        size = (target["boxes"][:, 2:] - target["boxes"][:, :2]).clamp_min(0) / target.get("scale", 1.0)
        return bool((size.prod(-1) < self.small**2).all())

    def hyperparameters(self) -> dict[str, float]:
        """Return the arguments by name, for records."""
        return {name: getattr(self, name) for name in ("small", "noise", "probability", "crop", "until")}

    def __repr__(self) -> str:
        return f"SampleSpecific({', '.join(f'{name}={value:g}' for name, value in self.hyperparameters().items())})"

    def _add_noise(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if float(torch.rand((), generator=generator)) >= self.probability:
            return image
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        return (image.float() + 255.0 * self.noise * noise).round().clamp(0, 255).to(torch.uint8)

    def _crop_image(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        sides = image.shape[1:]
        size, position = torch.rand(2, 2, generator=generator)
        fractions = (self.crop + (1.0 - self.crop) * size).tolist()
        height, width = (max(1, int(side * fraction)) for side, fraction in zip(sides, fractions, strict=True))
        offsets = (sides[0] - height + 1, sides[1] - width + 1)
        top, left = (int(count * p) for count, p in zip(offsets, position.tolist(), strict=True))
        corner, limit = ([a, b, a, b] for a, b in ((left, top), (width, height)))
        boxes = target["boxes"] - target["boxes"].new_tensor(corner)
        boxes = torch.minimum(boxes.clamp_min(0), boxes.new_tensor(limit))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        if not kept.any():
            return image, target
        out = image.new_tensor(FILL).view(3, 1, 1).expand_as(image).clone()
        out[:, :height, :width] = image[:, top : top + height, left : left + width]
        return out, target | {"boxes": boxes[kept], "labels": target["labels"][kept]}
