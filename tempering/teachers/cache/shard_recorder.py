"""Write teacher outputs for texts as shards, resumably; texts that a recording has already are not computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import FORMAT, KEY, CorruptCacheError, StoredFile, check_file, check_key, read_key
from tempering.teachers.cache.recorder import (
    LOG,
    Recordable,
    check_recordable,
    device_of,
    explain_write_errors,
    finish,
    partial_folder,
    progress,
    read_log,
)
from tempering.teachers.cache.text_lookup import (
    BY_TEXT,
    is_shard,
    open_shard,
    shard_name,
    stored_positions,
    to_runs,
)
from tempering.teachers.cache.texts import NO_CONTENT, Inputs, learned_positions, texts_of
from tempering.teachers.outputs import Sparse
from tempering.utils.files import open_synced, sha256_text, write_atomic
from tempering.utils.tensors import to_device

Tensors = dict[str, Tensor]
Query = Callable[[Any, Tensor, Tensor], Tensors]  # teacher's inputs, ids, (B, L) mask -> tensors (positions of it, ...)
BYTES = 2**26  # largest shard: a kill costs little and a shard fits into memory
TEXTS = 1024  # most texts per shard


def recording_key(kind: str, batches: Recordable, teacher: Teacher, inputs: Inputs, **own: Any) -> dict[str, Any]:
    """Return the key of a recording of texts; ``own`` are the additional fields of its kind.

    Raises:
        TypeError: for something other than a teacher.
    """
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"a recording of {kind} needs a Teacher; got {type(teacher).__name__}. Wrap a module: "
            "teachers.TopKTeacher(teachers.Live(model), top=16)."
        )
    check_recordable(batches, "data.Tokens(examples, ...) or data.Pairs(examples, ...)")
    wants = "inputs needs a function from a batch to (student's inputs, teacher's inputs, ids): task.inputs"
    if not callable(inputs):
        raise TypeError(f"{wants}, such as tasks.LanguageModeling().inputs; got {inputs!r}.")
    result: Any = inputs(batches.gather(torch.tensor([0]))[0])
    if not isinstance(result, tuple) or len(result) != 3 or not isinstance(result[1], Mapping):  # pyright: ignore
        raise TypeError(f"{wants}, such as tasks.LanguageModeling().inputs; it returned {type(result).__name__}.")
    given = result[1]
    names = sorted(name for name, x in given.items() if isinstance(x, Tensor) and name not in NO_CONTENT)
    return {"format": BY_TEXT, "kind": kind, "teacher": teacher.identity, "inputs": names, **own}


def record_shards(
    path: Path,
    key: Mapping[str, Any],
    teacher: Teacher,
    batches: Recordable,
    inputs: Inputs,
    query: Query,
    *,
    bytes_per_position: int,
    encode: Callable[[Tensors, Tensor], Tensors] = lambda tensors, first: tensors,
    more: Mapping[str, tuple[Tensors, dict[str, str]]] | None = None,
    quiet: bool = False,
) -> None:
    """Query the teacher for the texts that ``path`` does not have; resume an interrupted recording.

    If several processes call this, one records and the others wait.

    Args:
        query: returns the tensors to store for the positions of a mask, in their order.
        bytes_per_position: an upper bound, from which the number of texts per shard is computed.
        encode: converts the tensors of a shard to those in the file, from the first position of each text, (B + 1,).
        more: other files by name, with their metadata.

    Raises:
        ValueError: if ``path`` contains another recording, finished or not, naming the difference.
        CorruptCacheError: for a file that was changed since it was written, naming it.
    """
    with partial_folder(path) as partial:
        stored = {} if partial is not None else read_key(path)
        if stored.get("format") == FORMAT:  # by id, and cannot be extended
            by_id = {"data": batches.identity, "rows": batches.rows}
            own = {n: x for n, x in key.items() if n not in ("format", "inputs")}
            return check_key(path, own | by_id)
        if partial is None or (partial / KEY).is_file():
            check_key(path if partial is None else partial, key)
        if batches.identity in stored.get("data", ()):
            return None
        shards = _Shards(path if partial is None else partial, key, stored.get("shards", []), more or {})
        missing = shards.missing(batches, inputs)
        if missing or partial is not None:
            length = max((mask.shape[0] for _, mask in missing), default=1)
            size = max(1, min(TEXTS, BYTES // max(1, bytes_per_position * length)))
            with progress(len(missing), 0, quiet) as advance:
                for first in range(0, len(missing), size):
                    shards.add(missing[first : first + size], teacher, batches, inputs, query, encode)
                    advance(len(missing[first : first + size]))
            shards.finish(path, teacher, [*stored.get("data", ()), batches.identity])
    return None


class _Shards:
    """The shards of a recording in progress, and a log of those that are written, with their checksums."""

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        finished: list[dict[str, Any]],
        more: Mapping[str, tuple[Tensors, dict[str, str]]],
    ) -> None:
        self.folder, self.key = folder, key
        if not finished and not (folder / KEY).is_file():
            with explain_write_errors(folder):
                write_atomic(folder / KEY, json.dumps(dict(key)), fsync=True)
        names = {entry["file"] for entry in finished}
        self.entries = [*finished, *(entry for entry in self._logged() if entry["file"] not in names)]
        self.stored: dict[int, Tensor] = {}  # key of a text -> its stored positions
        for entry in self.entries:
            if is_shard(entry["file"]):
                self._read(folder / entry["file"])
        for name, (tensors, metadata) in more.items():
            if all(entry["file"] != name for entry in self.entries):
                self._write(name, tensors, metadata)

    def _logged(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of the log, after a check of their files; one whose file is missing is recorded again."""
        for entry in read_log(self.folder / LOG, {"file": str, "bytes": int, "sha256": str}):
            file = StoredFile(self.folder / entry["file"], entry["bytes"], entry["sha256"])
            if file.path.is_file():
                check_file(file, f"Remove this file; the same record() computes it again. ({LOG} has its checksum.)")
                yield entry

    def _read(self, path: Path) -> None:
        file = open_shard(path)
        try:
            for row, key in enumerate(file.get_tensor("keys").tolist()):
                self.stored[key] = stored_positions(file, row)
        except Exception as error:  # of safetensors, which has one class for all
            raise CorruptCacheError(f"{path} cannot be read ({error}). Remove the folder and record again.") from error

    def missing(self, batches: Recordable, inputs: Inputs) -> list[tuple[int, Bool[Tensor, " L"]]]:
        """Return the ids of texts to record, with the mask of their learned positions and those stored before."""
        out, seen = [], set()
        for ids in torch.arange(batches.rows).split(1024):
            batch = batches.gather(ids)[0]
            given = inputs(batch)[1]
            learned = learned_positions(inputs, batch, given)
            for text in texts_of(given):
                tokens, stored = learned[text.row, text.columns], self.stored.get(text.key)
                mask = torch.zeros_like(learned[text.row])
                mask[text.columns] = tokens
                if stored is not None:
                    had = torch.zeros_like(tokens).index_fill_(0, stored, True)
                    if not bool((tokens & ~had).any()):
                        continue
                    mask[text.columns] |= had
                if text.key not in seen:
                    seen.add(text.key)
                    out.append((int(ids[text.row]), mask))
        return out

    def add(
        self,
        texts: list[tuple[int, Tensor]],
        teacher: Teacher,
        batches: Recordable,
        inputs: Inputs,
        query: Query,
        encode: Callable[[Tensors, Tensor], Tensors],
    ) -> None:
        """Query the teacher for these texts, and write a shard."""
        device, parts, keys, positions = device_of(teacher), [], [], []
        for start in range(0, len(texts), batches.batch_size):
            part = texts[start : start + batches.batch_size]
            ids, mask = torch.tensor([i for i, _ in part]), torch.stack([mask for _, mask in part])
            given = inputs(to_device(batches.gather(ids)[0], device))[1]
            parts.append({n: x.cpu() for n, x in query(given, ids, mask).items()})
            for text in texts_of(given):
                keys.append(text.key)
                positions.append(mask[text.row, text.columns].nonzero().flatten())
                self.stored[text.key] = positions[-1]
        runs = [to_runs(x) for x in positions]
        first, first_run = (torch.tensor([0, *map(len, x)]).cumsum(0) for x in (positions, runs))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        own = {"keys": torch.tensor(keys), "first": first.int()}
        own |= {"first_run": first_run.int(), "runs": torch.cat(runs).int()}
        names = {entry["file"] for entry in self.entries}
        name = next(name for name in map(shard_name, range(len(names) + 1)) if name not in names)
        self._write(name, own | encode(tensors, first), {})

    def _write(self, name: str, tensors: Tensors, metadata: dict[str, str]) -> None:
        """Write a file, then its entry of the log, each synced to the disk."""
        from safetensors.torch import save

        data = save({n: x.detach().cpu().contiguous() for n, x in tensors.items()}, metadata=metadata)
        entry = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        with explain_write_errors(self.folder, len(data)):
            write_atomic(self.folder / name, data, fsync=True)
            with open_synced(self.folder / LOG, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
        self.entries.append(entry)

    def finish(self, path: Path, teacher: Teacher, data: list[str]) -> None:
        """Compare all files with the checksums of their content in memory, then write the key."""
        for entry in self.entries:
            file = StoredFile(self.folder / entry["file"], entry["bytes"], entry["sha256"])
            check_file(file, "It was changed while this recorded. Remove it; the same record() computes it again.")
        entries = sorted(self.entries, key=lambda entry: entry["file"])
        total = sha256_text("".join(entry["sha256"] for entry in entries))
        rows = len(self.stored)
        with explain_write_errors(self.folder):
            finish(path, self.folder, self.key, teacher, data=data, rows=rows, shards=entries, sha256=total)


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
