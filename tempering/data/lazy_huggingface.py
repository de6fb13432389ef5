"""Load image data sets of Hugging Face ``datasets`` as images are needed, at random or streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch.utils.data import get_worker_info

from tempering.data.batches import Splits
from tempering.data.huggingface import open_splits
from tempering.data.lazy_images import LazyOptions, assembled_lazily, class_names_of
from tempering.data.streamed_images import BUFFER, Sample, assembled_streams


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
        parts = {
            split: (HuggingFaceRows(part, found.image), torch.tensor([int(y) for y in part[found.label]]))
            for split, part in found.splits.items()
        }
        return assembled_lazily(parts, names, found.name, size=size, **options)
    if names is None:
        raise ValueError(f"the column {found.label} does not say how many classes there are: give classes=.")
    train = found.splits["train"]
    stated = (train.info.splits or {}).get(str(train.split))
    length = length or (None if stated is None else stated.num_examples)
    columns = {"image": found.image, "label": found.label}
    streams = {split: HuggingFaceStream(part, **columns) for split, part in found.splits.items()}
    return assembled_streams(streams, names, found.name, size=size, length=length, **options)


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


class HuggingFaceStream:
    """A streamed data set of Hugging Face.

    Args:
        dataset: an IterableDataset.
        image, label: names of its columns.
    """

    def __init__(self, dataset: Any, *, image: str, label: str) -> None:
        from datasets import Image  # pyright: ignore[reportMissingImports]

        self.dataset = dataset.select_columns([image, label]).cast_column(image, Image(decode=False))
        self.image, self.label = image, label
        self.shards: int = getattr(dataset, "num_shards", None) or dataset.n_shards
        facts = (dataset.info.dataset_name, dataset.info.config_name, str(dataset.split), dataset.features, self.shards)
        self.identity = hashlib.sha256(repr(facts).encode()).hexdigest()

    def samples(self, part: int, parts: int, order: tuple[int, int] | None) -> Iterator[Sample]:
        """Iterate over the samples of this part of the shards."""
        from datasets.distributed import split_dataset_by_node  # pyright: ignore[reportMissingImports]

        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        read = self.dataset
        if order is not None:
            read = read.shuffle(seed=order[0], buffer_size=BUFFER)
            read.set_epoch(order[1])
        # the data set splits itself over the workers of a process
        if parts > workers:
            read = split_dataset_by_node(read, rank=part // workers, world_size=parts // workers)
        for number, row in enumerate(read):
            name = (row[self.image] or {}).get("path") or f"sample {number} of part {part} of {parts}"
            yield name, encoded_bytes(row[self.image], name), int(row[self.label])
