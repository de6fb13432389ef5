"""What the loaders have in common: a step's batch is shared out to ranks, and a variant is a copy with a change."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self


class ShardedLoader:
    """A loader whose batches several processes share; ``things`` is what one sample is called in errors."""

    things: ClassVar[str] = "images"
    batch_size: int
    rank: int
    world: int

    def shard(self, rank: int, world: int) -> Self:
        """This rank's contiguous share of every batch; the ranks' shares together are the batch.

        A short last batch is shared as evenly as can be, or left out on all ranks if it has fewer samples than ranks.

        Raises:
            ValueError: for a batch size that ``world`` does not divide.
        """
        if self.batch_size % world or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={self.batch_size} {self.things} cannot be shared out evenly to {world} processes (rank "
                f"{rank}). Use a multiple, such as batch_size={max(1, round(self.batch_size / world)) * world}."
            )
        return self._with(rank=rank, world=world)

    def _steps(self, size: int) -> int:
        """Batches of an epoch of ``size`` samples."""
        whole, tail = divmod(size, self.batch_size)
        return whole + (tail >= self.world)

    def _share(self, step: int, size: int) -> slice:
        """Which of an epoch's ``size`` samples, in its order, are this rank's in that step."""
        low = step * self.batch_size
        count = min(self.batch_size, size - low)
        return slice(*(low + count * r // self.world for r in (self.rank, self.rank + 1)))

    def _with(self, **changes: Any) -> Self:
        """A copy that shares what it is not told to change."""
        made = copy.copy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        return made
