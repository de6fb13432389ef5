"""Store teacher outputs for texts as shards: safetensors files of several texts each, written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import FORMAT, KEY, CachedTeacher, StoredFile, check_key
from tempering.teachers.cache.recorder import Recordable, device_of, finish, partial_folder, progress
from tempering.teachers.outputs import Sparse
from tempering.utils.files import sha256_file, sha256_text, write_atomic
from tempering.utils.tensors import to_device

Tensors = dict[str, Tensor]
Inputs = Callable[[Any], tuple[Any, Any, Any]]  # a batch -> (student's inputs, teacher's inputs, ids), as tasks do
BYTES = 2**26  # largest shard: a kill costs little and a shard fits into memory
TEXTS = 1024  # most texts per shard


class CachedShards(CachedTeacher):
    """A cached teacher of texts whose files are shards; arguments and errors are those of ``CachedTeacher``."""

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        super().__init__(path, batches=batches, teacher=teacher, checksum=checksum)
        self.size: int = self.key["size"]  # texts per shard
        self.length: int = self.key["length"]

    def files(self) -> list[StoredFile]:
        return [StoredFile(self.path / s["file"], s["bytes"], s["sha256"]) for s in self.key["shards"]]

    def file(self, name: str) -> Any:
        """Return one of the files, memory-mapped."""
        from safetensors import safe_open

        if name not in self._mapped:
            self._mapped[name] = safe_open(str(self.path / name), framework="pt")
        return self._mapped[name]

    def find(self, ids: Int[Tensor, " B"] | None) -> list[tuple[Any, int]]:
        """Return (file, row in it) of every id.

        Raises:
            ValueError: for ids of None, or an id that is not in the recording.
        """
        if ids is None:
            raise ValueError(
                "a cached teacher looks up outputs by sample id, and the batch has none. Batches of data.Tokens and "
                "data.Pairs have ids; generated texts have none and need teachers.Live(model)."
            )
        numbers = ids.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.rows:
            raise ValueError(
                f"{self.path} has texts 0 to {self.rows - 1}, and the batch has ids {min(numbers)} to {max(numbers)}. "
                "Are these the batches it was recorded with?"
            )
        return [(self.file(_shard(i // self.size)), i % self.size) for i in numbers]

    def _map(self) -> dict[str, Any]:
        return {}  # files are memory-mapped at their first use


# recording


def recording_key(kind: str, batches: Recordable, teacher: Teacher, **own: Any) -> dict[str, Any]:
    """Return the key of a recording of texts; ``own`` are the additional fields of its kind."""
    return {
        "format": FORMAT,
        "kind": kind,
        "data": batches.identity,
        "teacher": teacher.identity,
        "augmentation": batches.augmentation,
        "rows": batches.rows,
        "length": batches.gather(torch.tensor([0]))[0]["labels"].shape[1],
        **own,
    }


def record_shards(
    path: Path,
    key: Mapping[str, Any],
    query: Callable[[Tensor], Tensors],
    teacher: Teacher,
    *,
    size: int,
    more: Mapping[str, tuple[Tensors, dict[str, str]]] | None = None,
    quiet: bool = False,
) -> None:
    """Query the teacher for ``key["rows"]`` texts, ``size`` per shard; resume an interrupted recording.

    If several processes call this, one records and the others wait.

    Args:
        query: returns the tensors to store for the texts with these ids.
        more: other files by name, with their metadata.

    Raises:
        ValueError: if ``path`` contains another recording, finished or not, naming the difference.
    """
    if not (path / KEY).is_file():
        with partial_folder(path) as folder:
            if folder is not None:
                _record(path, folder, {**key, "size": size}, query, teacher, more or {}, quiet)
    check_key(path, key)


def text_batches(
    teacher: Teacher, batches: Recordable, ids: Tensor, inputs: Inputs
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """Yield (ids, the teacher's inputs on its device, labels) of these texts, batch by batch."""
    device = device_of(teacher)
    for part in ids.split(batches.batch_size):
        batch, labels, _ = batches.gather(part)
        yield part, inputs(to_device(batch, device))[1], labels


def query_sparse(teacher: Teacher, inputs: Any, ids: Tensor) -> Sparse:
    """Return a teacher's ``Sparse`` outputs, on the CPU.

    Raises:
        TypeError: for other outputs.
        ValueError: for NaN.
    """
    sparse = teacher(inputs, ids)
    if not isinstance(sparse, Sparse):
        raise TypeError(
            f"only Sparse outputs can be recorded; {type(teacher).__name__} returned {type(sparse).__name__}. "
            "Reduce them first: TopKTeacher(teacher, top=16)."
        )
    if torch.isnan(sparse.logp).any():
        raise ValueError("the teacher's log-probabilities contain NaN. Is its checkpoint complete?")
    return sparse.to("cpu")


def texts_per_shard(bytes_per_text: int) -> int:
    """Return the number of texts per shard."""
    return max(1, min(TEXTS, BYTES // max(1, bytes_per_text)))


def _record(
    path: Path,
    folder: Path,
    key: Mapping[str, Any],
    query: Callable[[Tensor], Tensors],
    teacher: Teacher,
    more: Mapping[str, tuple[Tensors, dict[str, str]]],
    quiet: bool,
) -> None:
    if (folder / KEY).is_file():
        check_key(folder, key)
    else:
        write_atomic(folder / KEY, json.dumps(key), fsync=True)
    files = []
    with progress(key["rows"], 0, quiet) as advance:
        for number, first in enumerate(range(0, key["rows"], key["size"])):
            ids = torch.arange(first, min(first + key["size"], key["rows"]))
            file = folder / _shard(number)
            if not file.is_file():
                _write(file, query(ids), {})
            files.append(file)
            advance(len(ids))
    for name, (tensors, metadata) in more.items():
        _write(folder / name, tensors, metadata)
        files.append(folder / name)
    shards = [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]
    finish(path, folder, key, teacher, shards=shards, sha256=sha256_text("".join(s["sha256"] for s in shards)))


def _write(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata=metadata)
    write_atomic(file, data, fsync=True)


def _shard(number: int) -> str:
    return f"{number:05d}.safetensors"


# integers in as few bytes as possible


def to_bytes(values: Int[Tensor, "*N"], width: int | None = None) -> Int[Tensor, "*N bytes"]:
    """Return non-negative integers as uint8, least significant byte first; width None fits the largest."""
    largest = int(values.max()) if values.numel() else 0
    shifts = 8 * torch.arange(width or max(1, -(-largest.bit_length() // 8)))
    return ((values[..., None] >> shifts) & 255).to(torch.uint8)


def from_bytes(parts: Int[Tensor, "*N bytes"]) -> Int[Tensor, "*N"]:
    """Invert ``to_bytes``."""
    return (parts.long() << 8 * torch.arange(parts.shape[-1])).sum(-1)
