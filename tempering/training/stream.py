"""Resumable, sharded loading of training batches."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class ResumableLoader:
    """The training batches of this rank, by epoch, starting at any batch.

    A loader that can start anywhere (``iterate(start)``), has epochs (``set_epoch``) or shards itself
    (``shard(rank, world)``) does so. A DataLoader gets a distributed sampler from Fabric, and its own generator is
    seeded by its first seed and the epoch. Any other iterable is iterated from its beginning, and skipped batches are
    dropped. Only augmentation in persistent workers differs after resuming: their random state is not restored.

    Raises:
        ValueError: for an iterator, or with several processes for a loader that cannot be sharded.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric, *, seed: int = 0) -> None:
        require_reiterable("batches", batches)
        if isinstance(batches, DataLoader):
            if fabric.world_size > 1:
                batches = _distributed(batches, fabric, seed)
        elif fabric.world_size > 1:
            if not hasattr(batches, "shard"):
                raise ValueError(
                    f"{type(batches).__name__} cannot be shared out over {fabric.world_size} processes. Use a "
                    "DataLoader, or give it shard(rank, world)."
                )
            batches = batches.shard(fabric.global_rank, fabric.world_size)  # pyright: ignore[reportAttributeAccessIssue]
        if fabric.device.type != "cpu" and hasattr(batches, "to"):
            batches = batches.to(fabric.device)  # pyright: ignore[reportAttributeAccessIssue]
        self.batches: Any = batches
        sampler = getattr(batches, "sampler", None)
        self.parts = [batches, sampler, getattr(batches, "batch_sampler", None), getattr(batches, "dataset", None)]
        generators = [getattr(part, "generator", None) for part in self.parts]
        self.seeds = {g: g.initial_seed() for g in generators if isinstance(g, torch.Generator)}

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        try:
            return len(self.batches)
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= in place of epochs=."
            ) from None

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """Iterate over the batches of an epoch, beginning with batch ``start``."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        for generator, seed in self.seeds.items():
            generator.manual_seed((seed + number) % 2**63)
        if hasattr(self.batches, "iterate"):
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
    torch.manual_seed(value)


def require_reiterable(name: str, batches: Iterable[Any]) -> None:
    """Reject one-shot iterators.

    Raises:
        ValueError: for an iterator, naming the argument.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be walked only once and not resumed. Pass something that starts again "
            "at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
        )


def _distributed(loader: Any, fabric: Fabric, seed: int) -> Any:
    """The DataLoader with a distributed sampler, which shuffles by the run's seed."""
    sharded = fabric.setup_dataloaders(loader, move_to_device=False)
    # Fabric's wrapper counts epochs itself, also those that were only started
    sharded = sharded._dataloader  # pyright: ignore[reportAttributeAccessIssue]
    if sharded.sampler is not loader.sampler and hasattr(sharded.sampler, "seed"):
        sharded.sampler.seed = seed
    return sharded
