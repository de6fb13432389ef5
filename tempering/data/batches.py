"""Load batches of images in memory, augmented by batch; every draw is a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tempering.rows import IGNORE_INDEX, TEACHER_OUTPUTS

if TYPE_CHECKING:
    from tempering.data.protocols import SplittableLoader

Batch = tuple[Tensor, Tensor, Tensor]
BatchT = TypeVar("BatchT")
LoaderT = TypeVar("LoaderT", bound="SplittableLoader[Any]")


CACHED = 1 << 18  # floats
LABELS = ("labels", "label", "targets", "target", "y")
IDS = ("ids", "id", "index", "indices", "idx")
WEIGHTS = ("weights", "weight", "sample_weight")


class LabeledBatch(NamedTuple):
    """A batch of samples with one label each.

    Attributes:
        inputs: of the model; a tensor, or a mapping of several.
        labels: (N,).
        ids: (N,) integers, or None.
        weight: (N,) of the samples, or None.
    """

    inputs: Any
    labels: Tensor
    ids: Tensor | None = None
    weight: Tensor | None = None


def labeled_batch(batch: Any, owner: str = "Classification") -> LabeledBatch:
    """Return the parts of a batch.

    A tuple is (inputs, labels), and further parts, known by their type: integers (N,) are ids, numbers
    (N,) are weights of the samples, as in Keras, and paths or other texts are left out. Parts of a mapping or a named
    tuple are known by name: ``LABELS``, ``IDS``, ``WEIGHTS``, ``TEACHER_OUTPUTS`` (no input of the models), and all
    other tensors are inputs. With labels of None no sample has one.

    Raises:
        ValueError: for anything else, with the line that makes such a batch.
    """
    named = dict(batch) if isinstance(batch, Mapping) else batch._asdict() if hasattr(batch, "_asdict") else {}
    if label := next((name for name in LABELS if name in named), None):
        return _checked(_from_names(named, label, owner), owner)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or _is_nested(batch[1]):
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        keys = f" with {', '.join(map(repr, named))}" if named else ""
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            got = f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch[:3])}"
        if isinstance(batch, Tensor):
            got += f" {tuple(batch.shape)} (one batch as the loader is [(inputs, labels)])"
        raise ValueError(
            f"{owner} needs batches of (inputs, labels) or (inputs, labels, ids), or mappings with one of "
            f"{', '.join(LABELS)}; got {got}{keys}. For a DataLoader: loader.collate_fn = lambda samples: "
            "[torch.utils.data.default_collate(samples)[name] for name in ('image', 'class')]. Without labels they are "
            "(inputs, None)."
        )
    parts: dict[str, Tensor] = {}
    for i, part in enumerate(batch[2:], start=2):
        if not isinstance(part, Tensor):
            continue
        name = "weight" if part.is_floating_point() else "ids"
        if part.ndim != 1 or part.dtype == torch.bool or name in parts:
            raise ValueError(
                f"{owner} needs batches of (inputs, labels), then ids (N,) of integers and weights (N,) of floats; "
                f"got {tuple(part.shape)} {part.dtype} as part {i}. Make them a mapping with 'labels' and the names "
                "of the inputs, or leave the part out. A teacher's logits are 'teacher_outputs', for "
                "teachers.InBatch()."
            )
        parts[name] = part
    return _checked(LabeledBatch(batch[0], batch[1], parts.get("ids"), parts.get("weight")), owner)


def with_teacher_outputs(inputs: Any, batch: Any) -> Any:
    """Return the teacher's inputs: a mapping with its outputs too, if the batch has them, so that it is not run."""
    if not (isinstance(batch, Mapping) and TEACHER_OUTPUTS in batch):
        return inputs
    named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
    return {**named, TEACHER_OUTPUTS: batch[TEACHER_OUTPUTS]}


def _is_nested(labels: Any) -> bool:
    """Whether labels hold tensors: a batch is then a list of samples, or of batches."""
    return isinstance(labels, Mapping) or (
        isinstance(labels, (tuple, list)) and any(isinstance(x, Tensor) for x in labels)
    )


def _checked(batch: LabeledBatch, owner: str) -> LabeledBatch:
    """Return a batch whose labels are a tensor.

    Raises:
        ValueError: for inputs or labels of numpy, or labels that are no tensor.
    """
    inputs, labels = batch.inputs, cast("Any", batch.labels)
    if isinstance(labels, Tensor) and not isinstance(inputs, np.ndarray):
        return batch
    if labels is None:
        size = next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), 0)
        return batch._replace(labels=torch.full((size,), IGNORE_INDEX))
    wrong, name = (inputs, "inputs") if isinstance(inputs, np.ndarray) else (labels, "labels")
    how = "torch.from_numpy(x)" if isinstance(wrong, np.ndarray) else "torch.tensor(x)"
    raise ValueError(
        f"{owner} needs batches of tensors; got the {name} as {type(wrong).__name__}. Write {how}, or let a DataLoader "
        "collate the samples."
    )


def _from_names(named: Mapping[str, Any], label: str, owner: str) -> LabeledBatch:
    ids, weight = (next((named[name] for name in names if name in named), None) for names in (IDS, WEIGHTS))
    known = {label, *IDS, *WEIGHTS, TEACHER_OUTPUTS}
    inputs = {name: x for name, x in named.items() if name not in known and isinstance(x, (Tensor, Mapping))}
    if not inputs:
        raise ValueError(
            f"{owner} finds no inputs in a batch with {', '.join(map(repr, named))}: no other is a tensor."
        )
    only = next(iter(inputs.values())) if len(inputs) == 1 and "input_ids" not in inputs else inputs
    integers = isinstance(ids, Tensor) and not ids.is_floating_point()
    return LabeledBatch(only, named[label], ids if integers else None, weight if isinstance(weight, Tensor) else None)


@dataclass(frozen=True)
class AugmentationParams:
    """Augmentation parameters of one view for every sample, (N,) each.

    Attributes:
        y, x: offsets of the crop in the padded image, in pixels.
        flip: whether the image is flipped horizontally.
    """

    y: Int[Tensor, " N"]
    x: Int[Tensor, " N"]
    flip: Bool[Tensor, " N"]


class ShardedLoader:
    """Base of loaders whose batches are split over ranks; ``things`` names the samples in error messages."""

    things: ClassVar[str] = "images"
    batch_size: int
    shuffle: bool
    seed: int
    rank: int
    world: int
    sample_weights: Float[Tensor, " N"] | None = None

    def weighted(self, weights: Float[Tensor, " N"]) -> Self:
        """Return a loader that draws an epoch's samples with replacement, with these relative probabilities."""
        return self._replace(sample_weights=weights.detach().cpu().double())

    def shard(self, rank: int, world: int) -> Self:
        """Return a loader of this rank's contiguous part of every batch; the parts of all ranks make up the batch.

        A short last batch is split as evenly as possible, or dropped on all ranks if it has fewer samples than ranks.

        Raises:
            ValueError: for a batch size that ``world`` does not divide.
        """
        if self.batch_size % world or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={self.batch_size} {self.things} cannot be split evenly over {world} processes (rank "
                f"{rank}). Use a multiple, such as batch_size={max(1, round(self.batch_size / world)) * world}."
            )
        return self._replace(rank=rank, world=world)

    def _order(self, size: int, epoch: int) -> Int[Tensor, " size"]:
        """Return the samples of an epoch, in its order."""
        if self.sample_weights is not None:
            share = (random_bits(size, self.seed, "draw", epoch) >> 1 & (1 << 53) - 1).double() / (1 << 53)
            ends = self.sample_weights.cumsum(0)
            return torch.searchsorted(ends, share * ends[-1], right=True).clamp_max(size - 1)
        return epoch_order(size, self.seed, epoch) if self.shuffle else torch.arange(size)

    def _num_batches(self, size: int) -> int:
        """Return the number of batches in an epoch of ``size`` samples."""
        full, tail = divmod(size, self.batch_size)
        return full + (tail >= self.world)

    def _shard_slice(self, step: int, size: int) -> slice:
        """Return the slice of the epoch's ``size`` samples, in its order, that this rank loads in that step."""
        low = step * self.batch_size
        count = min(self.batch_size, size - low)
        return slice(*(low + count * r // self.world for r in (self.rank, self.rank + 1)))

    def _replace(self, **changes: Any) -> Self:
        """Return a shallow copy with these attributes changed."""
        result = copy.copy(self)
        for name, value in changes.items():
            setattr(result, name, value)
        return result


class EpochLoader(ShardedLoader, ABC, Generic[BatchT]):
    """Base of loaders of images, whose epoch can be iterated over from any batch on."""

    epoch: int

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[BatchT]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[BatchT]:
        """Iterate over the epoch from batch ``start``; the pixels equal those of an iteration from 0."""
        if start < 0:
            raise ValueError(f"iterate() needs start >= 0; got {start}.")
        return self._iterate_epoch(start, self.epoch)

    @abstractmethod
    def _iterate_epoch(self, start: int, epoch: int) -> Iterator[BatchT]:
        """Iterate over an epoch from batch ``start``."""


class ImageLoader(EpochLoader[Batch]):
    """Base of loaders of images with one label each: order, views, ids and splits; subclasses have the pixels.

    A subclass keeps its options of augmentation as attributes, with the values that turn them off in ``CLEAN``, and
    has ``_inputs``, ``_select`` and ``to``.
    """

    CLEAN: ClassVar[Mapping[str, Any]] = {}
    drop_last: bool
    channels_last: bool

    def __init__(
        self,
        labels: Int[Tensor, " N"],
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        flip: bool = False,
        seed: int = 0,
        views: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        class_names: Sequence[str] | None = None,
        name: str = "data",
    ) -> None:
        self.labels = labels
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.channels_last = channels_last
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.flip, self.seed, self.views = flip, seed, views
        self.class_names = None if class_names is None else tuple(class_names)
        self.name = name
        self.epoch, self.rank, self.world = 0, 0, 1
        self._hash_cache: dict[str, str] = {}  # shared by all copies of the same data

    def _validate(self, n: int, channels: int, **lowest: int) -> None:
        """Check labels of ``n`` images, statistics of ``channels``, and options that are whole numbers."""
        labels, kind = self.labels, type(self).__name__
        if labels.shape != (n,) or labels.dtype != torch.int64:
            raise ValueError(
                f"{kind} needs labels (N,) = ({n},) in int64; got {tuple(labels.shape)} {labels.dtype}. "
                "Other integers: labels.long()."
            )
        if self.class_names is not None and int(labels.max()) >= len(self.class_names):
            raise ValueError(f"label {int(labels.max())} has no name: there are {len(self.class_names)} class_names.")
        check_statistics(kind, self.mean, self.std, channels)
        for name, low in {"batch_size": 1, **lowest, "views": 1}.items():
            value = getattr(self, name)
            if not (name == "views" and value is None) and (not isinstance(value, int) or value < low):
                raise ValueError(f"{kind} needs {name} >= {low}; got {value!r}.")

    def _scale_on(self, device: torch.device | str) -> None:
        self._scale = statistics_on(device, self.mean, self.std)

    # properties

    @property
    def size(self) -> int:
        """Number of images in the data set."""
        return len(self.labels)

    @property
    def rows(self) -> int:
        """Number of different ids: the number of images, times the number of views where there are views."""
        return self.size * (self.views or 1)

    @property
    def classes(self) -> int:
        """Number of classes: that of ``class_names``, else the largest label plus one."""
        return int(self.labels.max()) + 1 if self.class_names is None else len(self.class_names)

    @property
    def augmented(self) -> bool:
        """Whether the images are augmented."""
        return any(getattr(self, name) != value for name, value in self.CLEAN.items())

    @property
    def augmentation(self) -> dict[str, Any]:
        """Description of the augmentation, JSON-able; ``seed`` is None where nothing is random."""
        seed = self.seed if self.augmented else None
        return {**{name: getattr(self, name) for name in self.CLEAN}, "seed": seed, "views": self.views}

    # iteration

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else self._num_batches(self.size)

    def _iterate_epoch(self, start: int, epoch: int) -> Iterator[Batch]:
        for index, bits, ids in self._plan(start, epoch, self.labels.device):
            yield self._inputs(index, bits), self.labels[index], ids

    def _plan(
        self, start: int, epoch: int, device: torch.device | str
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Yield the images of every batch from ``start`` on, their random bits (None: clean images), and their ids."""
        n, view = self.size, epoch % self.views if self.views else epoch
        order = self._order(n, epoch).to(device)
        bits = self._random_bits(view).to(device) if self.augmented else None
        for step in range(start, len(self)):
            index = order[self._shard_slice(step, n)]
            yield index, None if bits is None else bits[index], index + view * n if self.views else index

    def gather(self, ids: Int[Tensor, " B"]) -> Batch:
        """Return the batch of these ids, in their order; without ``views``, with the current epoch's augmentation.

        Raises:
            ValueError: for an id outside [0, rows).
        """
        ids = ids.to(self.labels.device)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise ValueError(f"ids must be in [0, {self.rows}); got {int(ids.min())} to {int(ids.max())}.")
        index = ids % self.size
        bits: Tensor | None = None
        if self.augmented:
            view = ids // self.size if self.views else torch.full_like(ids, self.epoch)
            bits = torch.empty_like(ids)
            for v in view.unique().tolist():
                bits = torch.where(view == v, self._random_bits(v).to(ids.device)[index], bits)
        return self._inputs(index, bits), self.labels[index], ids

    def _random_bits(self, view: int) -> Int[Tensor, " N"]:
        return random_bits(self.size, self.seed, "augment", view)

    @abstractmethod
    def _inputs(self, index: Tensor, bits: Tensor | None) -> Float[Tensor, "B C H W"]:
        """Return normalized images, with random bits of their augmentation."""

    def _normalized(self, pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return normalized(pixels, *self._scale, channels_last=self.channels_last)

    # copies that share the images

    def clean(self) -> Self:
        """Return a loader of the same data in its stored order, without augmentation or dropped samples."""
        return self._replace(shuffle=False, views=None, drop_last=False, **self.CLEAN)

    def replay(self, views: int) -> Self:
        """Return a loader of the same data with this many fixed augmentations.

        Raises:
            ValueError: for a number below 1.
        """
        if not isinstance(views, int) or views < 1:
            raise ValueError(f"{type(self).__name__} needs views >= 1; got {views!r}.")
        return self._replace(views=views)

    def subset(self, n: int) -> Self:
        """Return a loader of ``n`` images, stratified by class, in their stored order."""
        if not 0 < n <= self.size:
            raise ValueError(f"cannot take {n} of {self.size} images.")
        if n == self.size:
            return self
        return self._select(stratified_order(self._labels(), np.arange(self.size))[:n])

    def split(self, n_validation: int, seed: int = 0) -> tuple[Self, Self]:
        """Return (the remaining images, a clean held-out split of ``n_validation`` images), stratified by class."""
        check_held_out(n_validation, self.size, "images")
        order = stratified_order(self._labels(), random_bits(self.size, seed, "split", n_validation).numpy())
        return self._select(order[n_validation:]), self._select(order[:n_validation]).clean()

    def _labels(self) -> np.ndarray:
        return self.labels.cpu().numpy()

    @abstractmethod
    def _select(self, index: np.ndarray) -> Self:
        """Return a loader of these images, in their stored order."""


class Batches(ImageLoader):
    """Load batches of (inputs (B, C, H, W) float32 normalized, labels (B,), ids (B,)) from images in memory.

    The order and the augmentation of an epoch depend on (seed, epoch, sample) alone: no global random number is drawn,
    ``iterate(start)`` starts at any batch at no cost, and every device, shard and subset gets the same pixels.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) class indices; negative is unlabeled.
        batch_size: images per step, over all ranks.
        mean, std: per channel, for pixels in [0, 1].
        shuffle: draw a new order every epoch.
        crop: pixels of black padding on each side, from which an image of the original size is cropped at random,
            before normalization.
        flip: flip horizontally with probability 1/2.
        seed: of order and augmentation.
        views: use this many fixed augmentations, view epoch % views in an epoch; ids are then view * N + index, so that
            cached teacher outputs can be looked up. None: a new augmentation every epoch, and ids are indices.
        drop_last: drop a last batch that is short.
        channels_last: use the channels_last memory format for the inputs.
        class_names: one per class, for reports.
        name: of the data set, for records.

    Raises:
        ValueError: for an invalid argument, stating what is accepted.
    """

    CLEAN = {"crop": 0, "flip": False}

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
        self.images, self.crop = images, crop
        if images.ndim != 4 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                f"Batches needs images (N, C, H, W) in uint8, N > 0; got {tuple(images.shape)} {images.dtype}. From "
                "floats in [0, 1]: (255 * x).round().to(torch.uint8); from (N, H, W, C): x.permute(0, 3, 1, 2)."
            )
        self._validate(len(images), images.shape[1], crop=0)
        self._scale_on(images.device)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Batches({self.name}: {self.size} images {shape}, {self.classes} classes, batch_size={self.batch_size})"

    @property
    def identity(self) -> str:
        """SHA-256 of images, labels, mean and std, in hexadecimal; independent of augmentation and batch size."""
        if "identity" not in self._hash_cache:
            digest = hashlib.sha256(json.dumps([list(self.images.shape), self.mean, self.std]).encode())
            for part in (self.images, self.labels):
                digest.update(part.cpu().contiguous().numpy().data)
            self._hash_cache["identity"] = digest.hexdigest()
        return self._hash_cache["identity"]

    def augmentation_params(self, view: int) -> AugmentationParams:
        """Return the augmentation parameters of every image in this view (in this epoch, without ``views``)."""
        return self._params_from_bits(self._random_bits(view))

    def _params_from_bits(self, bits: Tensor) -> AugmentationParams:
        span = 2 * self.crop + 1
        y, x = bits & 0x7FFFFFFF, (bits >> 31) & 0x7FFFFFFF
        flip = bits < 0 if self.flip else torch.zeros_like(bits, dtype=torch.bool)
        return AugmentationParams(y % span, x % span, flip)

    def _inputs(self, index: Tensor, bits: Tensor | None) -> Float[Tensor, "B C H W"]:
        pixels = self.images.index_select(0, index)
        if bits is not None:
            pixels = augmented(pixels, self._params_from_bits(bits), self.crop)
        return self._normalized(pixels)

    def to(self, device: torch.device | str) -> Batches:
        """Return a loader of the same data on ``device``; augmentation runs there too."""
        result = self._replace(images=self.images.to(device), labels=self.labels.to(device))
        result._scale_on(device)
        return result

    def _select(self, index: np.ndarray) -> Self:
        kept = torch.from_numpy(np.sort(index)).to(self.images.device)
        return self._replace(images=self.images.index_select(0, kept), labels=self.labels[kept], _hash_cache={})


def statistics_on(device: torch.device | str, *statistics: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return mean and std as float32 tensors (C, 1, 1) on a device."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in statistics)
    return mean, std


def normalized(
    pixels: UInt8[Tensor, "B C H W"], mean: Tensor, std: Tensor, *, channels_last: bool
) -> Float[Tensor, "B C H W"]:
    """Return (pixels / 255 - mean) / std in the memory format that is asked for."""
    inputs = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    # on a CPU in parts that stay in its cache
    part = max(1, CACHED // pixels[0].numel()) if pixels.device.type == "cpu" and len(pixels) else max(1, len(pixels))
    for out, of in zip(inputs.split(part), pixels.split(part), strict=True):
        # torchvision's operations in torchvision's order, so that the floats are equal to the bit
        out.copy_(of).div_(255).sub_(mean).div_(std)
    # last: changing the memory format of uint8 is slower than of float32
    return inputs.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check_statistics(owner: str, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise a ValueError unless there are a mean and a std > 0 for each channel."""
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(
            f"{owner} needs a mean and a std > 0 for each of {channels} channels, of pixels in [0, 1]; got "
            f"mean {mean} and std {std}."
        )


class Splits(NamedTuple, Generic[LoaderT]):
    """The splits of a data set; without a validation split the best epoch is selected on the test split."""

    train: LoaderT
    validation: LoaderT | None
    test: LoaderT

    def facts(self) -> dict[str, Any]:
        """Describe the data for records: name, sizes, classes, identity and augmentation of the training split."""
        return {
            "name": self.train.name,
            "train": self.train.size,
            "validation": 0 if self.validation is None else self.validation.size,
            "test": self.test.size,
            "classes": self.train.classes,
            "identity": self.train.identity,
            "augmentation": self.train.augmentation,
        }


def augmented(pixels: UInt8[Tensor, "B C H W"], params: AugmentationParams, crop: int) -> UInt8[Tensor, "B C H W"]:
    """Pad every image with ``crop`` black pixels, crop it and flip it by ``params``, in one gather."""
    batch, channels, height, width = pixels.shape
    rows = torch.arange(height, device=pixels.device).expand(batch, -1)
    columns = torch.arange(width, device=pixels.device).expand(batch, -1)
    columns = torch.where(params.flip[:, None], width - 1 - columns, columns)
    if crop:
        pixels = torch.nn.functional.pad(pixels, [crop] * 4)
        rows, columns = rows + params.y[:, None], columns + params.x[:, None]
    index = (rows[:, :, None] * pixels.shape[-1] + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, index).view(batch, channels, height, width)


@lru_cache(maxsize=4)
def random_bits(n: int, *key: object) -> Int[Tensor, " n"]:
    """Return n words of 64 random bits, seeded by ``key``, as int64 (cached: do not change the tensor in place).

    Philox is counter-based and its stream in numpy is stable, so a later version can replay a recorded augmentation,
    and the draws of a subset are the first ones of the full set.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return torch.from_numpy(bits.view(np.int64))


def epoch_order(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """Return the random order of n samples in an epoch."""
    return torch.from_numpy(np.argsort(random_bits(n, seed, "order", epoch).numpy(), kind="stable"))


def stratified_order(labels: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return an order of the samples whose every prefix is stratified by class; ``key`` orders each class."""
    by_class = np.lexsort((key, labels))
    ordered = labels[by_class]
    begin, end = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    quantile = (np.arange(len(labels)) - begin + 0.5) / (end - begin)
    return by_class[np.lexsort((key[by_class], quantile))]


def check_held_out(n: int, size: int, samples: str) -> None:
    """Raise a ValueError unless n of ``size`` samples, such as "images", can be held out of the training ones."""
    if not 0 < n < size:
        raise ValueError(
            f"cannot hold out {n} of {size} {samples}; both splits need at least one. Give another number: validation= "
            "or test= where the data is loaded, --validation or --test on the command line."
        )


def train_val_split(
    train: LoaderT, others: Mapping[str, LoaderT], *, validation: float, test: float
) -> Splits[LoaderT]:
    """Combine loaders into splits, and hold missing splits out of the training samples.

    Args:
        train: loader of the training split.
        others: loaders of the other splits, "validation" and "test". If only "validation" exists and ``test`` is 0, it
            becomes the test split.
        validation, test: number of training samples to hold out for a split that does not exist; or a fraction below
            1, which is ignored if the split exists.

    Raises:
        ValueError: for a held-out split that already exists, or if there is no test split.
    """
    if "test" not in others and not test and "validation" in others:
        others = {"test": others["validation"]}
    size = train.size
    for split, count in (("test", test), ("validation", validation)):
        if 0 < count < 1:
            count = 0 if split in others else max(1, round(count * size))
        if count and split in others:
            raise ValueError(
                f"{train.name} has its own {split} split ({others[split].size} images): leave out {split}=, or type "
                f"--{split} 0."
            )
        if count:
            train, held_out = train.split(int(count), seed=0)
            others = {**others, split: held_out}
    if "test" not in others:
        raise ValueError(
            f"{train.name} has no test split. Give it one, or hold images out of the training ones: test=N (--test N)."
        )
    return Splits(train, others.get("validation"), others["test"])
