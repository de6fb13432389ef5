"""Cache of tokens sampled from the teacher: about three bytes per different token, and one per position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from tempering.teachers.cache.recorder import Recordable, recording_path
from tempering.teachers.cache.shard_recorder import Tensors, query_sparse, record_shards, recording_key
from tempering.teachers.cache.text_lookup import CachedShards, from_bytes, to_bytes
from tempering.teachers.cache.texts import Inputs
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import TopKTeacher, next_tokens, shares


class CachedSampled(CachedShards):
    """Looks up the sampled tokens by sample id: ``Sparse`` (B, L, K), float32, with the next token of the text.

    Arguments and errors are those of ``CachedTeacher``; ``record_sampled`` writes the folder.
    """

    kind = "drawn tokens"
    recorded_by = "teachers.record_sampled(teacher, batches, path, inputs=...)"

    def _open(self) -> None:
        super()._open()
        self.samples = int(self.key["samples"])

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        found = self.find(inputs, ids)
        texts = [unpack_counts(*self._read(*part)) for part in found.parts]
        width = max((tokens.shape[1] for tokens, _ in texts), default=1)
        sides = zip(*texts, strict=True) if texts else ([torch.zeros(0, 1, dtype=torch.long)],) * 2
        padded = [torch.cat([pad(x, (0, width - x.shape[1])) for x in side]) for side in sides]
        label = next_tokens(inputs)
        tokens, counts = (found.scatter(x, 0).to(label.device) for x in padded)
        sparse = shares(tokens, counts.float(), self.key["samples"], besides=label)
        if found.stored is None:
            return sparse
        stored = found.stored.to(label.device)
        logp, tail = sparse.logp.masked_fill(~stored[..., None], torch.nan), sparse.tail_logp
        return Sparse(sparse.ids, logp, tail.masked_fill(~stored, torch.nan), stored)

    def _read(self, file: Any, row: int, part: slice | int) -> tuple[Tensor, Tensor, int]:
        first, last = file.get_slice("start")[row : row + 2].tolist()
        return file.get_slice("words")[first:last], file.get_slice("kinds")[part], int(file.get_tensor("bits"))


def record_sampled(
    teacher: TopKTeacher,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Inputs,
    quiet: bool = False,
) -> CachedSampled:
    """Run the teacher once on every text, store its samples, and open the result.

    A learned position takes a byte and, for each different sampled token, ``id << bits | count`` in whole bytes: three
    for up to 2^17 tokens and 127 samples. With 12 different ones that is 37 bytes, where the paper has 36; a text takes
    24 more, and 8 for every stretch of learned positions. Counts are integers, so nothing is rounded and the gradient
    stays unbiased. Positions that are not learned take nothing, and texts that ``path`` has already are not computed
    again: see ``record_top_k``. An interrupted recording is resumed; if several processes call this, one records.

    Args:
        teacher: ``TopKTeacher(Live(model), samples=50)``.
        batches: texts, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: maps a batch to the models' inputs: ``LanguageModeling().inputs``. The model must accept them: see
            ``LanguageModeling.prepare_model``.
        quiet: whether to hide the progress bar.

    Raises:
        ValueError: if ``path`` contains another recording, naming the difference; for logits that are NaN, or a
            teacher with ``top`` in place of ``samples``.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870; its file layout is not published.
    """
    if teacher.samples is None:
        raise ValueError(
            f"record_sampled needs TopKTeacher(samples=...); got TopKTeacher(top={teacher.top}). See record_top_k."
        )
    path, samples = recording_path(path), teacher.samples
    key = recording_key(CachedSampled.kind, batches, teacher, inputs, samples=samples)

    def query(given: Any, ids: Tensor, mask: Tensor) -> Tensors:
        sparse = query_sparse(teacher, given, ids)
        # the last column is the token of the text
        counts = (sparse.logp[mask][:, :-1].exp() * float(samples)).round().long()
        return {"ids": sparse.ids[mask][:, :-1], "counts": counts}

    def encode(tensors: Tensors, first: Tensor) -> Tensors:
        packed = pack_counts(tensors["ids"][None], tensors["counts"][None])
        kinds = packed["kinds"][0]
        start = torch.cat((first[:1], kinds.long().cumsum(0)))[first]
        return packed | {"kinds": kinds, "start": start}

    size = 16 * samples
    record_shards(path, key, teacher, batches, inputs, query, bytes_per_position=size, encode=encode, quiet=quiet)
    return CachedSampled(path, batches=batches, teacher=teacher)


def pack_counts(ids: Int[Tensor, "B L S"], counts: Int[Tensor, "B L S"]) -> Tensors:
    """Pack token ids and their counts per position; a count of 0 marks an empty slot.

    Returns:
        "words" (M, bytes), the least significant byte first, in the order of positions; "kinds" (B, L), the number of
        words per position; "start" (B + 1,), the first word of every text; and "bits" (1,), the width of the count.

    Raises:
        ValueError: for ids and counts that do not fit into seven bytes.
    """
    present = counts > 0
    bits = max(1, _largest(counts).bit_length())
    largest = _largest(torch.where(present, ids, 0))
    width = -(-(largest.bit_length() + bits) // 8)
    if width > 7:
        raise ValueError(f"token ids up to {largest} and counts of {bits} bits do not fit into seven bytes.")
    words, kinds = (ids[present] << bits) | counts[present], present.sum(-1)
    return {
        "words": to_bytes(words, width),
        "kinds": kinds.to(torch.uint8 if _largest(kinds) < 256 else torch.int32),
        "start": torch.cat((kinds.new_zeros(1), kinds.sum(-1).cumsum(0))),
        "bits": torch.tensor([bits]),
    }


def unpack_counts(
    words: Int[Tensor, "M bytes"], kinds: Int[Tensor, " L"], bits: int
) -> tuple[Int[Tensor, "L K"], Int[Tensor, "L K"]]:
    """Return (ids, counts) of a text's positions, padded with counts of 0 to the largest number per position."""
    values = from_bytes(words)
    filled = torch.arange(max(1, _largest(kinds))) < kinds.long()[:, None]
    out = values.new_zeros(filled.shape).masked_scatter_(filled, values)
    return out >> bits, out & ((1 << bits) - 1)


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0
