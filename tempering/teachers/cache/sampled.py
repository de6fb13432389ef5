"""Drawn tokens on disk, packed into bits: about three bytes for each token that was drawn, and one a position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import Recordable, device_of
from tempering.teachers.cache.shards import Shards, Tensors, given, joined, key_of, record_shards, room, split
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import NEVER, Kept, following

KIND = "drawn tokens"


class CachedDrawn(Teacher):
    """Looks the drawn tokens up by sample id: ``Sparse`` (B, L, K), float32, with the next token of the text.

    Args:
        path: the folder that ``record_drawn`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, BrokenCache, ValueError: as ``Shards`` does.
    """

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        self.shards = Shards(path, kind=KIND, batches=batches, teacher=teacher, checksum=checksum)
        self.path, self.identity, self.samples = self.shards.path, self.shards.identity, self.shards.key["samples"]

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        texts = [unpacked(*self._held(file, row)) for file, row in self.shards.at(ids)]
        shape = (len(texts), self.shards.length, max((found.shape[1] for found, _ in texts), default=1))
        both = torch.zeros(2, *shape, dtype=torch.long)
        for row, text in enumerate(texts):
            for side, x in zip(both, text, strict=True):
                side[row, :, : x.shape[1]] = x
        label = following(inputs)
        tokens, counts = both.to(label.device)
        return shares(tokens, counts, self.samples, label)

    def _held(self, file: Any, row: int) -> tuple[Tensor, Tensor, int]:
        first, last = file.get_slice("start")[row : row + 2].tolist()
        return file.get_slice("words")[first:last], file.get_slice("kinds")[row], int(file.get_tensor("bits"))

    def to(self, device: torch.device | str) -> Self:
        return self

    def objection(self, batches: Any) -> str | None:
        return self.shards.objection(batches)


def record_drawn(
    teacher: Kept,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Callable[[Any], tuple[Any, Any, Any]],
    quiet: bool = False,
) -> CachedDrawn:
    """Ask the teacher once about every text, keep its draws, and open the result.

    A position takes a byte and, for each different token of its draws, ``id << bits | count`` in whole bytes: three
    for up to 2^17 tokens and 127 draws. With 12 different ones that is 37 bytes, where the paper has 36. Counts are
    whole numbers, so nothing is rounded, and what is learned stays unbiased. Padding takes nothing but its byte. What
    was cut short goes on; of several processes one records.

    Args:
        teacher: ``Kept(Live(model), samples=50)``.
        batches: texts of one length, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: how a batch becomes the models' inputs: ``Generation().inputs``. The model must take them: ``.meet``.
        quiet: no progress bar.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a teacher that answers NaN, or
            keeps its likeliest tokens.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870; its own layout is not published.
    """
    if teacher.samples is None:
        raise ValueError(f"record_drawn keeps draws; got Kept(top={teacher.top}). See record_sparse.")
    path, asked = Path(path), _Asked(teacher, batches, inputs)
    key = key_of(KIND, batches, teacher, samples=teacher.samples)
    record_shards(path, key, asked, teacher, size=room(16 * key["length"] * teacher.samples), quiet=quiet)
    return CachedDrawn(path, batches=batches, teacher=teacher)


def packed(ids: Int[Tensor, "B L S"], counts: Int[Tensor, "B L S"]) -> Tensors:
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
        "words": split(words, width),
        "kinds": kinds.to(torch.uint8 if int(kinds.max()) < 256 else torch.int32),
        "start": torch.cat((kinds.new_zeros(1), kinds.sum(-1).cumsum(0))),
        "bits": torch.tensor([bits]),
    }


def unpacked(
    words: Int[Tensor, "M bytes"], kinds: Int[Tensor, " L"], bits: int
) -> tuple[Int[Tensor, "L K"], Int[Tensor, "L K"]]:
    """(ids, counts) of a text's positions, filled up with counts of 0 to the most that one has."""
    whole = joined(words)
    room = torch.arange(max(1, int(kinds.max()))) < kinds.long()[:, None]
    out = whole.new_zeros(room.shape).masked_scatter_(room, whole)
    return out >> bits, out & ((1 << bits) - 1)


def shares(ids: Int[Tensor, "*N K"], counts: Int[Tensor, "*N K"], samples: int, besides: Int[Tensor, "*N"]) -> Sparse:
    """The draws as ``Sparse`` with ``besides`` behind them, as ``drawn`` gives them: K + 1 tokens, float32."""
    logp = (counts.float() / samples).log()
    known = ((ids == besides[..., None]) & (counts > 0)).any(-1, keepdim=True)
    extra = torch.full_like(logp[..., :1], NEVER).masked_fill(known, -torch.inf)
    ids, logp = torch.cat((ids, besides[..., None]), -1), torch.cat((logp, extra), -1)
    return Sparse(ids, logp, torch.full_like(logp[..., 0], -torch.inf))


class _Asked:
    """A shard of draws: ids in, packed tensors out."""

    def __init__(self, kept: Kept, batches: Recordable, inputs: Callable[[Any], Any]) -> None:
        self.kept, self.batches, self.inputs = kept, batches, inputs

    def __call__(self, ids: Tensor) -> Tensors:
        parts = [self._asked(part) for part in ids.split(self.batches.batch_size)]
        return packed(*(torch.cat(side) for side in zip(*parts, strict=True)))

    def _asked(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        asked, labels = given(self.batches, ids, self.inputs, device_of(self.kept))
        found = self.kept(asked, ids).to("cpu")
        if torch.isnan(found.logp).any():
            raise ValueError("the teacher gives NaN: nothing can be learned from it. Is its checkpoint whole?")
        # without the text's own token
        drawn = (found.logp[..., :-1].exp() * float(self.kept.samples or 0)).round().long()
        mask = labels >= 0 if "labels" in asked else asked.get("attention_mask")
        if mask is not None:
            drawn = drawn * (mask.cpu() != 0)[..., None]
        return found.ids[..., :-1], drawn
