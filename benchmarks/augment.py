"""Crop, flip and normalize 32 x 32 images: an image at a time by PIL (torchvision's transforms) against our batches.

Usage:
    python benchmarks/augment.py [--rounds 9] [--images 4096] [--tiny]
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from timing import Sheet, Variant, arguments, in_turn, installed
from torch import Tensor

from tempering.data import Batches

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
BATCH = 64


def transform() -> tuple[Callable[[Image.Image], Tensor], str]:
    """torchvision's own transforms where it is installed, else the same four steps; and which it is."""
    if installed("torchvision"):
        from torchvision import transforms as T  # pyright: ignore[reportMissingImports]

        return T.Compose(
            [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
        ), "torchvision"
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))

    def by_hand(image: Image.Image) -> Tensor:
        image = ImageOps.expand(image, 4)
        left, top = random.randint(0, 8), random.randint(0, 8)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255.0
        return (x - mean) / std

    return by_hand, "re-stated"


def pil(pixels: np.ndarray, change: Callable[[Image.Image], Tensor]) -> Variant:
    """Every image changed by itself, and stacked by batches."""

    def run() -> None:
        for start in range(0, len(pixels), BATCH):
            torch.stack([change(Image.fromarray(x)) for x in pixels[start : start + BATCH]])

    return run


def ours(pixels: np.ndarray, *, channels_last: bool) -> Variant:
    """An epoch of our batches."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.zeros(len(images), dtype=torch.int64)
    how = {"mean": MEAN, "std": STD, "crop": 4, "flip": True, "channels_last": channels_last}
    batches = Batches(images, labels, batch_size=BATCH, shuffle=True, **how)

    def run() -> None:
        for _ in batches:
            pass

    return run


def main() -> None:
    """Time the variants; the milliseconds are those of a batch of 64."""
    args = arguments(__doc__, rounds=9, images=4096).parse_args()
    sheet = Sheet("augment", args)
    n = 128 if args.tiny else args.images
    pixels = np.random.default_rng(0).integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    change, which = transform()
    first = "PIL, an image at a time"
    variants = {first: pil(pixels, change)}
    variants |= {
        f"ours, {name}": ours(pixels, channels_last=name == "channels-last") for name in ("planes", "channels-last")
    }
    taken = in_turn(variants, rounds=args.rounds)
    sheet.add("crop 4, flip, normalise, batch of 64", taken, notes={first: which}, per=n // BATCH)
    print(sheet.write())


if __name__ == "__main__":
    main()
