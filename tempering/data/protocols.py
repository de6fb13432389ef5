"""Define the protocols of data loaders: the members that training, caching and splitting use.

No base class is needed: an object with these members is a loader. ``ShardedLoader`` implements the sharding for the
loaders of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

BatchT_co = TypeVar("BatchT_co", covariant=True)


@runtime_checkable
class Loader(Protocol[BatchT_co]):
    """Iterate over the batches of an epoch; an epoch can be iterated over any number of times.

    Attributes:
        identity: hash of the samples, in hexadecimal, by which cached teacher outputs and runs are keyed. It does not
            depend on batch size, order or augmentation.
    """

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def __iter__(self) -> Iterator[BatchT_co]:
        """Iterate over the batches of the current epoch."""
        ...

    def set_epoch(self, epoch: int, /) -> None:
        """Select the epoch, counted from 0, whose order and augmentation the next iteration uses."""
        ...


@runtime_checkable
class SeekableLoader(Loader[BatchT_co], Protocol[BatchT_co]):
    """A loader that can start at any batch, so that a resumed run does not load the batches it skips."""

    def iterate(self, start: int, /) -> Iterator[BatchT_co]:
        """Iterate over the current epoch from batch ``start``; the batches equal those of a full iteration."""
        ...


@runtime_checkable
class ShardableLoader(Loader[BatchT_co], Protocol[BatchT_co]):
    """A loader that can be split over the processes of a distributed run."""

    def shard(self, rank: int, world: int, /) -> Self:
        """Return a loader of this rank's part of every batch; the parts of all ranks together are the batch."""
        ...


@runtime_checkable
class SplittableLoader(Loader[BatchT_co], Protocol[BatchT_co]):
    """A loader of a data set that can be cut into training, validation and test splits.

    Attributes:
        name: of the data set, for records.
        size: number of samples.
        classes: number of classes.
        augmentation: description of the augmentation, JSON-able.
    """

    name: str

    @property
    def size(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def augmentation(self) -> Mapping[str, Any]: ...

    def subset(self, n: int, /) -> Self:
        """Return a loader of ``n`` of the samples."""
        ...

    def split(self, n_validation: int, /, seed: int = 0) -> tuple[Self, Self]:
        """Return (the remaining samples, a held-out split of ``n_validation`` samples)."""
        ...
