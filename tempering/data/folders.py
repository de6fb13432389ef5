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
    validation: float = 0,
    test: float = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    crop: int = 0,
    flip: bool = False,
    seed: int = 0,
    channels_last: bool = False,
) -> Splits[Batches]:
    """Load images (3, size, size) from FOLDER/CLASS/*.jpg or FOLDER/{train,val,test}/CLASS/*.jpg, classes by name.

    All images are decoded once and kept in memory: 3 * size * size bytes per image, 1.5 GB for 10,000 of 224 pixels.
    For more, ``lazy_image_folder`` decodes each when it is needed, in worker processes. An image is resized so that its
    shorter side is ``size``, and center cropped. Files and folders whose names begin with a dot, and __MACOSX, are
    skipped.

    Args:
        folder: as above. If it has only train and one other split, as ImageNet has, the other one is the test split.
        size: height and width of the images in pixels.
        batch_size: of all splits.
        validation, test: number of training images to hold out if the folder has no such split, always the same ones,
            stratified by class; or a fraction below 1, which is ignored if the folder has the split.
        mean, std: per channel, for pixels in [0, 1]; those the teacher was trained with.
        crop, flip: augmentation of the training images.
        seed: of order and augmentation.
        channels_last: use the channels_last memory format for the inputs.

    Raises:
        FileNotFoundError: for a folder without classes or images, stating which files were looked for.
        ValueError: for an image that cannot be read, splits of different classes, no test split, or more images than
            the machine has memory for.
    """
    names, folders = class_folders(folder)
    tensors = {split: _read(path, names, size) for split, path in folders.items()}
    options: ImageOptions = {"batch_size": batch_size, "validation": validation, "test": test, "mean": mean, "std": std}
    options |= {"crop": crop, "flip": flip, "seed": seed, "channels_last": channels_last}
    return assembled(tensors, names, Path(folder).resolve().name, **options)


def class_folders(folder: str | Path) -> tuple[list[str], dict[str, Path]]:
    """Return the names of the classes, and split -> the folder that holds a folder per class.

    Raises:
        FileNotFoundError: for a folder without classes, or splits of different classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} in {Path.cwd()}; it should hold one folder per class.")
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
    return names, folders


class ImageOptions(TypedDict, total=False):
    """The options of ``image_folder`` that do not depend on where images come from."""

    batch_size: int
    validation: float
    test: float
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


def list_images(folder: Path, names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the images of every class in sorted order, relative to the folder, and their labels.

    Raises:
        FileNotFoundError: if there are none.
    """
    files: list[str] = []
    counts = []
    for name in names:
        found = []
        for parent, folders, inside in os.walk(folder / name):
            folders[:] = [each for each in folders if not is_hidden(each)]
            images = (each for each in inside if each.lower().endswith(SUFFIXES) and not is_hidden(each))
            found += [os.path.join(parent, each) for each in images]
        found = sorted(filter(os.path.isfile, found), key=lambda path: os.path.normcase(path).split(os.sep))
        files += (os.path.relpath(path, folder) for path in found)
        counts.append(len(found))
    if not files:
        raise FileNotFoundError(f"{folder} holds classes but no images. Expected {', '.join(SUFFIXES)}.")
    return files, torch.repeat_interleave(torch.arange(len(names)), torch.tensor(counts))


def memory_for(count: int, size: int) -> np.ndarray:
    """Return an array for ``count`` images, (count, 3, size, size) uint8.

    Raises:
        ValueError: if it is larger than the memory of this machine, naming the functions that need less.
    """
    needed = 3 * size * size * count
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > total:
        raise ValueError(
            f"{count:,} images of {size} x {size} pixels take {needed / 2**30:.1f} GiB, and this machine has "
            f"{total / 2**30:.1f} GiB of memory. Decode them when they are needed: data.lazy_image_folder(folder, "
            "size=...), or data.lazy_hugging_face(source, size=...)."
        )
    return np.empty((count, 3, size, size), np.uint8)


def _read(folder: Path, names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    files, labels = list_images(folder, names)
    images = memory_for(len(files), size)

    def fill(index: int) -> None:
        images[index] = _open(folder / files[index], size)

    with decoders() as pool:
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(images), labels


def decoders() -> ThreadPoolExecutor:
    """Return threads that decode: Pillow releases the GIL while it does."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def pillow() -> Any:
    """Import PIL.Image.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images are read with Pillow: pip install "tempering[data]"') from error
    return Image


def _open(path: Path, size: int) -> np.ndarray:
    with named_if_unreadable(path), pillow().open(path) as image:
        return pixels(image, size)


@contextmanager
def named_if_unreadable(path: object) -> Iterator[None]:
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
