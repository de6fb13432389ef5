"""Split the batches of a loader over the ranks of a distributed run."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self


class ShardedLoader:
    """Base of loaders whose batches are split over ranks; ``things`` names the samples in error messages."""

    things: ClassVar[str] = "images"
    batch_size: int
    rank: int
    world: int

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
