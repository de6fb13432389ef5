"""Teachers of which few tokens a position are kept: the likeliest with a bucket for the rest, or unbiased samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import Recordable
from tempering.teachers.cache.sampled import CachedSampled, record_sampled
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
from tempering.teachers.selection import TopKTeacher

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


class CachedTopK(CachedShards):
    """Looks the kept tokens up by sample id: ``Sparse`` (B, L, K), float32, on the ids' device.

    Those of fp16 are divided by their sum again, so a position is a distribution and no loss over it negative. Files
    are mapped, and many processes may read them.

    Args:
        path: the folder that ``record_top_k`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, CorruptCacheError, ValueError: as ``CachedTeacher`` does.
    """

    kind = "likeliest tokens"
    recorded_by = "teachers.record_top_k(teacher, batches, path, inputs=...)"

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        parts = [self._held(file, row) for file, row in self.find(ids)]
        parts = parts or [[x[:0] for x in self._held(*self.find(torch.tensor([0]))[0])]]
        tokens, logp, rest = (torch.cat(side) for side in zip(*parts, strict=True))
        if logp.dtype == torch.float16:
            logp, rest = logp.float(), rest.float()
            whole = torch.cat((logp, rest[..., None]), -1).logsumexp(-1)
            logp, rest = logp - whole[..., None], rest - whole
        found = Sparse(tokens, logp, rest)
        return found if ids is None else found.to(ids.device)

    def _held(self, file: Any, row: int) -> list[Tensor]:
        tokens, logp, rest = (file.get_slice(name)[row : row + 1] for name in ("ids", "logp", "rest"))
        return [from_bytes(tokens), logp, rest]


def record_top_k(
    teacher: Teacher,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Inputs,
    precision: str = "fp32",
    quiet: bool = False,
) -> CachedTopK | CachedSampled:
    """Ask the teacher once about every text, and open the result; goes on where a recording was cut short.

    Of several processes that call this one records, and the others wait. Ids lie in whole bytes, two below 2^16 tokens
    and three below 2^24; with log-probabilities of fp32 a token of the text takes 6 K + 4 bytes, or 7 K + 4, and with
    those of fp16 4 K + 2, or 5 K + 2. Samples go to ``record_sampled``, in about 37 bytes.

    Args:
        teacher: one that answers ``Sparse``: what is kept of another, ``TopKTeacher(Live(model), top=16)``, or
            ``RemoteTeacher``.
        batches: texts of one length, ``data.tokens.Tokens``.
        path: the folder to write.
        inputs: how a batch becomes the models' inputs: ``LanguageModeling().inputs``. The model must take them:
            ``.prepare_model``.
        precision: "fp32" rounds nothing; "fp16" rounds log-probabilities by 2^-11 of themselves at most: the KL from
            what was said to what is read stays below 1e-6, and the total variation below 3e-4, measured for K of 16
            and 64 at 300 to 50,000 tokens.
        quiet: no progress bar.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a teacher that answers NaN, or
            another precision.
        TypeError: for a teacher that answers no ``Sparse``.
    """
    if isinstance(teacher, TopKTeacher) and teacher.samples is not None:
        return record_sampled(teacher, batches, path, inputs=inputs, quiet=quiet)
    if precision not in PRECISIONS:
        raise ValueError(f"record_top_k needs precision {' or '.join(map(repr, PRECISIONS))}; got {precision!r}.")
    path, dtype = Path(path), PRECISIONS[precision]
    key = recording_key(CachedTopK.kind, batches, teacher, precision=precision)
    kept = 1 + (getattr(teacher, "top", None) or 64)

    def query(ids: Tensor) -> Tensors:
        parts = [query_sparse(teacher, given, part) for part, given, _ in text_batches(teacher, batches, ids, inputs)]
        tokens, logp, rest = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logp", "tail_logp")
        )
        return {"ids": to_bytes(tokens), "logp": _stored(logp, dtype), "rest": _stored(rest, dtype)}

    record_shards(path, key, query, teacher, size=texts_per_shard(8 * kept * key["length"]), quiet=quiet)
    return CachedTopK(path, batches=batches, teacher=teacher)


def _stored(logp: Tensor, dtype: torch.dtype) -> Tensor:
    """Round log-probabilities to a stored type; one below its range becomes its lowest, so the token stays held."""
    return torch.where(torch.isneginf(logp), logp, logp.clamp_min(torch.finfo(dtype).min)).to(dtype)
