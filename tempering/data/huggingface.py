"""Load image data sets of Hugging Face ``datasets`` into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from tempering.data.batches import Batches, Splits
from tempering.data.folders import SPLITS, ImageOptions, assembled, memory_for, pixels


def hugging_face(
    source: Any,
    *,
    size: int,
    image: str | None = None,
    label: str | None = None,
    **options: Unpack[ImageOptions],
) -> Splits[Batches]:
    """Load images (3, size, size) and labels of a Dataset or DatasetDict, resized and cropped as ``image_folder`` does.

    All images are kept in memory; for more, and for streamed data sets, use ``lazy_hugging_face``.

    Args:
        source: a ``datasets`` object, or the folder of one (``save_to_disk``). For a name on the hub, pass
            ``datasets.load_dataset(name)``; this function downloads nothing.
        size: height and width of the images in pixels.
        image, label: names of columns; None: the first one of type Image and of type ClassLabel.
        options: batch_size, validation, test, mean, std, crop, flip, seed and channels_last, as ``image_folder`` has
            them.

    Raises:
        ImportError: for a folder without ``datasets`` installed.
        ValueError: for columns or splits that do not exist.
    """
    found = open_splits(source, image, label)
    tensors = {split: _read(part, found.image, found.label, size) for split, part in found.splits.items()}
    return assembled(tensors, found.class_names, found.name, **options)


class Found(NamedTuple):
    """A data set of Hugging Face: its splits by their names here, its columns, the names of its classes, its name."""

    splits: dict[str, Any]
    image: str
    label: str
    class_names: Sequence[str] | None
    name: str


def open_splits(source: Any, image: str | None, label: str | None) -> Found:
    """Find splits and columns of a ``datasets`` object, or of the folder of one.

    Raises:
        ImportError, ValueError: as ``hugging_face`` does.
    """
    name = "data"
    if isinstance(source, (str, Path)):
        name, source = Path(source).name, _load(Path(source))
    parts = dict(source) if isinstance(source, Mapping) else {"train": source}
    splits = {split: parts[n] for split, names in SPLITS.items() for n in names if n in parts}
    if "train" not in splits:
        raise ValueError(f"the data set has the splits {', '.join(parts)}; one must be called train.")
    features = splits["train"].features or {}
    image = _column(features, image, "Image", "image")
    label = _column(features, label, "ClassLabel", "label")
    return Found(splits, image, label, getattr(features[label], "names", None), name)


def _load(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set in {folder}: it is not there. Write one with dataset.save_to_disk(...).")
    try:
        from datasets import load_from_disk  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('hugging_face() reads with datasets: pip install "tempering[datasets]"') from error
    return load_from_disk(str(folder))


def _column(features: Mapping[str, Any], name: str | None, kind: str, argument: str) -> str:
    """Return the named column, or the first one whose feature is of this type."""
    if name is None:
        name = next((column for column, feature in features.items() if type(feature).__name__ == kind), None)
    if name is None or name not in features:
        missing = f"no column is of type {kind}" if name is None else f"there is no column {name!r}"
        raise ValueError(f"{missing}; there are {', '.join(features)}. Name it: {argument}=...")
    return name


def _read(part: Any, image: str, label: str, size: int) -> tuple[Tensor, Tensor]:
    images = memory_for(len(part), size)
    for index, row in enumerate(part):
        images[index] = pixels(row[image], size)
    return torch.from_numpy(images), torch.tensor([int(y) for y in part[label]])
