"""Batches widened by samples that are held out for exams."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, Self

import numpy as np
import torch


class HoldoutLoader:
    """The batches of a loader without ``held`` of its samples, each followed by some of those: ``share`` of the whole.

    Which are held out depends on their number alone; the order of both kinds on the loader's seed and the epoch. The
    held ones come round as often as the epoch needs.

    Args:
        batches: with ``size``, ``batch_size``, ``seed``, ``identity`` and ``at(ids)``, as ``data.Batches`` has them.
        held: how many.
        share: of a batch's samples, once it is widened.

    Raises:
        TypeError: for a loader that cannot give any sample again.
        ValueError: where nothing would be left to learn.
    """

    def __init__(self, batches: Any, *, held: int, share: float) -> None:
        if lacking := [n for n in ("gather", "size", "batch_size", "seed", "identity") if not hasattr(batches, n)]:
            raise TypeError(
                f"samples held out for exams (held={held}) are asked for by their ids, and {type(batches).__name__} "
                f"has no .{lacking[0]}. Use tempering.data.Batches or Sentences, or held=0."
            )
        if held >= batches.size:
            raise ValueError(f"held={held} of {batches.size} training samples leaves none to learn.")
        self.batches, self.held, self.share, self.number = batches, held, share, 0
        self.identity: str = batches.identity
        order = _permutation(0, held, batches.size)
        self.examined, self.learned = np.sort(order[:held]), np.sort(order[held:])

    def __len__(self) -> int:
        return -(-len(self.learned) // self.batches.batch_size)

    def set_epoch(self, number: int) -> None:
        """Choose which epoch the next walk is."""
        self.number = number
        self.batches.set_epoch(number)

    def to(self, device: torch.device) -> Self:
        """The same on ``device``, as far as the loader goes there."""
        made = copy(self)
        made.batches = self.batches.to(device) if hasattr(self.batches, "to") else self.batches
        return made

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """The epoch's batches from number ``start`` on."""
        size, seed = self.batches.batch_size, self.batches.seed
        learned = self.learned[_permutation(seed, 2 * self.number, len(self.learned))]
        examined = self.examined[_permutation(seed, 2 * self.number + 1, self.held)]
        wide = self._beside(size)
        for step in range(start, len(self)):
            lesson = learned[step * size : (step + 1) * size]
            exam = examined[np.arange(step * wide, step * wide + self._beside(len(lesson))) % self.held]
            yield self.batches.gather(torch.from_numpy(np.concatenate((lesson, exam))))

    def _beside(self, lesson: int) -> int:
        """How many examine beside so many that are learned; ``split_step`` finds the same number."""
        return max(1, round(lesson * self.share / (1 - self.share)))


def _permutation(seed: int, stream: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, stream])).permutation(n)
