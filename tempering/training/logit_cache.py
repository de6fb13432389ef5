"""Compute a teacher's logits of the training batches once, and read them from disk in later runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import KEY
from tempering.teachers.cache.logits import Cached, record
from tempering.teachers.cache.recorder import as_recorded


@dataclass(frozen=True, kw_only=True)
class LogitCache:
    """Cache the teacher's logits of the training batches.

    Attributes:
        batches: the training batches.
        folder: where caches are kept.
        views: number of augmentations to record of each sample, which training then replays; 0 records clean samples.
        seed: of the augmentations.
        quiet: no progress bar.
    """

    batches: Any
    folder: Path
    views: int = 0
    seed: int = 0
    quiet: bool = False

    @property
    def replayed(self) -> Any:
        """The batches to train on, which are those whose logits are cached."""
        return self.batches.replay(self.views) if self.views else self.batches

    def open(self, live: Teacher, *, dry: bool = False) -> Cached:
        """Return the cached teacher, after recording its logits if there are none.

        Args:
            live: the teacher; also computes the logits of batches that are not cached, such as the test split.
            dry: record nothing; without a cache, the live teacher computes the logits.
        """
        suffix = f"{self.views}-{self.seed}" if self.views else "0"
        path = self.folder / f"answers-{live.identity[:10]}-{self.batches.identity[:10]}-{suffix}"
        views = self.views or None
        if dry and not (path / KEY).is_file():
            cached = _DryCache(path, live, as_recorded(self.batches, views), clean=views is None)
        else:
            cached = record(live, self.batches, path, views=views, quiet=self.quiet)
        cached.fallback = live
        return cached


class _DryCache(Cached):
    """Stand in for a cache that is not recorded yet: accept and reject the same batches, run the live teacher."""

    def __init__(self, path: Path, live: Teacher, batches: Any, *, clean: bool) -> None:
        self.path, self.clean, self.live = path, clean, live
        self.key = {"data": batches.identity, "augmentation": batches.augmentation}
        self.rows, self.identity = batches.rows, live.identity

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        return super().__call__(inputs, ids) if ids is None else self.live(inputs, ids)

    def to(self, device: torch.device | str) -> Self:
        self.live.to(device)
        return self


_DryCache.__name__ = Cached.__name__  # errors name the teacher's class, in a check as in the run
