"""Loader that appends held-out samples to the training batches."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch


class IndexedLoader(Protocol):
    """A loader that can return any samples by id, such as ``data.Batches``."""

    size: int
    batch_size: int
    seed: int
    identity: str

    def gather(self, ids: torch.Tensor, /) -> Any: ...
    def set_epoch(self, epoch: int, /) -> None: ...


@runtime_checkable
class MovableLoader(Protocol):
    """A loader whose data can be moved to a device."""

    def to(self, device: torch.device, /) -> Any: ...


class HoldoutLoader:
    """The batches of a loader without ``holdout`` of its samples, with held-out samples appended to each batch.

    The held-out samples depend on their number only; the order of training and held-out samples on the loader's seed
    and the epoch. Held-out samples are repeated as often as the epoch requires.

    Args:
        batches: a loader with ``size``, ``batch_size``, ``seed``, ``identity`` and ``gather(ids)``, such as
            ``data.Batches``.
        holdout: number of held-out samples.
        fraction: part of held-out samples in a batch.

    Raises:
        TypeError: if the loader cannot return samples by id.
        ValueError: if no training samples would remain.
    """

    def __init__(self, batches: object, *, holdout: int, fraction: float) -> None:
        if missing := [n for n in ("gather", "size", "batch_size", "seed", "identity") if not hasattr(batches, n)]:
            raise TypeError(
                f"samples held out for exams (holdout={holdout}) are gathered by their ids, and "
                f"{type(batches).__name__} has no .{missing[0]}. Use data.Batches, data.TextPairLoader or holdout=0."
            )
        self.batches = cast("IndexedLoader", batches)
        if holdout >= self.batches.size:
            raise ValueError(f"holdout={holdout} of {self.batches.size} training samples leaves none to train on.")
        self.holdout, self.fraction, self.number = holdout, fraction, 0
        self.identity: str = self.batches.identity
        order = _permutation(0, holdout, self.batches.size)
        self.held_out, self.training = np.sort(order[:holdout]), np.sort(order[holdout:])

    def __len__(self) -> int:
        return -(-len(self.training) // self.batches.batch_size)

    def set_epoch(self, number: int) -> None:
        """Set the epoch of the next iteration."""
        self.number = number
        self.batches.set_epoch(number)

    def to(self, device: torch.device) -> Self:
        """Return a copy whose loader is on ``device``, if the loader can be moved."""
        result = copy(self)
        result.batches = self.batches.to(device) if isinstance(self.batches, MovableLoader) else self.batches
        return result

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Yield the epoch's batches, starting at batch ``start``."""
        size, seed = self.batches.batch_size, self.batches.seed
        training = self.training[_permutation(seed, 2 * self.number, len(self.training))]
        held_out = self.held_out[_permutation(seed, 2 * self.number + 1, self.holdout)]
        stride = self._exam_size(size)
        for step in range(start, len(self)):
            lesson = training[step * size : (step + 1) * size]
            exam = held_out[np.arange(step * stride, step * stride + self._exam_size(len(lesson))) % self.holdout]
            yield self.batches.gather(torch.as_tensor(np.concatenate((lesson, exam))))

    def _exam_size(self, lesson: int) -> int:
        """Return the number of held-out samples for ``lesson`` training samples, equal to that of ``split_step``."""
        return max(1, round(lesson * self.fraction / (1 - self.fraction)))


def _permutation(seed: int, stream: int, n: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, stream])).permutation(n)
