"""Load pairs of a source and a target, for encoder-decoders and for prompts with completions, from JSON lines."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempering.data.text import append_eos
from tempering.data.tokens import Tokens
from tempering.rows import IGNORE_INDEX
from tempering.utils.files import parse_line

FIELDS = (("dialogue", "summary"), ("dialogue", "summary1"), ("question", "answer"), ("source", "target"))


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of the encoder's input and of the decoder's output."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def make_pair(
    source: Sequence[int],
    target: Sequence[int],
    *,
    eos: int | Iterable[int] | None = None,
    lengths: tuple[int, int] | None = None,
) -> Pair:
    """Return a pair of a source and a target, each with one end-of-sequence token.

    Args:
        source, target: token ids.
        eos: end-of-sequence id, or several: the first is appended to a side that ends with none of them; None: append
            nothing.
        lengths: maximal number of tokens of source and target; a truncated side has no eos.

    Raises:
        ValueError: if a side has no tokens.
    """
    source_ids, target_ids = append_eos(source, eos), append_eos(target, eos)
    if lengths is not None:
        source_ids, target_ids = source_ids[: lengths[0]], target_ids[: lengths[1]]
    if not source_ids or not target_ids:
        raise ValueError(
            f"a pair needs tokens on both sides; got {len(source_ids)} and {len(target_ids)} (lengths={lengths})."
        )
    return Pair(tuple(source_ids), tuple(target_ids))


def collate_pairs(
    pairs: Sequence[Pair], *, pad: int = 0, lengths: tuple[int, int] | None = None, ids: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """Collate pairs into a batch for ``Seq2Seq``: input_ids and attention_mask (B, S), labels (B, L), padded with -100.

    Padding is on the right, as models with learned absolute positions need it; decoders shift the labels themselves.

    Args:
        pairs: to collate.
        pad: padding id of the sources; it may be the end-of-sequence id.
        lengths: (S, L); None: the lengths of the longest source and target.
        ids: sample ids, for cached teachers.

    Raises:
        ValueError: for no pairs, or a pair that is longer than ``lengths``.
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
    """Load batches of pairs, padded to one length per side: input_ids, attention_mask, labels and sample ids ("ids").

    Args:
        pairs: such as those of ``make_pair``.
        batch_size: of every batch but the last.
        lengths: of sources and targets in every batch; None: those of the longest source and target.
        pad: padding id of the sources.
        shuffle: draw a new order every epoch, from ``seed`` and the epoch.
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
        limits = lengths or (longest[0], longest[1])
        if not pairs or batch_size < 1 or longest[0] > limits[0] or longest[1] > limits[1]:
            raise ValueError(
                f"Pairs needs pairs no longer than {limits} and batch_size >= 1; got {len(pairs)} of at most "
                f"{tuple(longest)} tokens and batch_size={batch_size}."
            )
        self.pairs, self.batch_size, self.lengths = list(pairs), batch_size, limits
        self.pad, self.shuffle, self.seed, self.number, self.rank, self.world = pad, shuffle, seed, 0, 0, 1
        self.canaries = ()
        digest = hashlib.sha256(repr(("pairs", limits, pad)).encode())
        for pair in self.pairs:
            numbers = [len(pair.source), len(pair.target), *pair.source, *pair.target]
            digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
        self.identity = digest.hexdigest()

    @property
    def rows(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def batch(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these pairs."""
        return collate_pairs([self.pairs[i] for i in ids], pad=self.pad, lengths=self.lengths, ids=ids)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Read (source, target) from a JSON lines file, plain or .gz: DialogSum, GSM8K, or {"source": ..., "target": ...}.

    Raises:
        ValueError: for a line without such fields.
    """
    path = Path(path)
    lines = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")
    pairs = []
    with lines as file:
        for number, line in enumerate(file, 1):
            fields = parse_line(path, number, line.encode())
            names = next((names for names in FIELDS if all(isinstance(fields.get(n), str) for n in names)), None)
            if names is None:
                known = ", ".join(f"{a} and {b}" for a, b in FIELDS)
                raise ValueError(
                    f"{path}, line {number} has the fields {sorted(fields)}; supported are {known}, as texts."
                )
            pairs.append((fields[names[0]], fields[names[1]]))
    return pairs
