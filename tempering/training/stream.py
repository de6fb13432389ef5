"""Load training batches, sharded over ranks and resumable at any batch."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.data.protocols import SeekableLoader, ShardableLoader


DATALOADER_PARTS = ("sampler", "batch_sampler", "dataset")


class MovableLoader(Protocol):
    """A loader that can keep its data on a device."""

    def to(self, device: torch.device, /) -> Iterable[Any]:
        """Return a loader whose batches are on the device."""
        ...


class ResumableLoader:
    """The training batches of this rank, by epoch, starting at any batch.

    Uses the methods of the protocols in ``tempering.data.protocols`` that the loader has: ``iterate(start)``,
    ``set_epoch(epoch)`` and ``shard(rank, world)``. A DataLoader gets a distributed sampler from Fabric, and its
    generator is seeded with its initial seed plus the epoch. Any other iterable is iterated from the beginning, and
    batches before the start are dropped. After resuming, only augmentation in persistent workers differs: their random
    state is not restored.

    Raises:
        ValueError: for an iterator, or with several processes for a loader that cannot be sharded.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric, *, seed: int = 0) -> None:
        require_reiterable("batches", batches)
        if fabric.world_size > 1:
            if isinstance(batches, DataLoader):
                batches = _distribute(cast("DataLoader[Any]", batches), fabric, seed)
            elif _is_shardable(batches):
                batches = batches.shard(fabric.global_rank, fabric.world_size)
            else:
                raise ValueError(
                    f"{type(batches).__name__} cannot be split over {fabric.world_size} processes. Use a DataLoader, "
                    "or give it shard(rank, world)."
                )
        if fabric.device.type != "cpu" and _is_movable(batches):
            batches = batches.to(fabric.device)
        self.batches = batches
        # with a DataLoader, also its samplers and data set may have epochs and generators
        self.parts: list[Any] = [batches, *(getattr(batches, name, None) for name in DATALOADER_PARTS)]
        generators = [getattr(part, "generator", None) for part in self.parts]
        self.seeds = {g: g.initial_seed() for g in generators if isinstance(g, torch.Generator)}

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        try:
            return len(cast("Sized", self.batches))
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= instead of epochs=."
            ) from None

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """Iterate over the batches of an epoch, beginning with batch ``start``."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        for generator, seed in self.seeds.items():
            generator.manual_seed((seed + number) % 2**63)
        if _is_seekable(self.batches):
            return iter(self.batches.iterate(start))
        iterator = iter(self.batches)
        for _ in range(start):
            next(iterator, None)
        return iterator


def micro_batches(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` micro-batches, one list per optimizer step; the last list may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Seed every global generator by (seed, epoch, rank), so that an epoch does not depend on those before it."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)  # pyright: ignore[reportUnknownMemberType]


def require_reiterable(name: str, batches: Iterable[Any]) -> None:
    """Reject one-shot iterators.

    Raises:
        ValueError: for an iterator, naming the argument.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be iterated over only once and not resumed. Pass an iterable that "
            "starts again at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
        )


def _is_shardable(batches: Iterable[Any]) -> TypeGuard[ShardableLoader[Any]]:
    return hasattr(batches, "shard")  # only this member: isinstance() would compute the loader's identity


def _is_seekable(batches: Iterable[Any]) -> TypeGuard[SeekableLoader[Any]]:
    return hasattr(batches, "iterate")


def _is_movable(batches: Iterable[Any]) -> TypeGuard[MovableLoader]:
    return hasattr(batches, "to")


def _distribute(loader: DataLoader[Any], fabric: Fabric, seed: int) -> Iterable[Any]:
    """Return the DataLoader with a distributed sampler that shuffles with the run's seed."""
    wrapper = cast("Any", fabric.setup_dataloaders(loader, move_to_device=False))  # pyright: ignore[reportUnknownMemberType]
    # without Fabric's wrapper, whose count of epochs includes epochs that were only started
    sharded = wrapper._dataloader
    if sharded.sampler is not cast("Any", loader).sampler and hasattr(sharded.sampler, "seed"):
        sharded.sampler.seed = seed
    return sharded
