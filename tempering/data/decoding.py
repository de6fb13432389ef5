"""Decode and crop one image from its encoded bytes; every draw is a function of 64 random bits of the sample."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempering.data.folders import named_if_unreadable, pillow, rgb

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's and timm's random resized crop
ORIENTATION = 274  # the EXIF tag
MASK = 2**64 - 1
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Decoding:
    """How an image is decoded: (size, size, 3) uint8.

    Without random bits an image is resized so that its shorter side is ``resize``, and center cropped; with them a
    random part of it is resized. Both are torchvision's ``Resize`` and ``CenterCrop``, and ``RandomResizedCrop`` with
    antialiasing, to the bit but for ``draft``.

    Attributes:
        size: height and width of the output.
        resize: shorter side before the center crop.
        scale: share of the area that a random crop has; None: the center crop.
        ratio: width / height of a random crop.
        flip: flip horizontally with probability 1/2.
        draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size where a random crop is larger than ``size`` by that factor.
            libjpeg averages pixels in the frequency domain, which differs from antialiasing by about a gray level.
    """

    size: int
    resize: int
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = RATIO
    flip: bool = False
    draft: bool = True

    @classmethod
    def of(cls, loader: Any) -> Decoding:
        """Return the decoding of a loader with these attributes, and ``side`` for the size of its inputs."""
        scale = None if loader.scale is None else (loader.scale[0], loader.scale[1])
        options = {name: getattr(loader, name) for name in ("resize", "flip", "draft")}
        return cls(loader.side, scale=scale, ratio=(loader.ratio[0], loader.ratio[1]), **options)

    def __call__(self, encoded: bytes, bits: int | None, name: object) -> np.ndarray:
        """Decode an image.

        Args:
            encoded: the content of an image file.
            bits: 64 random bits; None: no augmentation.
            name: of the image, for errors.

        Raises:
            ValueError: for content that cannot be read, naming the image.
        """
        with named_if_unreadable(name), pillow().open(io.BytesIO(encoded)) as image:
            if bits is None or self.scale is None:
                pixels = np.asarray(self._center(_upright(image)))
            else:
                pixels = np.asarray(self._random_part(image, random.Random(bits & MASK)))
        return pixels[:, ::-1] if bits is not None and bits < 0 and self.flip else pixels

    def _center(self, image: Any) -> Any:
        (width, height), short = image.size, self.resize
        # the longer side is rounded down, as torchvision does
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        left, top = (round((side - self.size) / 2) for side in size)
        resized = image.resize(size, pillow().Resampling.BILINEAR)
        return resized.crop((left, top, left + self.size, top + self.size))

    def _random_part(self, image: Any, drawn: random.Random) -> Any:
        out, bilinear = (self.size, self.size), pillow().Resampling.BILINEAR
        assert self.scale is not None
        if self.draft and image.format == "JPEG" and _orientation(image) == 1:
            left, top, right, bottom = box = random_box(image.size, self.scale, self.ratio, drawn)
            fit = min(right - left, bottom - top) / self.size
            factor = next((f for f in (8, 4, 2) if f <= fit), 1)
            if factor > 1:
                image.draft(None, tuple(max(1, side // factor) for side in image.size))
                image = rgb(image)
                part = (left / factor, top / factor)
                part += (min(right / factor, image.width), min(bottom / factor, image.height))
                return image.resize(out, bilinear, box=part)
            return _as_rgb(image).crop(box).resize(out, bilinear)
        image = _upright(image)
        return image.crop(random_box(image.size, self.scale, self.ratio, drawn)).resize(out, bilinear)


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], drawn: random.Random
) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of a random crop, as torchvision's ``RandomResizedCrop`` draws it.

    Args:
        size: (width, height) of the image, in pixels.
        scale: of its area.
        ratio: of width and height, drawn evenly by its logarithm.
        drawn: the random numbers.
    """
    width, height = size
    low, high = (math.log(r) for r in ratio)
    for _ in range(10):
        area = width * height * drawn.uniform(*scale)
        aspect = math.exp(drawn.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(drawn.random() * (width - w + 1)), int(drawn.random() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height  # the largest one in the center
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _orientation(image: Any) -> int:
    return image.getexif().get(ORIENTATION, 1)


def _upright(image: Any) -> Any:
    """Return an image in RGB, rotated by its EXIF data."""
    if _orientation(image) != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    return _as_rgb(image)


def _as_rgb(image: Any) -> Any:
    return image if image.mode == "RGB" else rgb(image)  # without a copy
