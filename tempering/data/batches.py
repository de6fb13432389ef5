"""Images in memory, augmented a batch at a time; every draw is a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tempering.data.sharded import ShardedLoader

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class AugmentationParams:
    """What one view draws for every sample, (N,) each: where its crop begins in the padded image, whether it flips."""

    y: Int[Tensor, " N"]
    x: Int[Tensor, " N"]
    flip: Bool[Tensor, " N"]


class Batches(ShardedLoader):
    """Batches of (inputs (B, C, H, W) float32 normalized, labels (B,), ids (B,)) of images that lie in memory.

    The order and the augmentation of an epoch depend on (seed, epoch, sample) alone: no global random number is drawn,
    ``iterate(start)`` begins anywhere at no cost, and any device, shard or subset sees the same pixels.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) class indices; negative is unlabeled.
        batch_size: images in a step, over all ranks.
        mean, std: of each channel, of pixels in [0, 1].
        shuffle: a new order every epoch.
        crop: pixels of black border from which an image of the old size is cut at random, before normalization.
        flip: left to right, every second image.
        seed: of order and augmentation.
        views: an epoch shows one of this many recorded augmentations, epoch % views; ids are then view * N + index, so
            that a teacher's answers can be looked up. None: new ones every epoch, and ids are indices.
        drop_last: leave out a last batch that is short.
        channels_last: the inputs' memory format.
        class_names: one a class, for reports.
        name: of the data set, for records.

    Raises:
        ValueError: for anything that does not fit, saying what does.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "N C H W"],
        labels: Int[Tensor, " N"],
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        crop: int = 0,
        flip: bool = False,
        seed: int = 0,
        views: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
        name: str = "data",
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.channels_last = channels_last
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.crop, self.flip, self.seed, self.views = crop, flip, seed, views
        self.class_names = None if class_names is None else tuple(class_names)
        self.name = name
        self.epoch, self.rank, self.world = 0, 0, 1
        self._known: dict[str, str] = {}  # shared by every copy of the same data
        self._validate()
        self._set_scale()

    def _validate(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                f"Batches needs images (N, C, H, W) in uint8, N > 0; got {tuple(images.shape)} {images.dtype}. From "
                "floats in [0, 1]: (255 * x).round().to(torch.uint8); from (N, H, W, C): x.permute(0, 3, 1, 2)."
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"Batches needs labels (N,) = ({len(images)},) in int64; got {tuple(labels.shape)} {labels.dtype}. "
                "Other integers: labels.long()."
            )
        if self.class_names is not None and int(labels.max()) >= len(self.class_names):
            raise ValueError(f"label {int(labels.max())} has no name: there are {len(self.class_names)} class_names.")
        if not len(self.mean) == len(self.std) == images.shape[1] or min(self.std) <= 0:
            raise ValueError(
                f"Batches needs a mean and a std > 0 for each of {images.shape[1]} channels, of pixels in [0, 1]; got "
                f"mean {self.mean} and std {self.std}."
            )
        for name, low in (("batch_size", 1), ("crop", 0), ("views", 1)):
            value = getattr(self, name)
            if not (name == "views" and value is None) and (not isinstance(value, int) or value < low):
                raise ValueError(f"Batches needs {name} >= {low}; got {value!r}.")

    def _set_scale(self) -> None:
        device = self.images.device
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (self.mean, self.std))
        self._scale = mean[:, None, None], std[:, None, None]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Batches({self.name}: {self.size} images {shape}, {self.classes} classes, batch_size={self.batch_size})"

    # what it is

    @property
    def size(self) -> int:
        """Images in the data set."""
        return len(self.images)

    @property
    def rows(self) -> int:
        """Different ids: the images, times their recorded views where there are some."""
        return self.size * (self.views or 1)

    @property
    def classes(self) -> int:
        """Classes: the named ones, else one more than the largest label."""
        return int(self.labels.max()) + 1 if self.class_names is None else len(self.class_names)

    @property
    def augmented(self) -> bool:
        """Whether an image looks different from one epoch to the next."""
        return self.crop > 0 or self.flip

    @property
    def augmentation(self) -> dict[str, Any]:
        """What is done to the images, JSON-able; ``seed`` is None where nothing is drawn."""
        seed = self.seed if self.augmented else None
        return {"crop": self.crop, "flip": self.flip, "seed": seed, "views": self.views}

    @property
    def identity(self) -> str:
        """sha256 of images, labels, mean and std, in hexadecimal; augmentation and batch size are not part of it."""
        if "identity" not in self._known:
            digest = hashlib.sha256(json.dumps([list(self.images.shape), self.mean, self.std]).encode())
            for part in (self.images, self.labels):
                digest.update(part.cpu().contiguous().numpy().data)
            self._known["identity"] = digest.hexdigest()
        return self._known["identity"]

    # walking

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else self._steps(self.size)

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch the next walk is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number ``start`` on, with the same pixels as if it had begun at 0."""
        if start < 0:
            raise ValueError(f"iterate() begins at a batch >= 0; got {start}.")
        return self._walk(start, self.epoch)

    def _walk(self, start: int, epoch: int) -> Iterator[Batch]:
        device, n = self.images.device, self.size
        order = _order(n, self.seed, epoch) if self.shuffle else torch.arange(n)
        order, view = order.to(device), epoch % self.views if self.views else epoch
        words = self._words(view).to(device) if self.augmented else None
        for step in range(start, len(self)):
            index = order[self._share(step, n)]
            inputs = self._inputs(index, None if words is None else words[index])
            yield inputs, self.labels[index], index + view * n if self.views else index

    def gather(self, ids: Int[Tensor, " B"]) -> Batch:
        """The batch of these ids, in their order; without ``views``, as the present epoch shows them.

        Raises:
            ValueError: for an id that there is not.
        """
        ids = ids.to(self.images.device)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise ValueError(f"ids lie in [0, {self.rows}); got {int(ids.min())} to {int(ids.max())}.")
        index = ids % self.size
        words: Tensor | None = None
        if self.augmented:
            view = ids // self.size if self.views else torch.full_like(ids, self.epoch)
            words = torch.empty_like(ids)
            for v in view.unique().tolist():
                words = torch.where(view == v, self._words(v).to(ids.device)[index], words)
        return self._inputs(index, words), self.labels[index], ids

    def augmentation_params(self, view: int) -> AugmentationParams:
        """What augmentation draws for every image in this view (an epoch, where there are no recorded views)."""
        return self._augmentation_params(self._words(view))

    def _words(self, view: int) -> Int[Tensor, " N"]:
        return _words(self.size, self.seed, "augment", view)

    def _augmentation_params(self, words: Tensor) -> AugmentationParams:
        span = 2 * self.crop + 1
        y, x = words & 0x7FFFFFFF, (words >> 31) & 0x7FFFFFFF
        flip = words < 0 if self.flip else torch.zeros_like(words, dtype=torch.bool)
        return AugmentationParams(y % span, x % span, flip)

    def _inputs(self, index: Tensor, words: Tensor | None) -> Float[Tensor, "B C H W"]:
        pixels = self.images.index_select(0, index)
        if words is not None:
            pixels = augmented(pixels, self._augmentation_params(words), self.crop)
        mean, std = self._scale
        # torchvision's operations in its order, so that the floats are its floats
        inputs = pixels.float().div_(255).sub_(mean).div_(std)
        # last of all: changing the layout of bytes is slower than of floats
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs

    # variants: copies that share the images

    def clean(self) -> Batches:
        """The same data in its own order, whole and without augmentation."""
        return self._with(shuffle=False, crop=0, flip=False, views=None, drop_last=False)

    def replay(self, views: int) -> Batches:
        """The same data shown in this many recorded augmentations."""
        made = self._with(views=views)
        made._validate()
        return made

    def to(self, device: torch.device | str) -> Batches:
        """The same data resident on ``device``, where it is augmented too."""
        made = self._with(images=self.images.to(device), labels=self.labels.to(device))
        made._set_scale()
        return made

    def subset(self, n: int) -> Batches:
        """The first ``n`` images in proportion to the classes, in their old order."""
        if not 0 < n <= self.size:
            raise ValueError(f"cannot take {n} of {self.size} images.")
        if n == self.size:
            return self
        return self._only(_proportional(self._labels(), np.arange(self.size))[:n])

    def split(self, n_validation: int, seed: int = 0) -> tuple[Batches, Batches]:
        """(the rest, a clean hold-out of ``n_validation`` images), every class in proportion."""
        if not 0 < n_validation < self.size:
            raise ValueError(f"cannot hold out {n_validation} of {self.size} images; some must be left on both sides.")
        order = _proportional(self._labels(), _words(self.size, seed, "split", n_validation).numpy())
        return self._only(order[n_validation:]), self._only(order[:n_validation]).clean()

    def _labels(self) -> np.ndarray:
        return self.labels.cpu().numpy()

    def _only(self, index: np.ndarray) -> Batches:
        kept = torch.from_numpy(np.sort(index)).to(self.images.device)
        return self._with(images=self.images.index_select(0, kept), labels=self.labels[kept], _known={})


class Splits(NamedTuple):
    """A data set as a run wants it; without a validation split the best epoch is chosen by the test split."""

    train: Batches
    validation: Batches | None
    test: Batches

    def facts(self) -> dict[str, Any]:
        """What a record says of the data: name, sizes, classes, and the identity of the training images."""
        return {
            "name": self.train.name,
            "train": self.train.size,
            "validation": 0 if self.validation is None else self.validation.size,
            "test": self.test.size,
            "classes": self.train.classes,
            "identity": self.train.identity,
            "augmentation": self.train.augmentation,
        }


def augmented(pixels: UInt8[Tensor, "B C H W"], drawn: AugmentationParams, crop: int) -> UInt8[Tensor, "B C H W"]:
    """Each image padded with ``crop`` black pixels, cut where ``drawn`` says, and flipped where it says; one gather."""
    batch, channels, height, width = pixels.shape
    rows = torch.arange(height, device=pixels.device).expand(batch, -1)
    columns = torch.arange(width, device=pixels.device).expand(batch, -1)
    columns = torch.where(drawn.flip[:, None], width - 1 - columns, columns)
    if crop:
        pixels = torch.nn.functional.pad(pixels, [crop] * 4)
        rows, columns = rows + drawn.y[:, None], columns + drawn.x[:, None]
    place = (rows[:, :, None] * pixels.shape[-1] + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, place).view(batch, channels, height, width)


@lru_cache(maxsize=4)
def _words(n: int, *what: object) -> Int[Tensor, " n"]:
    """n words of 64 random bits named by ``what``, as int64; never changed in place.

    Philox is counter-based and numpy keeps its stream for good, so a recorded augmentation can be replayed by a later
    version, and a subset's draws are the first ones of the whole.
    """
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return torch.from_numpy(words.view(np.int64))


def _order(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    return torch.from_numpy(np.argsort(_words(n, seed, "order", epoch).numpy(), kind="stable"))


def _proportional(labels: np.ndarray, key: np.ndarray) -> np.ndarray:
    """An order of the samples whose every beginning has the classes in proportion; ``key`` orders each class."""
    by_class = np.lexsort((key, labels))
    ordered = labels[by_class]
    begin, end = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    place = (np.arange(len(labels)) - begin + 0.5) / (end - begin)
    return by_class[np.lexsort((key[by_class], place))]


def train_val_split(train: Any, others: dict[str, Any], *, validation: int, test: int) -> Splits:
    """Splits of a loader and those beside it, by name; what is missing is held out of the training samples.

    A data set whose one other split is called validation is tested on it, as the field does.

    Raises:
        ValueError: for a hold-out of a split that is there, or no test split at all.
    """
    if "test" not in others and not test and "validation" in others:
        others = {"test": others["validation"]}
    for split, count in (("test", test), ("validation", validation)):
        if count and split in others:
            size = others[split].size
            raise ValueError(f"{train.name} has its own {split} split ({size} images): leave out {split}=.")
        if count:
            train, held = train.split(count, seed=0)
            others = {**others, split: held}
    if "test" not in others:
        raise ValueError(
            f"{train.name} has no test split. Give it one, or hold images out of the training ones: test=N."
        )
    return Splits(train, others.get("validation"), others["test"])
