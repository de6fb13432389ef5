"""Cache of tokens sampled from the teacher: about three bytes per different token, and one per position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.cache import shards
from tempering.teachers.cache.recorder import Recordable
from tempering.teachers.cache.shards import CachedShards, Inputs, Tensors
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import TopKTeacher, next_tokens, shares


class CachedSampled(CachedShards):
    """Looks up the sampled tokens by sample id: ``Sparse`` (B, L, K), float32, with the next token of the text.

    Arguments and errors are those of ``CachedTeacher``; ``record_sampled`` writes the folder.
    """

    kind = "drawn tokens"
    recorded_by = "teachers.record_sampled(teacher, batches, path, inputs=...)"

    @property
    def samples(self) -> int:
        """Number of tokens sampled per position."""
        return self.key["samples"]

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        texts = [unpack_counts(*self._read(file, row)) for file, row in self.find(ids)]
        shape = (len(texts), self.length, max((tokens.shape[1] for tokens, _ in texts), default=1))
        padded = torch.zeros(2, *shape, dtype=torch.long)
        for row, text in enumerate(texts):
            for side, x in zip(padded, text, strict=True):
                side[row, :, : x.shape[1]] = x
        label = next_tokens(inputs)
        tokens, counts = padded.to(label.device)
        return shares(tokens, counts.float(), self.samples, besides=label)

    def _read(self, file: Any, row: int) -> tuple[Tensor, Tensor, int]:
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
    """Run the teacher once on every text, store its samples, and open the result.

    A position takes a byte and, for each different sampled token, ``id << bits | count`` in whole bytes: three for up
    to 2^17 tokens and 127 samples. With 12 different ones that is 37 bytes, where the paper has 36. Counts are
    integers, so nothing is rounded and the gradient stays unbiased. Padding takes only its byte. An interrupted
    recording is resumed; if several processes call this, one records.

    Args:
        teacher: ``TopKTeacher(Live(model), samples=50)``.
        batches: texts of one length, ``data.Tokens`` or ``data.Pairs``.
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
    path, samples = Path(path), teacher.samples
    key = shards.recording_key(CachedSampled.kind, batches, teacher, samples=samples)

    def query(ids: Tensor) -> Tensors:
        parts = [
            _sampled_counts(teacher, samples, *part) for part in shards.text_batches(teacher, batches, ids, inputs)
        ]
        return pack_counts(*(torch.cat(side) for side in zip(*parts, strict=True)))

    shards.record_shards(
        path, key, query, teacher, size=shards.texts_per_shard(16 * key["length"] * samples), quiet=quiet
    )
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
    bits = max(1, int(counts.max()).bit_length())
    largest = int(torch.where(present, ids, 0).max())
    width = -(-(largest.bit_length() + bits) // 8)
    if width > 7:
        raise ValueError(f"token ids up to {largest} and counts of {bits} bits do not fit into seven bytes.")
    words, kinds = (ids[present] << bits) | counts[present], present.sum(-1)
    return {
        "words": shards.to_bytes(words, width),
        "kinds": kinds.to(torch.uint8 if int(kinds.max()) < 256 else torch.int32),
        "start": torch.cat((kinds.new_zeros(1), kinds.sum(-1).cumsum(0))),
        "bits": torch.tensor([bits]),
    }


def unpack_counts(
    words: Int[Tensor, "M bytes"], kinds: Int[Tensor, " L"], bits: int
) -> tuple[Int[Tensor, "L K"], Int[Tensor, "L K"]]:
    """Return (ids, counts) of a text's positions, padded with counts of 0 to the largest number per position."""
    values = shards.from_bytes(words)
    filled = torch.arange(max(1, int(kinds.max()))) < kinds.long()[:, None]
    out = values.new_zeros(filled.shape).masked_scatter_(filled, values)
    return out >> bits, out & ((1 << bits) - 1)


def _sampled_counts(
    teacher: TopKTeacher, samples: int, ids: Tensor, inputs: Any, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (tokens, counts) of a batch's positions; padding has counts of 0."""
    sparse = shards.query_sparse(teacher, inputs, ids)
    # the last column is the token of the text
    counts = (sparse.logp[..., :-1].exp() * float(samples)).round().long()
    mask = labels >= 0 if "labels" in inputs else inputs.get("attention_mask")
    if mask is not None:
        counts = counts * (mask.cpu() != 0)[..., None]
    return sparse.ids[..., :-1], counts
