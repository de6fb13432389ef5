"""Load images from tar shards in the format of webdataset."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import Splits
from tempering.data.folders import SPLITS
from tempering.data.lazy_images import LazyOptions, assembled_lazily, class_names_of
from tempering.data.streamed_images import WebShards, assembled_streams, class_number, member

IMAGES = "jpg;jpeg;png;webp"
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's: up to the first dot of the name


def webdataset(
    shards: str | Path | Sequence[str] | Mapping[str, str | Path | Sequence[str]],
    *,
    size: int,
    image: str = IMAGES,
    label: str = "cls",
    classes: Sequence[str] | int | None = None,
    length: int | None = None,
    **options: Unpack[LazyOptions],
) -> Splits[Any]:
    """Load images (3, size, size) and labels from tar shards of webdataset, decoded by worker processes.

    Augmented as by ``lazy_image_folder``. Without ``length`` the headers of the shards are read once, and samples then
    at random, by their place in their shard (``LazyBatches``): for shards on a local disk. Samples have ids, in the
    order of the shards, for cached teachers, and splits can be held out. With ``length`` shards are streamed by the
    package webdataset, from addresses and pipes too, each worker its own (``StreamedImages``).

    Args:
        shards: patterns such as "train-{000000..000146}.tar" or "pipe:curl -s URL-{000..146}.tar", a list of shards, or
            a folder of them; as a mapping of train, val and test, or of the training split alone.
        size: height and width of the inputs in pixels.
        image, label: names of a sample's members; of several, separated by ";", the first that it has. The label is
            the number of a class, as text.
        classes: names of the classes, or their number; None: the largest label plus one, if they are not streamed.
        length: samples per epoch of the training split, which is then streamed.
        options: as ``lazy_image_folder`` has them.

    Raises:
        ImportError: without webdataset.
        FileNotFoundError: for a shard that is not a file and cannot be streamed.
        ValueError: for shards that cannot be read, samples without image or label, and splits as in ``image_folder``.
    """
    patterns = dict(shards) if isinstance(shards, Mapping) else {"train": shards}
    found = {split: _expanded(patterns[n]) for split, names in SPLITS.items() for n in names if n in patterns}
    if "train" not in found:
        raise ValueError(f"the shards have the splits {', '.join(patterns)}; one must be called train.")
    name = re.sub(r"\W*\d.*", "", Path(found["train"][0]).name) or "shards"
    names = None if classes is None else class_names_of(classes)
    if length is not None:
        if names is None:
            raise ValueError(
                "streamed shards do not say how many classes there are: give classes=1000, or their names."
            )
        streams = {split: WebShards(urls, image=image, label=label) for split, urls in found.items()}
        return assembled_streams(streams, names, name, size=size, length=length, **options)
    parts = {split: index_shards(urls, image=image, label=label) for split, urls in found.items()}
    largest = max(int(labels.max()) for _, labels in parts.values())
    return assembled_lazily(parts, names or class_names_of(largest + 1), name, size=size, **options)


class Place(NamedTuple):
    """Where the image of a sample is."""

    key: str
    shard: int
    start: int
    length: int
    label: int


class TarShards:
    """The images of tar shards, read at random.

    Args:
        paths: of the shards.
        places: of the images.
    """

    def __init__(self, paths: Sequence[str], places: Sequence[Place]) -> None:
        self.paths = list(paths)
        self.keys = np.array([place.key.encode() for place in places])
        self.shards, self.starts, self.lengths = (
            np.array([getattr(place, name) for place in places]) for name in ("shard", "start", "length")
        )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> bytes:
        """Return the content of the image's file."""
        with open(self.paths[self.shards[i]], "rb") as file:
            file.seek(self.starts[i])
            return file.read(self.lengths[i])

    def name(self, i: int) -> str:
        """Return shard and key."""
        return f"{self.paths[self.shards[i]]}: {self.keys[i].decode()}"

    def digest(self, index: np.ndarray) -> bytes:
        """Hash keys and sizes in bytes."""
        keys, sizes = b"\0".join(self.keys[index].tolist()), self.lengths[index].astype("<i8")
        return hashlib.sha256(keys + b"\0" + sizes.tobytes()).digest()


def index_shards(paths: Sequence[str], *, image: str, label: str) -> tuple[TarShards, Tensor]:
    """Read the headers of shards, and return their images and labels.

    Raises:
        FileNotFoundError: for a shard that is no file.
        ValueError: for one that is no tar file, or is compressed, and for a sample without image or label.
    """
    places: list[Place] = []
    for number, path in enumerate(paths):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no file {path}. Addresses and pipes are streamed: give length=, the number of samples."
            )
        try:
            with tarfile.open(path, "r:") as tar:
                places += _samples(tar, path, number, image, label)
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} cannot be read as a tar file ({error}). One that is compressed can be streamed: give length=, "
                "the number of samples."
            ) from error
    if not places:
        raise ValueError(f"there are no samples in {', '.join(paths[:3])}.")
    return TarShards(paths, places), torch.tensor([place.label for place in places])


def _samples(tar: tarfile.TarFile, path: str, number: int, image: str, label: str) -> Iterator[Place]:
    """Yield the samples of a shard: members in a row whose names are equal up to the first dot."""
    named = ((match, info) for info in tar if info.isreg() and (match := KEY.fullmatch(info.name)))
    for key, members in groupby(named, lambda item: item[0][1]):
        place, sample = f"{path}: {key}", {match[2].lower(): info for match, info in members}
        picture, number_of = (member(sample, names, place) for names in (image, label))
        content: Any = tar.extractfile(number_of)
        yield Place(key, number, picture.offset_data, picture.size, class_number(content.read(), place))


def _expanded(pattern: str | Path | Sequence[str]) -> list[str]:
    """Return the shards of a pattern with braces, of a list, or of a folder.

    Raises:
        ImportError: without webdataset.
        ValueError: for none.
    """
    if isinstance(pattern, (str, Path)) and Path(pattern).is_dir():
        found = sorted(map(str, Path(pattern).glob("*.tar")))
    elif not isinstance(pattern, (str, Path)) and all(isinstance(each, Path) for each in pattern):
        found = [str(each) for each in pattern]
    else:
        try:
            from webdataset.shardlists import expand_urls  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError('shards are read with webdataset: pip install "tempering[images]"') from error
        listed = [pattern] if isinstance(pattern, (str, Path)) else pattern
        found = [url for each in listed for url in expand_urls(str(each))]
    if not found:
        raise ValueError(f"there are no shards in {pattern!r}. Give a pattern, such as 'train-{{000..146}}.tar'.")
    return found
