"""Load batches of images that worker processes read and decode when they are needed: folders, tar shards, data sets."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from tempering.data.batches import Batch, ImageLoader, Splits, train_val_split
from tempering.data.decoding import RATIO, SCALE, Decoding
from tempering.data.folders import MEAN, STD, class_folders, decoders, list_images, named_if_unreadable
from tempering.utils.tensors import to_device

CHECKED = 64  # images whose content is part of the identity of a data set
OnError = Literal["raise", "skip"]
Failed = list[tuple[int, str]]  # position in the batch, and why the image cannot be read


class ImageSource(Protocol):
    """Where encoded images come from; it is copied to worker processes."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, i: int) -> bytes:
        """Return the content of the file of image i."""
        ...

    def name(self, i: int) -> str:
        """Return what an error calls image i."""
        ...

    def digest(self, index: np.ndarray) -> bytes:
        """Return a hash of the names and sizes of these images, which does not depend on the machine."""
        ...


class ImageFiles:
    """Image files below a folder.

    Args:
        folder: that contains the files.
        names: of the files, relative to the folder.
    """

    def __init__(self, folder: str | Path, names: Sequence[str]) -> None:
        self.folder = str(folder)
        self.names = np.array([os.fsencode(name) for name in names])  # one block of memory, shared with forked workers

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """Return the content of a file."""
        with open(self.name(i), "rb") as file:
            return file.read()

    def name(self, i: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.names[i])))

    def digest(self, index: np.ndarray) -> bytes:
        """Hash the names, relative to the folder, and the sizes in bytes."""
        sizes = np.array([os.stat(self.name(i)).st_size for i in index.tolist()], dtype="<i8")
        names = b"\0".join(self.names[index].tolist()).replace(os.fsencode(os.sep), b"/")
        return hashlib.sha256(names + b"\0" + sizes.tobytes()).digest()


class LazyBatches(ImageLoader):
    """Load batches of (inputs (B, 3, size, size) float32 normalized, labels (B,), ids (B,)), decoded by workers.

    Order, crops and flips of an epoch depend on (seed, epoch, sample) alone, as those of ``Batches`` do: no global
    random number is drawn, ``iterate(start)`` starts at any batch at no cost, and any number of workers gives the same
    pixels. Workers decode and crop; normalization runs on the loader's device, a batch at a time.

    Args:
        source: the encoded images.
        labels: (N,) class indices; negative is unlabeled.
        batch_size: images per step, over all ranks.
        size: height and width of the inputs, in pixels.
        resize: shorter side of a clean image before its center crop; default: size / 0.875, 256 for 224.
        mean, std: per channel, for pixels in [0, 1].
        shuffle: draw a new order every epoch.
        scale: share of an image's area in its random crop, such as (0.08, 1.0); None: the center crop.
        ratio: width / height of random crops.
        flip: flip horizontally with probability 1/2.
        draft: decode JPEGs at a lower resolution where random crops allow it; see ``decoding.Decoding``.
        workers: worker processes; 0 decodes in threads of this process. None: one per CPU, at most 8.
        on_error: "raise" for an image that cannot be read, or "skip": leave it out of its batch, and warn with the
            number of such images at the end of the epoch.
        seed: of order and augmentation.
        views: number of fixed augmentations, as in ``Batches``.
        drop_last: drop a last batch that is short.
        channels_last: use the channels_last memory format for the inputs.
        class_names: one per class, for reports.
        name: of the data set, for records.

    Raises:
        ValueError: for an invalid argument, stating what is accepted.
    """

    CLEAN = {"scale": None, "flip": False}

    def __init__(
        self,
        source: ImageSource,
        labels: Int[Tensor, " N"],
        *,
        batch_size: int,
        size: int,
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
        views: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
        name: str = "data",
    ) -> None:
        super().__init__(
            labels,
            batch_size=batch_size,
            mean=mean,
            std=std,
            shuffle=shuffle,
            flip=flip,
            seed=seed,
            views=views,
            drop_last=drop_last,
            channels_last=channels_last,
            class_names=class_names,
            name=name,
        )
        self.source, self.side, self.resize = source, size, round(size / 0.875) if resize is None else resize
        self.scale, self.ratio = None if scale is None else [*map(float, scale)], [*map(float, ratio)]
        self.draft = draft
        self.on_error: OnError = on_error
        self.processes = worker_count(workers)  # no setting of a run: any number gives the same batches
        self.index = np.arange(len(source))
        self._validate(len(source), 3, side=1)
        check_decoding(type(self).__name__, self.side, self.resize, self.scale, self.ratio, on_error)
        self.device = torch.device("cpu")
        self._scale_on(self.device)

    def __repr__(self) -> str:
        facts = f"{self.name}: {self.size} images, {self.classes} classes, batch_size={self.batch_size}"
        return f"LazyBatches({facts}, size={self.side}, workers={self.processes})"

    @property
    def identity(self) -> str:
        """SHA-256 of names, sizes in bytes and labels of all images, the content of 64 of them, size, mean and std.

        It does not depend on augmentation and batch size, nor on where the images are.
        """
        if "identity" not in self._hash_cache:
            settings = [self.side, self.resize, self.mean, self.std]
            digest = hashlib.sha256(json.dumps(settings).encode() + self.source.digest(self.index))
            digest.update(self._labels().data)
            for i in self.index[:: max(1, -(-len(self.index) // CHECKED))].tolist():
                with named_if_unreadable(self.source.name(i)):
                    digest.update(self.source.read(i))
            self._hash_cache["identity"] = digest.hexdigest()
        return self._hash_cache["identity"]

    def _iterate_epoch(self, start: int, epoch: int) -> Iterator[Batch]:
        plan, ahead = itertools.tee(self._plan(start, epoch, "cpu"))
        asked = (_asked(self.index, index, bits) for index, bits, _ in ahead)
        reader, lost = _Reader(self.source, Decoding.of(self)), Lost(self.on_error)
        for (index, _, ids), read in zip(plan, loaded(reader, asked, self.processes, self.device), strict=True):
            pixels, kept = lost.without(*read)
            batch = self.labels[index[kept]], ids[kept]
            yield self._normalized(to_device(pixels, self.device)), *to_device(batch, self.device)
        lost.report(self.name)

    def _inputs(self, index: Tensor, bits: Tensor | None) -> Float[Tensor, "B C H W"]:
        """Decode in threads of this process; every image has to be readable."""
        reader = _Reader(self.source, Decoding.of(self))
        with decoders() as pool:
            pixels, failed = reader.read(_asked(self.index, index.cpu(), bits), pool.map)
        if failed:
            raise ValueError(failed[0][1])
        return self._normalized(to_device(pixels, self.device))

    def to(self, device: torch.device | str) -> Self:
        """Return a loader of the same data that normalizes on ``device``; pixels are moved there as uint8."""
        result = self._replace(device=torch.device(device))
        result._scale_on(device)
        return result

    def _select(self, index: np.ndarray) -> Self:
        kept = np.sort(index)
        return self._replace(index=self.index[kept], labels=self.labels[torch.from_numpy(kept)], _hash_cache={})


def _asked(positions: np.ndarray, index: Tensor, bits: Tensor | None) -> list[tuple[int, int | None]]:
    """Return the images of a batch in their source, each with its random bits."""
    found = positions[index.numpy()].tolist()
    return list(zip(found, [None] * len(found) if bits is None else bits.tolist(), strict=True))


class _Reader:
    """A data set whose batches are lists of (image, random bits)."""

    def __init__(self, source: ImageSource, decoding: Decoding) -> None:
        self.source, self.decoding = source, decoding

    def __getitems__(self, asked: list[tuple[int, int | None]]) -> tuple[Tensor, Failed]:
        if get_worker_info() is not None:
            return self.read(asked)
        with decoders() as pool:
            return self.read(asked, pool.map)

    def read(self, asked: list[tuple[int, int | None]], each: Any = map) -> tuple[Tensor, Failed]:
        """Return the images (B, 3, size, size) uint8, and the positions of those that cannot be read."""

        def decode(i: int, bits: int | None) -> np.ndarray:
            name = self.source.name(i)
            with named_if_unreadable(name):
                encoded = self.source.read(i)
            return self.decoding(encoded, bits, name)

        return decoded(decode, asked, self.decoding.size, each)


def decoded(
    decode: Callable[..., np.ndarray], asked: Sequence[Sequence[Any]], size: int, each: Any = map
) -> tuple[Tensor, Failed]:
    """Decode a batch.

    Args:
        decode: the arguments of an image -> (size, size, 3) uint8, or a ValueError.
        asked: the arguments of every image.
        size: height and width of the output.
        each: such as ``map``.

    Returns:
        (B, 3, size, size) uint8, and the positions of those that cannot be read, with the reason.
    """
    failed: Failed = []
    out = np.empty((len(asked), 3, size, size), np.uint8)

    def fill(position: int) -> None:
        try:
            out[position] = decode(*asked[position]).transpose(2, 0, 1)
        except ValueError as error:
            failed.append((position, str(error)))

    for _ in each(fill, range(len(asked))):
        pass
    return torch.from_numpy(out), sorted(failed)


class Lost:
    """The images of an epoch that could not be read.

    Args:
        on_error: "raise" or "skip".
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error, self.count, self.first = on_error, 0, ""

    def without(self, pixels: Tensor, failed: Failed) -> tuple[Tensor, Tensor]:
        """Return the images of a batch that were read, and their positions.

        Raises:
            ValueError: for one that was not, or if none was.
        """
        if not failed:
            return pixels, torch.arange(len(pixels))
        self.first = self.first or failed[0][1]
        self.count += len(failed)
        if self.on_error == "raise" or len(failed) == len(pixels):
            skip = " on_error='skip' leaves such images out." if self.on_error == "raise" else ""
            raise ValueError(failed[0][1] + skip)
        kept = torch.tensor(sorted(set(range(len(pixels))) - {position for position, _ in failed}))
        return pixels[kept], kept

    def report(self, name: str) -> None:
        """Warn about what was left out."""
        if self.count:
            warnings.warn(
                f"{name}: {self.count} images of this epoch could not be read and were left out. The first: "
                f"{self.first}",
                stacklevel=3,
            )


def loaded(dataset: Any, asked: Any, workers: int, device: torch.device) -> Iterable[Any]:
    """Return a DataLoader that draws no global random number; with ``asked`` of None, of an iterable data set."""
    how: dict[str, Any] = {"batch_size": None} if asked is None else {"batch_sampler": asked}
    return DataLoader(
        dataset,
        **how,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def _unchanged(batch: Any) -> Any:
    return batch


def worker_count(workers: int | None) -> int:
    """Return a number of worker processes; of None the number of CPUs that this process may use, at most 8.

    Raises:
        ValueError: for a number below 0.
    """
    if workers is None:
        return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 0:
        raise ValueError(f"workers must be 0 or more; got {workers}. 0 decodes in this process.")
    return workers


def check_decoding(
    owner: str, size: int, resize: int, scale: Sequence[float] | None, ratio: Sequence[float], on_error: str
) -> None:
    """Raise a ValueError for sizes, crops or an ``on_error`` that a loader cannot use."""
    if not 1 <= size <= resize:
        raise ValueError(f"{owner} needs 1 <= size <= resize, in pixels; got size={size} and resize={resize}.")
    if scale is not None and not (len(scale) == 2 and 0.0 < scale[0] <= scale[1] <= 1.0):
        raise ValueError(f"{owner} needs scale=(low, high) with 0 < low <= high <= 1, or None; got {scale}.")
    if not (len(ratio) == 2 and 0.0 < ratio[0] <= ratio[1]):
        raise ValueError(f"{owner} needs ratio=(low, high) with 0 < low <= high; got {ratio}.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"{owner} needs on_error='raise' or 'skip'; got {on_error!r}.")


class LazyOptions(TypedDict, total=False):
    """The options of lazily decoded images that do not depend on where they come from, as ``LazyBatches`` has them."""

    batch_size: int
    resize: int | None
    validation: float
    test: float
    mean: Sequence[float]
    std: Sequence[float]
    scale: Sequence[float] | None
    ratio: Sequence[float]
    flip: bool
    draft: bool
    workers: int | None
    on_error: OnError
    seed: int
    channels_last: bool


def lazy_image_folder(folder: str | Path, *, size: int, **options: Unpack[LazyOptions]) -> Splits[LazyBatches]:
    """Load images (3, size, size) from FOLDER/CLASS/*.jpg or FOLDER/{train,val,test}/CLASS/*.jpg as they are needed.

    For folders that do not fit in memory, such as ImageNet's; ``image_folder`` decodes the images of others only once.
    Training images are cropped at random, resized and flipped, as torchvision and timm do; others are resized and
    center cropped.

    Args:
        folder: as for ``image_folder``, with the same rules for splits and classes.
        size: height and width of the inputs in pixels.
        options: of ``LazyBatches``: batch_size (64), resize, mean, std, scale ((0.08, 1.0)), ratio, flip (True), draft,
            workers, on_error, seed, channels_last; and validation and test as in ``image_folder``.

    Raises:
        FileNotFoundError, ValueError: as ``image_folder`` does; an image that cannot be read is named when it is used.
    """
    names, folders = class_folders(folder)
    parts = {}
    for split, path in folders.items():
        files, labels = list_images(path, names)
        parts[split] = ImageFiles(path, files), labels
    return assembled_lazily(parts, names, Path(folder).resolve().name, size=size, **options)


def assembled_lazily(
    parts: Mapping[str, tuple[ImageSource, Tensor]],
    class_names: Sequence[str] | None,
    name: str,
    *,
    size: int,
    **options: Unpack[LazyOptions],
) -> Splits[LazyBatches]:
    """Build splits from sources and labels; missing splits are held out of the training images.

    Raises:
        ValueError: for a held-out split that already exists, or if there is no test split.
    """
    settings, augmentation, held_out = with_defaults(options, size=size, class_names=class_names, name=name)
    others = {split: LazyBatches(*part, **settings) for split, part in parts.items() if split != "train"}
    train = LazyBatches(*parts["train"], **settings, **augmentation, shuffle=True)
    return train_val_split(train, others, **held_out)


def class_names_of(classes: Sequence[str] | int) -> Sequence[str]:
    """Return names of classes; of a number of classes their numbers."""
    return [str(i) for i in range(classes)] if isinstance(classes, int) else classes


def with_defaults(options: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return settings of every split, the augmentation of the training split, and sizes of held-out splits."""
    settings: dict[str, Any] = {"batch_size": 64, "mean": MEAN, "std": STD, "scale": SCALE, "flip": True}
    settings |= {**options, **more}
    held_out = {split: settings.pop(split, 0) for split in ("validation", "test")}
    augmentation = {option: settings.pop(option) for option in ("scale", "ratio", "flip") if option in settings}
    return settings, augmentation, held_out
