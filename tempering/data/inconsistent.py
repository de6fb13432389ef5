"""Augmentation by what an image holds: noise where all objects are small, a crop where one is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

FILL = (124, 116, 104)  # ImageNet's mean, so 0 once normalized, which the released code fills with


class SampleSpecific:
    """The sample-specific augmentation of Inconsistent KD, for a loader of detection data (``augment=``).

    An image whose objects are all small, or that has none, gets Gaussian noise with a probability. Any other is cropped
    to a random share of its height and width, in the upper left corner of an image of the old size; boxes are cut to
    the crop, and those of which nothing is left are dropped. A crop without any object is not made. The paper means
    noise to stress detail and the crop structure; docs/detection.md shows what they do to the spectra.

    The released code has a second rule, that replaces patches of single objects, which its flags turn off; it adds
    noise before, and crops after, the image is resized and flipped.

    Args:
        small: side in pixels of the original image below whose square an object's area is small.
        noise: standard deviation of the noise, on [0, 1]; 0.08 is "severity 1".
        probability: of noise, where all objects are small.
        crop: smallest share of height and of width that is kept.
        until: share of the run after which images are left alone; the released schedule's 16 of 24 epochs.

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
        shares = {"noise": noise, "probability": probability, "until": until}
        wrong = {name: value for name, value in shares.items() if not 0.0 <= value <= 1.0}
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
        """The image and its target, changed; what is drawn is of ``generator`` alone.

        Args:
            image: in bytes.
            target: boxes (M, 4) as xyxy in pixels, labels (M,), and, where it was resized, its scale.
            generator: of this look at this image.
            progress: the share of the run that is done.
        """
        if progress >= self.until:
            return image, dict(target)
        if self.all_small(target):
            return self._noisy(image, generator), dict(target)
        return self._cropped(image, dict(target), generator)

    def all_small(self, target: Mapping[str, Any]) -> bool:
        """Whether every object is below the limit, in pixels of the original image; so it is where there are none."""
        size = (target["boxes"][:, 2:] - target["boxes"][:, :2]).clamp_min(0) / target.get("scale", 1.0)
        return bool((size.prod(-1) < self.small**2).all())

    def hyperparameters(self) -> dict[str, float]:
        """Arguments by name, as records write them."""
        return {name: getattr(self, name) for name in ("small", "noise", "probability", "crop", "until")}

    def __repr__(self) -> str:
        return f"SampleSpecific({', '.join(f'{name}={value:g}' for name, value in self.hyperparameters().items())})"

    def _noisy(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if float(torch.rand((), generator=generator)) >= self.probability:
            return image
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        return (image.float() + 255.0 * self.noise * noise).round().clamp(0, 255).to(torch.uint8)

    def _cropped(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        sides = image.shape[1:]
        kept, place = torch.rand(2, 2, generator=generator)
        shares = (self.crop + (1.0 - self.crop) * kept).tolist()
        height, width = (max(1, int(side * share)) for side, share in zip(sides, shares, strict=True))
        rooms = (sides[0] - height + 1, sides[1] - width + 1)
        top, left = (int(room * p) for room, p in zip(rooms, place.tolist(), strict=True))
        corner, limit = ([a, b, a, b] for a, b in ((left, top), (width, height)))
        boxes = target["boxes"] - target["boxes"].new_tensor(corner)
        boxes = torch.minimum(boxes.clamp_min(0), boxes.new_tensor(limit))
        there = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        if not there.any():
            return image, target
        out = image.new_tensor(FILL).view(3, 1, 1).expand_as(image).clone()
        out[:, :height, :width] = image[:, top : top + height, left : left + width]
        return out, target | {"boxes": boxes[there], "labels": target["labels"][there]}
