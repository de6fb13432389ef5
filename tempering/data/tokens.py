"""Load batches of token ids from a data set with an identity, so that teacher outputs can be cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tempering.data.batches import ShardedLoader
from tempering.data.canaries import Canary
from tempering.data.text import TextExample, collate


class Tokens(ShardedLoader):
    """Load batches of examples padded to one length: input_ids, attention_mask, labels and sample ids ("ids").

    If an example has a privacy score, batches also have "privacy_score" (``collate``), and it is part of the identity.

    Args:
        examples: such as those of ``make_prompt_example`` and ``windows``.
        batch_size: of every batch but the last.
        length: every batch is (B, length); None: the length of the longest example.
        pad, side: of the padding, as in ``collate``.
        shuffle: draw a new order every epoch, from ``seed`` and the epoch.
        seed: of the order.
        canaries: the secrets inserted into the texts, ``data.canaries.Canary``, for audits of memorization.

    Raises:
        ValueError: for no examples, or one longer than ``length``.
    """

    things = "texts"
    augmentation: dict[str, Any] = {"views": None}
    decode: Callable[[list[int]], str] | None = None  # token ids -> text; set it to see texts in the report

    def __init__(
        self,
        examples: Sequence[TextExample],
        *,
        batch_size: int = 8,
        length: int | None = None,
        pad: int = 0,
        side: str = "right",
        shuffle: bool = True,
        seed: int = 0,
        canaries: Sequence[Canary] = (),
    ) -> None:
        longest = max(map(len, examples), default=0)
        if not longest or batch_size < 1 or longest > (length or longest):
            raise ValueError(
                f"Tokens needs examples no longer than length={length} and batch_size >= 1; got {len(examples)} "
                f"examples of at most {longest} tokens and batch_size={batch_size}."
            )
        self.examples, self.batch_size, self.length = list(examples), batch_size, length or longest
        self.pad, self.side, self.shuffle, self.seed, self.number = pad, side, shuffle, seed, 0
        self.rank, self.world = 0, 1
        self.canaries = tuple(canaries)
        digest = hashlib.sha256(repr((self.length, pad, side)).encode())
        for example in self.examples:
            digest.update(np.asarray([len(example), *example.ids, *example.learn], dtype=np.int64).tobytes())
            if example.privacy_score is not None:
                digest.update(np.asarray(example.privacy_score, dtype=np.float64).tobytes())
            if example.teacher_prompt is not None:
                digest.update(repr(example.teacher_prompt).encode())
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return self._num_batches(self.rows)

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.number = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Iterate over the epoch from batch ``start``."""
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.Generator(np.random.Philox(key=[self.seed, self.number])).permutation(self.rows)
        for step in range(start, len(self)):
            yield self.batch(order[self._shard_slice(step, self.rows)].tolist())

    def batch(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these examples."""
        examples = [self.examples[i] for i in ids]
        return collate(examples, pad=self.pad, side=self.side, length=self.length, ids=ids)

    def gather(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return (batch, labels, ids) of these ids, in their order, as cached teachers need them."""
        batch = self.batch(ids.tolist())
        return batch, batch["labels"], ids

    def clean(self) -> Tokens:
        """Return this loader: texts are not augmented."""
        return self

    def replay(self, views: int) -> Tokens:
        """Raise, since texts have no views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"texts are not augmented, so they have no {views} views. Leave out views=.")
