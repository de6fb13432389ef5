"""Pairs of a source and a target, for encoder-decoders and for prompts with completions; JSON lines of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempering.data.tokens import Tokens
from tempering.rows import IGNORE_INDEX

FIELDS = (("dialogue", "summary"), ("dialogue", "summary1"), ("question", "answer"), ("source", "target"))


@dataclass(frozen=True, slots=True)
class Pair:
    """The token ids that an encoder reads, and those that its decoder has to write."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def make_pair(
    source: Sequence[int], target: Sequence[int], *, eos: int | None = None, lengths: tuple[int, int] | None = None
) -> Pair:
    """A source and a target, each with one end-of-sequence.

    Args:
        eos: appended to each that does not end with it yet; None for none.
        lengths: at most so many tokens of either. What is cut at its end has no eos: it did not end there.

    Raises:
        ValueError: where nothing of one of them is left.
    """
    read, write = (list(x) if eos is None or list(x)[-1:] == [eos] else [*x, eos] for x in (source, target))
    if lengths is not None:
        read, write = read[: lengths[0]], write[: lengths[1]]
    if not read or not write:
        raise ValueError(f"a pair needs tokens on both sides; got {len(read)} and {len(write)} (lengths={lengths}).")
    return Pair(tuple(read), tuple(write))


def collate_pairs(
    pairs: Sequence[Pair], *, pad: int = 0, lengths: tuple[int, int] | None = None, ids: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """A batch for ``Seq2Seq``: input_ids and attention_mask (B, S), labels (B, L) that are -100 behind a target's end.

    Padding is on the right: models that learn their positions count them from there, and those of decoders shift the
    labels right themselves.

    Args:
        pad: of the sources; it may be the end-of-sequence.
        lengths: (S, L); None are those of the longest source and target.
        ids: sample ids, for teachers that look their answers up.

    Raises:
        ValueError: for no pairs, or one that is longer.
    """
    longest = tuple(max((len(getattr(p, side)) for p in pairs), default=0) for side in ("source", "target"))
    S, L = lengths or longest
    if not pairs or longest[0] > S or longest[1] > L:
        raise ValueError(f"collate_pairs needs pairs no longer than {(S, L)}; got {len(pairs)} of at most {longest}.")
    batch = {
        "input_ids": torch.full((len(pairs), S), pad),
        "attention_mask": torch.zeros(len(pairs), S, dtype=torch.long),
        "labels": torch.full((len(pairs), L), IGNORE_INDEX),
    }
    for row, pair in enumerate(pairs):
        batch["input_ids"][row, : len(pair.source)] = torch.tensor(pair.source, dtype=torch.long)
        batch["attention_mask"][row, : len(pair.source)] = 1
        batch["labels"][row, : len(pair.target)] = torch.tensor(pair.target, dtype=torch.long)
    return batch if ids is None else batch | {"ids": torch.tensor(list(ids))}


class Pairs(Tokens):
    """Batches of pairs, padded to one length a side, with their sample ids: input_ids, attention_mask, labels, ids.

    Args:
        pairs: such as ``make_pair`` makes.
        batch_size: of every batch but the last.
        lengths: of sources and targets in every batch; None are the longest.
        pad: of the sources.
        shuffle: draw another order every epoch, from ``seed`` and the epoch's number.
        seed: of the order.

    Raises:
        ValueError: for no pairs, or one longer than ``lengths``.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int = 8,
        lengths: tuple[int, int] | None = None,
        pad: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        longest = [max((len(getattr(p, side)) for p in pairs), default=0) for side in ("source", "target")]
        chosen = lengths or (longest[0], longest[1])
        if not pairs or batch_size < 1 or longest[0] > chosen[0] or longest[1] > chosen[1]:
            raise ValueError(
                f"Pairs needs pairs no longer than {chosen} and batch_size >= 1; got {len(pairs)} of at most "
                f"{tuple(longest)} tokens, and {batch_size}."
            )
        self.pairs, self.batch_size, self.lengths = list(pairs), batch_size, chosen
        self.pad, self.shuffle, self.seed, self.number, self.rank, self.world = pad, shuffle, seed, 0, 0, 1
        self.canaries = ()
        digest = hashlib.sha256(repr(("pairs", chosen, pad)).encode())
        for pair in self.pairs:
            numbers = [len(pair.source), len(pair.target), *pair.source, *pair.target]
            digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
        self.identity = digest.hexdigest()

    @property
    def rows(self) -> int:
        """How many pairs there are."""
        return len(self.pairs)

    def batch(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these pairs."""
        return collate_pairs([self.pairs[i] for i in ids], pad=self.pad, lengths=self.lengths, ids=ids)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(source, target) of every JSON line, plain or .gz: DialogSum's, GSM8K's, or {"source": ..., "target": ...}.

    Raises:
        ValueError: for a line that has no such fields.
    """
    path = Path(path)
    lines = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")
    out = []
    with lines as file:
        for number, line in enumerate(file, 1):
            held = json.loads(line)
            names = next((names for names in FIELDS if all(isinstance(held.get(n), str) for n in names)), None)
            if names is None:
                known = ", ".join(f"{a} and {b}" for a, b in FIELDS)
                raise ValueError(f"{path}, line {number} has the fields {sorted(held)}; known are {known}, as texts.")
            out.append((held[names[0]], held[names[1]]))
    return out
