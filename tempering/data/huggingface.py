"""Load image data sets of Hugging Face ``datasets``, into memory or as images are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Batches, Splits
from tempering.data.folders import SPLITS, ImageOptions, assembled, memory_for, pixels

if TYPE_CHECKING:
    from tempering.data.lazy_images import LazyOptions


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


def lazy_hugging_face(
    source: Any,
    *,
    size: int,
    image: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | int | None = None,
    length: int | None = None,
    **options: Unpack[LazyOptions],
) -> Splits[Any]:
    """Load images (3, size, size) and labels of a data set as they are needed, decoded by worker processes.

    Augmented as by ``lazy_image_folder``. A Dataset has samples that are read at random, ids and held-out splits
    (``LazyBatches``); an IterableDataset, ``load_dataset(NAME, streaming=True)``, is read in the order of its shards
    (``StreamedImages``).

    Args:
        source: as for ``hugging_face``, or a streamed one.
        size: height and width of the inputs in pixels.
        image, label: names of columns; None: the first one of type Image and of type ClassLabel.
        classes: names of the classes, or their number; None: those of the label's column.
        length: samples per epoch of a streamed training split; None: the number that the data set states.
        options: as ``lazy_image_folder`` has them.

    Raises:
        ImportError: for a folder without ``datasets`` installed.
        ValueError: for columns or splits that do not exist, or a stream whose length or classes are not known.
    """
    found = open_splits(source, image, label)
    names = found.class_names if classes is None else class_names_of(classes)
    if any(hasattr(part, "__len__") for part in found.splits.values()):
        from tempering.data.lazy_images import assembled_lazily

        parts = {
            split: (HuggingFaceRows(part, found.image), torch.tensor([int(y) for y in part[found.label]]))
            for split, part in found.splits.items()
        }
        return assembled_lazily(parts, names, found.name, size=size, **options)
    from tempering.data.streamed_images import HuggingFaceStream, assembled_streams

    if names is None:
        raise ValueError(f"the column {found.label} does not say how many classes there are: give classes=.")
    train = found.splits["train"]
    stated = (train.info.splits or {}).get(str(train.split))
    length = length or (None if stated is None else stated.num_examples)
    columns = {"image": found.image, "label": found.label}
    streams = {split: HuggingFaceStream(part, **columns) for split, part in found.splits.items()}
    return assembled_streams(streams, names, found.name, size=size, length=length, **options)


def class_names_of(classes: Sequence[str] | int) -> Sequence[str]:
    """Return names of classes; of a number of classes their numbers."""
    return [str(i) for i in range(classes)] if isinstance(classes, int) else classes


class HuggingFaceRows:
    """The images of a Dataset, not decoded.

    Args:
        dataset: of ``datasets``.
        image: name of the column.
    """

    def __init__(self, dataset: Any, image: str) -> None:
        from datasets import Image  # pyright: ignore[reportMissingImports]

        self.dataset, self.image = dataset.with_format(None).select_columns([image]), image
        self.dataset = self.dataset.cast_column(image, Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> bytes:
        """Return the content of the image's file."""
        return encoded_bytes(self.dataset[i][self.image], self.name(i))

    def name(self, i: int) -> str:
        """Return the number of the row."""
        return f"row {i} of the data set"

    def digest(self, index: np.ndarray) -> bytes:
        """Hash the number of rows; the loader hashes labels and the content of some."""
        return hashlib.sha256(f"{len(self)} {len(index)}".encode()).digest()


def encoded_bytes(value: Any, name: str) -> bytes:
    """Return the content of the file of an image that ``datasets`` did not decode.

    Raises:
        ValueError: if it has none, naming the image.
    """
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, Mapping) and value.get("path"):
        return Path(value["path"]).read_bytes()
    raise ValueError(f"{name} has no image, but {type(value).__name__}.")


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
