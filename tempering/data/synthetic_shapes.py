"""Generate images of colored shapes on noise, with boxes or masks, of any size, without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

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
    max_objects: int = 4,
    flip: bool = True,
    epochs: int = 1,
    seed: int = 0,
) -> Splits[DetectionLoader]:
    """Generate images (3, size, size) with up to ``max_objects`` rectangles, ellipses and triangles; a tenth has none.

    The images depend on their split, number, ``size`` and ``max_objects`` alone.

    Args:
        size: height and width of the images in pixels.
        train, test: number of images of each split.
        batch_size: of both splits.
        max_objects: maximal number of shapes per image.
        flip: augmentation of the training images.
        epochs, seed: of order and augmentation, as in ``DetectionLoader``; not of the images.

    Raises:
        ValueError: for a size below 16 or ``max_objects`` below 1.
    """
    _check("synthetic_shapes", size, max_objects)
    splits = {}
    for split, count in (("train", train), ("test", test)):
        examples = [_generate(split, i, size, max_objects) for i in range(count)]
        images = torch.from_numpy(np.stack([image for image, *_ in examples]).transpose(0, 3, 1, 2).copy())
        boxes = [torch.tensor(b, dtype=torch.float32).view(-1, 4) for _, b, _, _ in examples]
        labels = [torch.tensor(y, dtype=torch.int64) for _, _, y, _ in examples]
        training = split == "train"
        splits[split] = DetectionLoader(
            images,
            boxes,
            labels,
            batch_size=batch_size,
            class_names=SHAPES,
            shuffle=training,
            flip=training and flip,
            epochs=epochs,
            seed=seed,
            name=f"shapes{size}",
        )
    return Splits(splits["train"], None, splits["test"])


def synthetic_masks(
    *, size: int = 64, train: int = TRAIN, test: int = TEST, batch_size: int = 16, max_objects: int = 4
) -> Splits[Any]:
    """Generate the images of ``synthetic_shapes`` with masks, for ``Segmentation``.

    Batches of the two DataLoaders are images (B, 3, size, size) in float32, with mean and scale near 0 and 1, masks
    (B, size, size) in uint8, and ids. Classes are 0 for the background and 1 to 3 for ``SHAPES``; pixels at the edge of
    a shape are 255, as in Pascal VOC.

    Args:
        size: height and width of the images in pixels.
        train, test: number of images of each split.
        batch_size: of both splits.
        max_objects: maximal number of shapes per image.

    Raises:
        ValueError: for a size below 16 or ``max_objects`` below 1.
    """
    _check("synthetic_masks", size, max_objects)
    loaders = []
    for split, count in (("train", train), ("test", test)):
        examples = [_generate(split, i, size, max_objects) for i in range(count)]
        images = np.stack([image for image, *_ in examples]).transpose(0, 3, 1, 2).astype(np.float32)
        masks = torch.from_numpy(np.stack([mask for *_, mask in examples]))
        data = TensorDataset(torch.from_numpy((images - 128.0) / 64.0), masks, torch.arange(count))
        loaders.append(DataLoader(data, batch_size, shuffle=split == "train"))
    return Splits(loaders[0], None, loaders[1])


def _check(owner: str, size: int, max_objects: int) -> None:
    if size < 16 or max_objects < 1:
        raise ValueError(
            f"{owner}() needs size >= 16 and max_objects >= 1; got size={size} and max_objects={max_objects}."
        )


def _generate(
    split: str, number: int, size: int, max_objects: int
) -> tuple[np.ndarray, list[list[float]], list[int], np.ndarray]:
    """Generate an image (size, size, 3) with the boxes, labels and mask of its shapes; later shapes cover earlier ones.

    The mask (size, size) has 0 for the background, the label + 1 in a shape, and 255 at its edge.
    """
    key = int.from_bytes(hashlib.sha256(f"{split}/{number}/{size}/{max_objects}".encode()).digest()[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    background = rng.uniform(40, 215, 3)
    image = background + rng.normal(0, 20, (size, size, 3))
    boxes: list[list[float]] = []
    labels: list[int] = []
    mask = np.zeros((size, size), dtype=np.uint8)
    for _ in range(0 if rng.random() < 0.1 else rng.integers(1, max_objects + 1)):
        width, height = rng.uniform(0.16, 0.5, 2) * size
        x, y = rng.uniform(0, size - width), rng.uniform(0, size - height)
        box = [x, y, x + width, y + height]
        # skip shapes that overlap another one: a hidden shape would be a box without an object
        if any(_overlap(box, other) > 0.2 for other in boxes):
            continue
        label = int(rng.integers(len(SHAPES)))
        color = _color(rng, label)
        while np.abs(color - background).max() < 60:
            color = _color(rng, label)
        inside = _mask(SHAPES[label], box, size)
        image[inside] = color + rng.normal(0, 20, (int(inside.sum()), 3))
        mask[inside] = label + 1
        mask[_edge(inside)] = 255
        boxes.append(box)
        labels.append(label)
    return image.round().clip(0, 255).astype(np.uint8), boxes, labels, mask


def _edge(inside: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask (size, size) that have a neighbor outside of it."""
    padded = np.pad(inside, 1, mode="edge")
    whole = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~whole


def _color(rng: np.random.Generator, label: int) -> np.ndarray:
    """Draw a color with a high value in the channel of the class, a strong but not sufficient hint."""
    color = rng.uniform(0, 140, 3)
    color[label] += 115
    return color


def _mask(shape: str, box: list[float], size: int) -> np.ndarray:
    """Return a mask (size, size) of the pixels whose center is in the shape that fills the box."""
    y, x = np.mgrid[:size, :size] + 0.5
    u, v = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])
    if shape == "ellipse":
        return (2 * u - 1) ** 2 + (2 * v - 1) ** 2 <= 1
    in_box = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    return in_box if shape == "rectangle" else in_box & (np.abs(2 * u - 1) <= v)


def _overlap(a: list[float], b: list[float]) -> float:
    """Return the intersection of two boxes as a fraction of the smaller area."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return max(width, 0.0) * max(height, 0.0) / min(areas)
