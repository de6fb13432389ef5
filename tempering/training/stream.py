"""Resumable, sharded streams of training batches."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Set every global generator from (seed, epoch, rank), so an epoch's randomness depends on nothing before it."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def repeatable(name: str, batches: Iterable[Any]) -> None:
    """Refuse what can be walked only once."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be walked only once and not resumed. Pass something that starts again "
            "at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
        )


def _distributed(loader: Any, fabric: Fabric, seed: int) -> Any:
    """The DataLoader with a sampler for this rank, its order drawn from the run's seed."""
    mine = fabric.setup_dataloaders(loader, move_to_device=False)
    # without Fabric's wrapper: it counts epochs by itself, also those that were only looked into
    mine = mine._dataloader  # pyright: ignore[reportAttributeAccessIssue]
    if mine.sampler is not loader.sampler and hasattr(mine.sampler, "seed"):
        mine.sampler.seed = seed
    return mine


class Stream:
    """The training batches as the loop wants them: by epoch, from any batch on, each rank its share.

    A loader that can jump (``iterate(start)``), knows epochs (``set_epoch``), or can share itself out
    (``shard(rank, world)``) is asked to; a DataLoader gets a distributed sampler from Fabric, and a generator of its
    own is seeded by its first seed and the epoch; any other iterable is walked from its start. Augmentation in
    persistent workers goes on from epoch to epoch, and is the one thing that a resumed run draws anew.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric, *, seed: int = 0) -> None:
        repeatable("batches", batches)
        if isinstance(batches, torch.utils.data.DataLoader):
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
        try:
            return len(self.batches)
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= in place of epochs=."
            ) from None

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from batch ``start`` on."""
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


def grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` micro-batches, the last one shorter if they do not divide."""
    while group := list(itertools.islice(batches, size)):
        yield group
