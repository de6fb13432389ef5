"""Load image folders, one folder per class, into memory at one size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Batches, Splits, train_val_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as most published teachers expect
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
) -> Splits[Batches]:
    """Load images (3, size, size) from FOLDER/CLASS/*.jpg or FOLDER/{train,val,test}/CLASS/*.jpg, classes by name.

    All images are decoded once and kept in memory: 3 * size * size bytes per image. An image is resized so that its
    shorter side is ``size``, and center cropped. Files and folders whose names begin with a dot, and __MACOSX, are
    skipped.

    Args:
        folder: as above. If it has only train and one other split, as ImageNet has, the other one is the test split.
        size: height and width of the images in pixels.
        batch_size: of all splits.
        validation, test: number of training images to hold out if the folder has no such split, always the same ones,
            stratified by class.
        mean, std: per channel, for pixels in [0, 1]; those the teacher was trained with.
        crop, flip: augmentation of the training images.
        seed: of order and augmentation.
        channels_last: use the channels_last memory format for the inputs.

    Raises:
        FileNotFoundError: for a folder without classes or images, stating which files were looked for.
        ValueError: for an image that cannot be read, splits of different classes, or no test split.
    """
    folder = Path(folder)
    folders = {split: path for split, names in SPLITS.items() if (path := _first(folder, names)) is not None}
    folders = folders if "train" in folders else {"train": folder}
    names = _subfolders(folders["train"])
    for split, path in folders.items():
        if not names or _subfolders(path) != names:
            raise FileNotFoundError(
                f"{path} should hold one folder per class"
                f"{', the same as ' + str(folders['train']) if names and split != 'train' else ''}; it holds "
                f"{', '.join(_subfolders(path)[:5]) or 'no folders'}. Put images as {folder}/CLASS/NAME.jpg, or as "
                f"{folder}/train/CLASS/NAME.jpg and {folder}/test/CLASS/NAME.jpg; a class without images in a split "
                "needs an empty folder there."
            )
    tensors = {split: _read(path, names, size) for split, path in folders.items()}
    options: ImageOptions = {"batch_size": batch_size, "validation": validation, "test": test, "mean": mean, "std": std}
    options |= {"crop": crop, "flip": flip, "seed": seed, "channels_last": channels_last}
    return assembled(tensors, names, folder.resolve().name, **options)


class ImageOptions(TypedDict, total=False):
    """The options of ``image_folder`` that do not depend on where images come from."""

    batch_size: int
    validation: int
    test: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    flip: bool
    seed: int
    channels_last: bool


def assembled(
    read: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str] | None,
    name: str,
    **options: Unpack[ImageOptions],
) -> Splits[Batches]:
    """Build splits from tensors; missing splits are held out of the training images.

    Args:
        read: split -> images (N, C, H, W) and labels (N,); "train" is required.
        class_names: names of the classes, if they are known.
        name: of the data set, for records.
        options: of ``image_folder``; crop and flip are those of the training split.

    Raises:
        ValueError: for a held-out split that already exists, or if there is no test split.
    """
    settings: dict[str, Any] = {"batch_size": 64, "mean": MEAN, "std": STD, "class_names": class_names, "name": name}
    settings |= options
    held_out = {split: settings.pop(split, 0) for split in ("validation", "test")}
    augmentation = {option: settings.pop(option) for option in ("crop", "flip") if option in settings}
    others = {split: Batches(*tensors, **settings) for split, tensors in read.items() if split != "train"}
    train = Batches(*read["train"], **settings, **augmentation, shuffle=True)
    return train_val_split(train, others, **held_out)


def pixels(image: Any, size: int) -> np.ndarray:
    """Convert a PIL image to (3, size, size) uint8: rotate by EXIF data, resize the shorter side, center crop."""
    from PIL import Image, ImageOps

    upright = rgb(ImageOps.exif_transpose(image))
    fitted = ImageOps.fit(upright, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def rgb(image: Any) -> Any:
    """Convert a PIL image to RGB; 16-bit images keep their upper 8 bits, whereas PIL would clip values above 255.

    Raises:
        ValueError: for pixel values of unknown range.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16):
        raise ValueError(f"its mode is {image.mode}, whose values have no fixed range; save it in 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether programs keep own copies under that name, as in .ipynb_checkpoints, __MACOSX or ._1.jpg."""
    return name.startswith(".") or name == "__MACOSX"


def _read(folder: Path, names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not any(map(is_hidden, path.relative_to(folder / name).parts))
        and path.is_file()
    ]
    if not files:
        raise FileNotFoundError(f"{folder} holds classes but no images. Expected {', '.join(SUFFIXES)}.")
    images = np.empty((len(files), 3, size, size), np.uint8)

    def fill(index: int) -> None:
        images[index] = _open(files[index][0], size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(images), torch.tensor([label for _, label in files])


def _open(path: Path, size: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('image folders are read with Pillow: pip install "tempering[data]"') from error
    with named_if_unreadable(path), Image.open(path) as image:
        return pixels(image, size)


@contextmanager
def named_if_unreadable(path: Path) -> Iterator[None]:
    """Turn what Pillow raises for a broken file, or for one of a size that exhausts memory, into one error.

    Raises:
        ValueError: naming the file.
    """
    try:
        yield
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Remove it, or copy it again.") from error
    except Exception as error:
        if type(error).__name__ != "DecompressionBombError":
            raise
        raise ValueError(
            f"{path} has too many pixels: {error} Remove it, or store it smaller; for a file that you trust, set "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
