"""Load image data sets of Hugging Face ``datasets`` into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Batches, Splits
from tempering.data.folders import SPLITS, ImageOptions, assembled, pixels


def hugging_face(
    source: Any,
    *,
    size: int,
    image: str | None = None,
    label: str | None = None,
    **options: Unpack[ImageOptions],
) -> Splits[Batches]:
    """Load images (3, size, size) and labels of a Dataset or DatasetDict, resized and cropped as ``image_folder`` does.

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
    name = "data"
    if isinstance(source, (str, Path)):
        name, source = Path(source).name, _load(Path(source))
    parts = dict(source) if isinstance(source, Mapping) else {"train": source}
    splits = {split: parts[n] for split, names in SPLITS.items() for n in names if n in parts}
    if "train" not in splits:
        raise ValueError(f"the data set has the splits {', '.join(parts)}; one must be called train.")
    features = splits["train"].features
    image = _column(features, image, "Image", "image")
    label = _column(features, label, "ClassLabel", "label")
    names = getattr(features[label], "names", None)
    tensors = {split: _read(part, image, label, size) for split, part in splits.items()}
    return assembled(tensors, names, name, **options)


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
    images = np.empty((len(part), 3, size, size), np.uint8)
    for index, row in enumerate(part):
        images[index] = pixels(row[image], size)
    return torch.from_numpy(images), torch.tensor([int(y) for y in part[label]])
