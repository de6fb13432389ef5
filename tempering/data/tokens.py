"""A data set of texts as batches of token ids, with an identity, so that a teacher's answers can be recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tempering.data.canaries import Canary
from tempering.data.sharded import ShardedLoader
from tempering.data.text import TextExample, collate


class Tokens(ShardedLoader):
    """Batches of examples padded to one length, with their sample ids: input_ids, attention_mask, labels, ids.

    And "privacy_score", where some example has it (``collate``), which is a part of the data's identity then.

    Args:
        examples: such as ``make_prompt_example`` and ``windows`` make.
        batch_size: of every batch but the last.
        length: every batch is (B, length); None is the longest example.
        pad, side: of the padding, as in ``collate``.
        shuffle: draw another order every epoch, from ``seed`` and the epoch's number.
        seed: of the order.
        canaries: the secrets that were planted in the texts, ``data.canaries.Canary``, for audits to ask after.

    Raises:
        ValueError: for no examples, or one longer than ``length``.
    """

    things = "texts"
    augmentation: dict[str, Any] = {"views": None}

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
                f"Tokens needs examples no longer than length={length} and batch_size >= 1; got {len(examples)} of at "
                f"most {longest} tokens, and {batch_size}."
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
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return self._steps(self.rows)

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return len(self.examples)

    def set_epoch(self, number: int) -> None:
        """Choose the epoch whose order is drawn."""
        self.number = number

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterate(0)

    def iterate(self, start: int) -> Iterator[dict[str, Tensor]]:
        """The batches of the epoch from batch ``start`` on."""
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.Generator(np.random.Philox(key=[self.seed, self.number])).permutation(self.rows)
        for step in range(start, len(self)):
            yield self.batch(order[self._share(step, self.rows)].tolist())

    def batch(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples."""
        chosen = [self.examples[i] for i in ids]
        return collate(chosen, pad=self.pad, side=self.side, length=self.length, ids=ids)

    def gather(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(batch, labels, ids) of any ids, as a recording asks for them."""
        batch = self.batch(ids.tolist())
        return batch, batch["labels"], ids

    def clean(self) -> Tokens:
        """The same: texts are not augmented."""
        return self

    def replay(self, views: int) -> Tokens:
        """Texts have no views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"texts are not augmented, so there are no {views} views of one. Leave out views=.")
