"""Drawn tokens on disk, packed into bits: about three bytes for each token that was drawn, and one a position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import Recordable
from tempering.teachers.cache.shards import (
    CachedShards,
    Inputs,
    Tensors,
    from_bytes,
    query_sparse,
    record_shards,
    recording_key,
    text_batches,
    texts_per_shard,
    to_bytes,
)
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import TopKTeacher, next_tokens, shares


class CachedSampled(CachedShards):
    """Looks the drawn tokens up by sample id: ``Sparse`` (B, L, K), float32, with the next token of the text.

    Args:
        path: the folder that ``record_sampled`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, CorruptCacheError, ValueError: as ``CachedTeacher`` does.
    """

    kind = "drawn tokens"
    recorded_by = "teachers.record_sampled(teacher, batches, path, inputs=...)"

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        super().__init__(path, batches=batches, teacher=teacher, checksum=checksum)
        self.samples: int = self.key["samples"]

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        texts = [unpack_counts(*self._held(file, row)) for file, row in self.find(ids)]
        shape = (len(texts), self.length, max((found.shape[1] for found, _ in texts), default=1))
        both = torch.zeros(2, *shape, dtype=torch.long)
        for row, text in enumerate(texts):
            for side, x in zip(both, text, strict=True):
                side[row, :, : x.shape[1]] = x
        label = next_tokens(inputs)
        tokens, counts = both.to(label.device)
        return shares(tokens, counts.float(), self.samples, besides=label)

    def _held(self, file: Any, row: int) -> tuple[Tensor, Tensor, int]:
        first, last = file.get_slice("start")[row : row + 2].tolist()
        return file.get_slice("words")[first:last], file.get_slice("kinds")[row], int(file.get_tensor("bits"))


def record_sampled(
    teacher: TopKTeacher,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Inputs,
    quiet: bool = False,
) -> CachedSampled:
    """Ask the teacher once about every text, keep its draws, and open the result.

    A position takes a byte and, for each different token of its draws, ``id << bits | count`` in whole bytes: three
    for up to 2^17 tokens and 127 draws. With 12 different ones that is 37 bytes, where the paper has 36. Counts are
    whole numbers, so nothing is rounded, and what is learned stays unbiased. Padding takes nothing but its byte. What
    was cut short goes on; of several processes one records.

    Args:
        teacher: ``TopKTeacher(Live(model), samples=50)``.
        batches: texts of one length, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: how a batch becomes the models' inputs: ``LanguageModeling().inputs``. The model must take them:
            ``.prepare_model``.
        quiet: no progress bar.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a teacher that answers NaN, or
            keeps its likeliest tokens.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870; its own layout is not published.
    """
    if teacher.samples is None:
        raise ValueError(f"record_sampled keeps draws; got TopKTeacher(top={teacher.top}). See record_top_k.")
    path, samples = Path(path), teacher.samples
    key = recording_key(CachedSampled.kind, batches, teacher, samples=samples)

    def query(ids: Tensor) -> Tensors:
        parts = [_draws(teacher, samples, *part) for part in text_batches(teacher, batches, ids, inputs)]
        return pack_counts(*(torch.cat(side) for side in zip(*parts, strict=True)))

    record_shards(path, key, query, teacher, size=texts_per_shard(16 * key["length"] * samples), quiet=quiet)
    return CachedSampled(path, batches=batches, teacher=teacher)


def pack_counts(ids: Int[Tensor, "B L S"], counts: Int[Tensor, "B L S"]) -> Tensors:
    """Tokens that were drawn so often at each position; a count of 0 is none.

    "words" (M, bytes), the least byte first, in the order of positions; "kinds" (B, L), how many words a position has;
    "start" (B + 1,), the first word of every text; and "bits" (1,), of the count.

    Raises:
        ValueError: for ids and counts that do not fit into seven bytes.
    """
    there = counts > 0
    bits = max(1, int(counts.max()).bit_length())
    most = int(torch.where(there, ids, 0).max())
    width = -(-(most.bit_length() + bits) // 8)
    if width > 7:
        raise ValueError(f"token ids up to {most} and counts of {bits} bits do not fit into seven bytes.")
    words, kinds = (ids[there] << bits) | counts[there], there.sum(-1)
    return {
        "words": to_bytes(words, width),
        "kinds": kinds.to(torch.uint8 if int(kinds.max()) < 256 else torch.int32),
        "start": torch.cat((kinds.new_zeros(1), kinds.sum(-1).cumsum(0))),
        "bits": torch.tensor([bits]),
    }


def unpack_counts(
    words: Int[Tensor, "M bytes"], kinds: Int[Tensor, " L"], bits: int
) -> tuple[Int[Tensor, "L K"], Int[Tensor, "L K"]]:
    """(ids, counts) of a text's positions, filled up with counts of 0 to the most that one has."""
    whole = from_bytes(words)
    room = torch.arange(max(1, int(kinds.max()))) < kinds.long()[:, None]
    out = whole.new_zeros(room.shape).masked_scatter_(room, whole)
    return out >> bits, out & ((1 << bits) - 1)


def _draws(teacher: TopKTeacher, samples: int, ids: Tensor, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (tokens, counts) of a batch's positions; padding has counts of 0."""
    sparse = query_sparse(teacher, inputs, ids)
    # without the text's own token
    counts = (sparse.logp[..., :-1].exp() * float(samples)).round().long()
    mask = labels >= 0 if "labels" in inputs else inputs.get("attention_mask")
    if mask is not None:
        counts = counts * (mask.cpu() != 0)[..., None]
    return sparse.ids[..., :-1], counts
