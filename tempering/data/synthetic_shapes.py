"""Colored shapes on noise, drawn from a seed: a detection data set of any size without a download."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from tempering.data.batches import Splits
from tempering.data.detection import DetectionLoader

SHAPES = ("rectangle", "ellipse", "triangle")
TRAIN, TEST = 480, 160


def synthetic_shapes(
    *,
    size: int = 96,
    train: int = TRAIN,
    test: int = TEST,
    batch_size: int = 16,
    most: int = 4,
    flip: bool = True,
    epochs: int = 1,
    seed: int = 0,
) -> Splits:
    """Images (3, size, size) with up to ``most`` rectangles, ellipses and triangles of any color; a tenth has none.

    The images depend on their split, number and size alone.

    Args:
        size: pixels a side.
        train, test: images of each split.
        batch_size: of both.
        most: shapes an image, at most.
        flip: augmentation of the training images.
        epochs, seed: as Scenes has them, of order and augmentation; not of the images.

    Raises:
        ValueError: for a size below 16.
    """
    if size < 16 or most < 1:
        raise ValueError(f"shapes() needs size >= 16 and most >= 1; got size={size} and most={most}.")
    made = {}
    for split, count in (("train", train), ("test", test)):
        drawn = [_scene(split, i, size, most) for i in range(count)]
        images = torch.from_numpy(np.stack([image for image, _, _ in drawn]).transpose(0, 3, 1, 2).copy())
        boxes = [torch.tensor(b, dtype=torch.float32).view(-1, 4) for _, b, _ in drawn]
        labels = [torch.tensor(y, dtype=torch.int64) for _, _, y in drawn]
        own = split == "train"
        made[split] = DetectionLoader(
            images,
            boxes,
            labels,
            batch_size=batch_size,
            class_names=SHAPES,
            shuffle=own,
            flip=own and flip,
            epochs=epochs,
            seed=seed,
            name=f"shapes{size}",
        )
    return Splits(made["train"], None, made["test"])


def _scene(split: str, number: int, size: int, most: int) -> tuple[np.ndarray, list[list[float]], list[int]]:
    """One image (size, size, 3) with the boxes and labels of its shapes; later ones lie on earlier ones."""
    key = int.from_bytes(hashlib.sha256(f"{split}/{number}/{size}/{most}".encode()).digest()[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    ground = rng.uniform(40, 215, 3)
    image = ground + rng.normal(0, 20, (size, size, 3))
    boxes: list[list[float]] = []
    labels: list[int] = []
    for _ in range(0 if rng.random() < 0.1 else rng.integers(1, most + 1)):
        width, height = rng.uniform(0.16, 0.5, 2) * size
        x, y = rng.uniform(0, size - width), rng.uniform(0, size - height)
        box = [x, y, x + width, y + height]
        # one that hides another, or is hidden, would be a box of nothing
        if any(_overlap(box, other) > 0.2 for other in boxes):
            continue
        label = int(rng.integers(len(SHAPES)))
        color = _color(rng, label)
        while np.abs(color - ground).max() < 60:
            color = _color(rng, label)
        inside = _mask(SHAPES[label], box, size)
        image[inside] = color + rng.normal(0, 20, (int(inside.sum()), 3))
        boxes.append(box)
        labels.append(label)
    return image.round().clip(0, 255).astype(np.uint8), boxes, labels


def _color(rng: np.random.Generator, label: int) -> np.ndarray:
    """A color with much of the class's own channel: a strong hint, which the ground's color disturbs."""
    color = rng.uniform(0, 140, 3)
    color[label] += 115
    return color


def _mask(shape: str, box: list[float], size: int) -> np.ndarray:
    """Which pixels (size, size) have their middle in the shape that fills the box."""
    y, x = np.mgrid[:size, :size] + 0.5
    u, v = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
    if shape == "ellipse":
        return (2 * u - 1) ** 2 + (2 * v - 1) ** 2 <= 1
    within = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    return within if shape == "rectangle" else within & (np.abs(2 * u - 1) <= v)


def _overlap(a: list[float], b: list[float]) -> float:
    """The intersection's share of the smaller box."""
    wide, high = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return max(wide, 0.0) * max(high, 0.0) / min(areas)
