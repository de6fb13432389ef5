"""Load batches of images from streams without random access: webdataset shards, streamed data sets of Hugging Face."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tempering.data.batches import EpochLoader, Splits, check_statistics, normalized, random_bits, statistics_on
from tempering.data.decoding import RATIO, Decoding
from tempering.data.folders import MEAN, STD
from tempering.data.lazy_images import (
    Failed,
    Lost,
    OnError,
    check_decoding,
    decoded,
    loaded,
    with_defaults,
    worker_count,
)
from tempering.utils.tensors import to_device

BUFFER = 1000  # encoded samples of which one is drawn at random
Sample = tuple[str, bytes, int]  # name, content of an image file, label


class SampleStream(Protocol):
    """A stream of samples in shards; it is copied to worker processes.

    Attributes:
        identity: hash of what is streamed.
        shards: number of its parts that can be read independently.
    """

    identity: str
    shards: int

    def samples(self, part: int, parts: int, order: tuple[int, int] | None) -> Iterator[Sample]:
        """Iterate over the samples of every ``parts``-th shard, from shard ``part`` on.

        Args:
            part, parts: this worker of all workers of all ranks.
            order: (seed, epoch) of shuffled shards and samples; None: the stored order.
        """
        ...


class StreamedImages(EpochLoader[tuple[Tensor, Tensor]]):
    """Load batches of (inputs (B, 3, size, size) float32 normalized, labels (B,)) from a stream, decoded by workers.

    An epoch of training has length // batch_size batches of full size. Each worker of each rank reads its own shards,
    in an order drawn for the epoch, and begins again if they end before the epoch does: with shards of unequal sizes
    some images come twice in an epoch, and others in a later one. A split that is not shuffled is read once; its
    batches may be short, and their number is not known in advance.

    Everything drawn depends on (seed, epoch, number of workers). ``iterate(start)`` reads the batches before ``start``
    without decoding them, and continues with the same bits. Samples have no ids, so a teacher's logits are not cached.

    Args:
        stream: the encoded samples.
        batch_size: images per step, over all ranks.
        size, resize, mean, std, scale, ratio, flip, draft, on_error, channels_last: as in ``LazyBatches``.
        length: samples per epoch; needed for shuffled splits.
        classes: names of the classes, or their number.
        shuffle: shuffle shards, and samples within a buffer of 1,000; read the shards repeatedly.
        workers: worker processes, at most one per shard and rank; None: one per CPU, at most 8. Batches depend on it.
        seed: of order and augmentation.
        name: of the data set, for records.

    Raises:
        ValueError: for an invalid argument, stating what is accepted.
    """

    class_names: tuple[str, ...] | None

    def __init__(
        self,
        stream: SampleStream,
        *,
        batch_size: int,
        size: int,
        classes: Sequence[str] | int,
        length: int | None = None,
        resize: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        shuffle: bool = False,
        scale: Sequence[float] | None = None,
        ratio: Sequence[float] = RATIO,
        flip: bool = False,
        draft: bool = True,
        workers: int | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
        channels_last: bool = False,
        name: str = "data",
    ) -> None:
        self.stream, self.batch_size, self.side, self.length = stream, batch_size, size, length
        self.resize = round(size / 0.875) if resize is None else resize
        self.class_names = None if isinstance(classes, int) else tuple(classes)
        self.classes = classes if isinstance(classes, int) else len(classes)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.shuffle, self.flip, self.draft = shuffle, flip, draft
        self.on_error: OnError = on_error
        self.scale, self.ratio = None if scale is None else [*map(float, scale)], [*map(float, ratio)]
        self.seed, self.channels_last, self.name = seed, channels_last, name
        self.epoch, self.rank, self.world, self.device = 0, 0, 1, torch.device("cpu")
        self.workers = min(worker_count(workers), stream.shards)
        kind = type(self).__name__
        check_statistics(kind, self.mean, self.std, 3)
        check_decoding(kind, self.side, self.resize, self.scale, self.ratio, on_error)
        if batch_size < 1 or self.classes < 1:
            raise ValueError(f"{kind} needs batch_size >= 1 and classes; got {batch_size} and {classes}.")
        if shuffle and (length is None or length < batch_size):
            raise ValueError(
                f"a training stream needs the number of its samples per epoch, at least batch_size={batch_size}: "
                f"length=1281167 for ImageNet; got length={length}."
            )

    def __repr__(self) -> str:
        shards = f"{self.stream.shards} shards, batch_size={self.batch_size}, workers={self.workers}"
        return f"StreamedImages({self.name}: {self.length} images per epoch, {self.classes} classes, {shards})"

    @property
    def identity(self) -> str:
        """SHA-256 of the names of the shards or the data set's fingerprint, length, size, mean and std."""
        settings = (self.stream.identity, self.length, self.side, self.resize, self.mean, self.std)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    @property
    def size(self) -> int | None:
        """Number of samples in an epoch; None if it is not known."""
        return len(self) * self.batch_size if self.shuffle else self.length

    @property
    def augmentation(self) -> dict[str, Any]:
        """Description of the augmentation, JSON-able."""
        augmented = self.scale is not None or self.flip
        return {"scale": self.scale, "flip": self.flip, "seed": self.seed if augmented else None, "views": None}

    def __len__(self) -> int:
        if not self.shuffle or self.length is None:
            raise TypeError(f"{self.name}: the number of batches of a stream that is read once is not known.")
        return self.length // self.batch_size

    def shard(self, rank: int, world: int) -> Self:
        """Return a loader of this rank's part of every batch, from its own shards.

        Raises:
            ValueError: for a batch size that ``world`` does not divide, or fewer shards than ranks.
        """
        if self.batch_size % world or self.stream.shards < world:
            raise ValueError(
                f"{self.name} has {self.stream.shards} shards and batch_size={self.batch_size}, which cannot be split "
                f"over {world} processes: each needs shards of its own, and an equal part of every batch."
            )
        return self._replace(rank=rank, world=world, workers=min(self.workers, self.stream.shards // world))

    def to(self, device: torch.device | str) -> Self:
        """Return a loader of the same data that normalizes on ``device``."""
        return self._replace(device=torch.device(device))

    def _iterate_epoch(self, start: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        turns = max(1, self.workers)
        reader, lost = _Epoch(self, epoch, first=start // turns), Lost(self.on_error)
        mean, std = statistics_on(self.device, self.mean, self.std)
        # workers take turns, so a batch that is not the first of a turn follows those before it in the turn
        for read in itertools.islice(loaded(reader, None, self.workers, self.device), start % turns, None):
            pixels, failed, labels = read
            pixels, kept = lost.without(pixels, failed)
            inputs = normalized(to_device(pixels, self.device), mean, std, channels_last=self.channels_last)
            yield inputs, to_device(labels[kept], self.device)
        lost.report(self.name)


class _Epoch(IterableDataset[tuple[Tensor, Failed, Tensor]]):
    """An epoch of a loader, from every worker's batch ``first`` on."""

    def __init__(self, loader: StreamedImages, epoch: int, *, first: int) -> None:
        self.loader, self.epoch, self.first = loader, epoch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Failed, Tensor]]:
        loader, info = self.loader, get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        decoding, size = Decoding.of(loader), loader.batch_size // loader.world
        samples = self._samples(loader.rank * workers + worker, loader.world * workers)
        numbers = itertools.count(worker, workers)  # of the batches of this worker
        for _ in itertools.islice(samples, self.first * size):
            pass  # read and not decoded
        for number in itertools.islice(numbers, self.first, None):
            if loader.shuffle and number >= len(loader):
                return
            batch = list(itertools.islice(samples, size))
            if not batch:
                return
            bits: list[int | None] = [None] * len(batch)
            if loader.scale is not None or loader.flip:
                bits[:] = random_bits(size, loader.seed, "stream", self.epoch, number, loader.rank).tolist()
            asked = [(encoded, b, name) for (name, encoded, _), b in zip(batch, bits, strict=False)]
            yield *decoded(decoding, asked, loader.side), torch.tensor([label for *_, label in batch])

    def _samples(self, part: int, parts: int) -> Iterator[Sample]:
        loader = self.loader
        if not loader.shuffle:
            yield from loader.stream.samples(part, parts, None)
            return
        for again in itertools.count():
            found = 0
            for sample in loader.stream.samples(part, parts, (loader.seed + again, self.epoch)):
                found += 1
                yield sample
            if not found:
                raise ValueError(f"{loader.name}: worker {part} of {parts} got no samples. Give fewer workers.")


class WebShards:
    """Tar shards, read by webdataset.

    Args:
        urls: of the shards: paths, addresses, and pipes such as "pipe:curl -s URL".
        image, label: names of the members, without a dot; several are separated by ";".
    """

    def __init__(self, urls: Sequence[str], *, image: str, label: str) -> None:
        self.urls, self.image, self.label, self.shards = list(urls), image, label, len(urls)
        self.identity = hashlib.sha256(repr((self.urls, image, label)).encode()).hexdigest()

    def samples(self, part: int, parts: int, order: tuple[int, int] | None) -> Iterator[Sample]:
        """Iterate over the samples of this part of the shards."""
        from webdataset import WebDataset  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        urls, drawn = list(self.urls), random.Random(repr(order))
        if order is not None:
            drawn.shuffle(urls)
        if not (own := urls[part::parts]):
            return
        # no splitting by rank and worker, which is done above
        read = WebDataset(own, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False)
        for sample in read if order is None else read.shuffle(BUFFER, initial=BUFFER, rng=drawn):
            place = f"{sample['__url__']}: {sample['__key__']}"
            image, label = (member(sample, names, place) for names in (self.image, self.label))
            yield place, image, class_number(label, place)


def member(sample: Mapping[str, Any], names: str, place: str) -> Any:
    """Return the first of the named members, separated by ";", that a sample has.

    Raises:
        ValueError: if it has none, naming those it has.
    """
    found = next((name for name in names.split(";") if name in sample), None)
    if found is None:
        there = ", ".join(name for name in sample if not name.startswith("__"))
        raise ValueError(
            f"{place} has no member {names.replace(';', ', ')}; it has {there}. Name those of image and label: image=, "
            "label=."
        )
    return sample[found]


def class_number(label: bytes, place: str) -> int:
    """Return the class in a label's member.

    Raises:
        ValueError: for anything but a whole number, as text.
    """
    try:
        return int(label)
    except ValueError:
        raise ValueError(f"{place}: the label should be the number of a class, as text; got {label[:40]!r}.") from None


def assembled_streams(
    streams: Mapping[str, SampleStream],
    classes: Sequence[str] | int,
    name: str,
    *,
    size: int,
    length: int | None,
    **options: Any,
) -> Splits[Any]:
    """Build splits from streams; there is nothing to hold a split out of.

    Raises:
        ValueError: without a test or validation split.
    """
    settings, augmentation, held_out = with_defaults(options, size=size, classes=classes, name=name)
    if any(held_out.values()) or len(streams) < 2:
        raise ValueError(
            f"{name} is streamed, so no images can be held out of its training split: give it a test or validation "
            "split of its own, and leave out validation= and test= with numbers."
        )
    loaders = {
        split: StreamedImages(stream, **settings)
        if split != "train"
        else StreamedImages(stream, **settings, **augmentation, length=length, shuffle=True)
        for split, stream in streams.items()
    }
    others = loaders if "test" in loaders else {"test": loaders["validation"]}
    return Splits(loaders["train"], others.get("validation"), others["test"])
