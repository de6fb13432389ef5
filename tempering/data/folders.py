"""Image folders, a folder a class, read into memory at one size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Batches, Splits, train_val_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as most published teachers want
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def image_folder(
    folder: str | Path,
    *,
    size: int,
    batch_size: int = 64,
    validation: int = 0,
    test: int = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    crop: int = 0,
    flip: bool = False,
    seed: int = 0,
    channels_last: bool = False,
) -> Splits:
    """The images (3, size, size) of FOLDER/CLASS/*.jpg or FOLDER/{train,val,test}/CLASS/*.jpg; classes by name.

    Everything is decoded once and kept in memory: 3 * size * size bytes an image. An image is scaled until it covers
    the square, and its middle is cut out.

    Args:
        folder: as above. Of train and one other split, as ImageNet has them, the other one is the test split.
        size: pixels a side.
        batch_size: of all splits.
        validation, test: images to hold out of the training ones where the folder has no such split, every class in
            proportion; always the same ones.
        mean, std: of each channel, of pixels in [0, 1]; those the teacher was trained with.
        crop, flip: augmentation of the training images.
        seed: of order and augmentation.
        channels_last: the inputs' memory format.

    Raises:
        FileNotFoundError: for a folder without classes or images, saying what was looked for.
        ValueError: for an image that cannot be read, splits of other classes, or no test split.
    """
    folder = Path(folder)
    places = {split: place for split, names in SPLITS.items() if (place := _first(folder, names)) is not None}
    places = places if "train" in places else {"train": folder}
    names = _subfolders(places["train"])
    for split, place in places.items():
        if not names or _subfolders(place) != names:
            raise FileNotFoundError(
                f"{place} should hold one folder a class"
                f"{', the same as ' + str(places['train']) if names and split != 'train' else ''}; it holds "
                f"{', '.join(_subfolders(place)[:5]) or 'no folders'}. Put images as {folder}/CLASS/NAME.jpg, or as "
                f"{folder}/train/CLASS/NAME.jpg with {folder}/test/CLASS/NAME.jpg beside it."
            )
    read = {split: _read(place, names, size) for split, place in places.items()}
    settings = {"batch_size": batch_size, "mean": mean, "std": std, "seed": seed, "channels_last": channels_last}
    settings |= {"class_names": names, "name": folder.resolve().name}
    return assembled(read, settings, {"crop": crop, "flip": flip}, validation=validation, test=test)


def assembled(
    read: Mapping[str, tuple[Tensor, Tensor]],
    settings: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    *,
    validation: int,
    test: int,
) -> Splits:
    """Splits of what was read; those that are missing are held out of the training images.

    Args:
        read: split -> images (N, C, H, W) and labels (N,); "train" is one of them.
        settings: of all splits, as Batches takes them.
        augmentation: of the training images.
        validation, test: how many images to hold out.

    Raises:
        ValueError: for a hold-out of a split that is there, or no test split at all.
    """
    made = {split: Batches(*tensors, **settings) for split, tensors in read.items() if split != "train"}
    train = Batches(*read["train"], **settings, **augmentation, shuffle=True)
    return train_val_split(train, made, validation=validation, test=test)


def pixels(image: Any, size: int) -> np.ndarray:
    """A PIL image as (3, size, size) uint8, scaled to cover the square, its middle cut out, turned as its EXIF says."""
    from PIL import Image, ImageOps

    upright = rgb(ImageOps.exif_transpose(image))
    fitted = ImageOps.fit(upright, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def rgb(image: Any) -> Any:
    """A PIL image in RGB; one of 16 bits by its upper 8, where PIL would cut off what is above 255.

    Raises:
        ValueError: for numbers whose range is not known.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16):
        raise ValueError(f"its mode is {image.mode}, of numbers in any range; write it in 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read(folder: Path, names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise FileNotFoundError(f"{folder} holds classes but no images. Expected {', '.join(SUFFIXES)}.")
    images = np.empty((len(found), 3, size, size), np.uint8)

    def fill(place: int) -> None:
        images[place] = _open(found[place][0], size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(found))))
    return torch.from_numpy(images), torch.tensor([label for _, label in found])


def _open(path: Path, size: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('image folders are read by Pillow: pip install "tempering[data]"') from error
    try:
        with Image.open(path) as image:
            return pixels(image, size)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
        raise ValueError(f"{path} cannot be read as an image ({error}). Remove it, or copy it again.") from error
