"""Cache of the teacher's likeliest tokens per position, with the log-probability of the tail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import Recordable, recording_path
from tempering.teachers.cache.sampled import CachedSampled, record_sampled
from tempering.teachers.cache.shard_recorder import Tensors, query_sparse, record_shards, recording_key
from tempering.teachers.cache.text_lookup import CachedShards, device_like, from_bytes, to_bytes
from tempering.teachers.cache.texts import Inputs
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import TopKTeacher

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


class CachedTopK(CachedShards):
    """Looks up the stored tokens by sample id: ``Sparse`` (B, L, K), float32, on the device of the ids.

    Log-probabilities stored in fp16 are renormalized, so each position is a distribution and no divergence negative.
    Files are memory-mapped, and many processes may read them.

    Arguments and errors are those of ``CachedTeacher``; ``record_top_k`` writes the folder.
    """

    kind = "likeliest tokens"
    recorded_by = "teachers.record_top_k(teacher, batches, path, inputs=...)"

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        found = self.find(inputs, ids)
        parts = [self._read(*part) for part in found.parts] or [[x[:0] for x in self._read(*self.first())]]
        tokens, logp, tail = (torch.cat(side) for side in zip(*parts, strict=True))
        if logp.dtype == torch.float16:
            logp, tail = logp.float(), tail.float()
            total = torch.cat((logp, tail[..., None]), -1).logsumexp(-1)
            logp, tail = logp - total[..., None], tail - total
        output = Sparse(found.scatter(tokens, 0), found.scatter(logp), found.scatter(tail), found.stored)
        return output.to(device_like(inputs, ids))

    def _read(self, file: Any, row: int, part: slice | int) -> list[Tensor]:
        tokens, logp, tail = (file.get_slice(name)[part] for name in ("ids", "logp", "rest"))
        return [from_bytes(tokens), logp, tail]


def record_top_k(
    teacher: Teacher,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Inputs,
    precision: str = "fp32",
    quiet: bool = False,
) -> CachedTopK | CachedSampled:
    """Run the teacher once on every text, and open the result; resume an interrupted recording.

    If several processes call this, one records and the others wait. Texts are stored by their tokens, and only the
    positions that the task learns: texts that ``path`` has already are not computed again, whatever their padding,
    order and batch size, and others are added. Ids take whole bytes, two below 2^16 tokens and three below 2^24; with
    log-probabilities of fp32 a learned position takes 6 K + 4 bytes, or 7 K + 4, and with those of fp16 4 K + 2, or
    5 K + 2; a text takes 16 more, and 8 for every stretch of learned positions. Sampled tokens are passed to
    ``record_sampled``, which takes about 37 bytes.

    Args:
        teacher: one with ``Sparse`` outputs: ``TopKTeacher(Live(model), top=16)`` or ``RemoteTeacher``.
        batches: texts, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: maps a batch to the models' inputs: ``LanguageModeling().inputs``. The model must accept them: see
            ``LanguageModeling.prepare_model``.
        precision: "fp32" rounds nothing; "fp16" rounds log-probabilities by a relative error of 2^-11 at most: the KL
            divergence from the original to the stored distribution stays below 1e-6, and the total variation below
            3e-4, measured for K of 16 and 64 at 300 to 50,000 tokens.
        quiet: whether to hide the progress bar.

    Raises:
        ValueError: if ``path`` contains another recording, naming the difference; for log-probabilities that are NaN,
            or another precision.
        TypeError: for a teacher whose outputs are not ``Sparse``.
    """
    if isinstance(teacher, TopKTeacher) and teacher.samples is not None:
        return record_sampled(teacher, batches, path, inputs=inputs, quiet=quiet)
    if precision not in PRECISIONS:
        raise ValueError(f"record_top_k needs precision {' or '.join(map(repr, PRECISIONS))}; got {precision!r}.")
    path, dtype = recording_path(path), PRECISIONS[precision]
    key = recording_key(CachedTopK.kind, batches, teacher, inputs, precision=precision)

    def query(given: Any, ids: Tensor, mask: Tensor) -> Tensors:
        sparse = query_sparse(teacher, given, ids)
        logp, tail = (_stored(x[mask], dtype) for x in (sparse.logp, sparse.tail_logp))
        return {"ids": sparse.ids[mask], "logp": logp, "rest": tail}

    def encode(tensors: Tensors, first: Tensor) -> Tensors:
        return tensors | {"ids": to_bytes(tensors["ids"])}

    size = 8 * (2 + (getattr(teacher, "top", None) or 64))
    record_shards(path, key, teacher, batches, inputs, query, bytes_per_position=size, encode=encode, quiet=quiet)
    return CachedTopK(path, batches=batches, teacher=teacher)


def _stored(logp: Tensor, dtype: torch.dtype) -> Tensor:
    """Round log-probabilities to a stored type; clamp one below its range to its lowest, so that no token is lost."""
    return torch.where(torch.isneginf(logp), logp, logp.clamp_min(torch.finfo(dtype).min)).to(dtype)
