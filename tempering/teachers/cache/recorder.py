"""Record a teacher's outputs for a whole data set, resumably: a kill costs seconds of work."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import KEY, CorruptCacheError, check_key, key_check
from tempering.utils.files import PARTIAL, blocking_folder, file_lock, folder_path, open_synced, write_atomic
from tempering.utils.tensors import to_device

LOGITS, LOG = "logits.npy", "done.jsonl"
EVERY = 2.0  # seconds between writes: the most work that a kill can lose
STORED = {  # precision -> (torch type, numpy type in the file); numpy has no bf16
    "fp16": (torch.float16, np.dtype("<f2")),
    "bf16": (torch.bfloat16, np.dtype("<u2")),
    "fp32": (torch.float32, np.dtype("<f4")),
}


class Recordable(Protocol):
    """Batches that can be recorded: identified by a checksum and indexable by sample id, such as ``data.Batches``."""

    @property
    def batch_size(self) -> int:
        """Samples per forward of the teacher."""
        ...

    @property
    def identity(self) -> str:
        """The sha256 of the data and its preprocessing."""
        ...

    @property
    def rows(self) -> int:
        """Number of ids."""
        ...

    @property
    def augmentation(self) -> dict[str, Any]:
        """Augmentation of the samples, JSON-serializable; "views" is None if ids are indices of samples."""
        ...

    def gather(self, ids: Tensor) -> tuple[Any, Any, Tensor]:
        """Return (inputs, labels, ids) of these ids."""
        ...

    def clean(self) -> Recordable:
        """Return these batches without augmentation."""
        ...

    def replay(self, views: int) -> Recordable:
        """Return these batches in ``views`` recorded augmentations."""
        ...


def as_recorded(batches: Recordable, views: int | None) -> Recordable:
    """Return the batches to record: clean, or in ``views`` recorded augmentations.

    Raises:
        TypeError: for batches without an identity, whose samples cannot be found again.
    """
    check_recordable(batches, "data.Batches(images, labels, ...), data.image_folder, data.hugging_face")
    return batches.clean() if views is None else batches.replay(views)


def check_recordable(batches: Any, loaders: str) -> None:
    """Check that samples can be found again by id, with ``loaders`` to use instead.

    Raises:
        TypeError: for batches without ids or an identity.
    """
    if not all(hasattr(batches, name) for name in ("gather", "clean", "identity")):
        raise TypeError(
            f"a recording needs samples with ids and an identity, which {type(batches).__name__} does not have. Use "
            f"{loaders}, or train with the live teacher."
        )


def recording_path(path: str | Path) -> Path:
    """Return the folder of a recording, with ~ for the home directory.

    Raises:
        ValueError: if it cannot be a folder.
    """
    return folder_path(path, f"the path of a recording, {str(path)!r},", "path")


@torch.no_grad()
def query_teacher(teacher: Teacher, batches: Recordable, ids: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """Return the teacher's logits for these samples.

    Raises:
        ValueError: for outputs other than (B, C) logits.
    """
    teacher.bind_data(batches)
    inputs, _, ids = batches.gather(ids)
    device = device_of(teacher)
    output = teacher(to_device(inputs, device), ids.to(device))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(ids):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        texts = isinstance(logits, Tensor) and logits.ndim == 3
        advice = " For texts: record_top_k(TopKTeacher(teacher, top=16), batches, path, inputs=task.inputs), or "
        raise ValueError(
            f"only logits (B, C) can be recorded, here B = {len(ids)}; the teacher returned {got}."
            f"{advice + 'record_hidden(teacher, batches, path, inputs=task.inputs).' if texts else ''}"
        )
    return logits


def device_of(teacher: Teacher) -> torch.device:
    """Return the device of the teacher's weights; the CPU if it has none."""
    return next((p.device for model in teacher.models for p in model.parameters()), torch.device("cpu"))


@contextmanager
def partial_folder(path: Path) -> Iterator[Path | None]:
    """Lock and yield the folder in which the recording of ``path`` is written; None if it is finished.

    Wait for another process that records it.

    Raises:
        ValueError: if ``path`` exists and is not a recording.
    """
    if path.exists() and not (path / KEY).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{path} exists and is not a teacher cache: it has no {KEY}. Give another path, or remove it to record "
            "again."
        )
    folder = path.with_name(path.name + PARTIAL)
    lock = folder.with_name(folder.name + ".lock")  # outside, since Windows cannot rename a folder with an open file
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not (path / KEY).is_file():
                raise
            yield None  # a finished recording, which others may only read
            return
        if (path / KEY).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            yield None
        else:
            folder.mkdir(exist_ok=True)
            yield folder
    if (path / KEY).is_file():
        lock.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Name the folder, the space needed in bytes, and what to do, in an error of the file system."""
    try:
        yield
    except OSError as error:
        size = f" ({needed / 2**20:.1f} MB)" if needed else ""
        blocking = blocking_folder(error)
        if blocking is not None:
            raise OSError(
                error.errno,
                f"cannot write the teacher's outputs: {blocking} is a folder, and must be a file. Remove it and call "
                "record() again: it resumes.",
            ) from error
        raise OSError(
            error.errno,
            f"cannot write the teacher's outputs{size} under {folder}: {error.strerror}. Free some space there, or "
            "make it writable, and call record() again: it resumes.",
        ) from error


def finish(path: Path, folder: Path, key: Mapping[str, Any], teacher: Teacher, **files: Any) -> None:
    """Write the key with ``files``, the sizes and checksums of the recording, then rename the folder to ``path``.

    A finished recording, whose folder is ``path``, is replaced by one that also has the new files.
    """
    from tempering._version import __version__

    model = teacher.model
    provenance = {
        "teacher": type(teacher if model is None else model).__name__,
        "device": device_of(teacher).type,
        "torch": str(torch.__version__),
        "tempering": __version__,
    }
    whole = {**key, **files, "made": provenance}
    write_atomic(folder / KEY, json.dumps({**whole, "check": key_check(whole)}, indent=1), fsync=True)
    if folder != path:
        folder.rename(path)
    (path / LOG).unlink(missing_ok=True)  # not earlier: a kill before the rename would lose all work


def read_log(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return the entries of a log; a kill can leave an incomplete last line, which is left out.

    Raises:
        CorruptCacheError: for another line that is no entry, naming it.
    """
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if any(type(entry[name]) is not kind for name, kind in fields.items()):
                raise ValueError("a field of another type")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CorruptCacheError(
                f"{path}, line {number}, is damaged ({type(error).__name__}: {error}). Remove {path.parent} and record "
                "again."
            ) from error
        entries.append(entry)
    return entries


class Recording:
    """A recording in progress in ``path.partial``: the array, and a log of the rows that are safely written."""

    def __init__(self, path: Path, teacher: Teacher, batches: Recordable, key: dict[str, Any], *, quiet: bool) -> None:
        self.path, self.teacher, self.batches, self.key, self.quiet = path, teacher, batches, key, quiet
        self.folder = path.with_name(path.name + PARTIAL)
        self.done, self.classes = 0, 0
        self.log: list[dict[str, Any]] = []

    def run(self) -> None:
        """Resume an unfinished recording, query the remaining rows and rename the result; wait for other recorders."""
        with partial_folder(self.path) as folder:
            if folder is None:
                return
            self._recover()
            self._query()
            with self._writing():
                self._finish()

    def _recover(self) -> None:
        """Resume after the last row of the log, and truncate the array there; verify what is kept."""
        if not (self.folder / KEY).is_file() or not (self.folder / LOG).is_file():
            return
        check_key(self.folder, self.key)
        self.log = read_log(self.folder / LOG, {"done": int, "classes": int, "bytes": int, "sha256": str})
        array = self.folder / LOGITS
        if not self.log or not array.is_file() or array.stat().st_size < self.log[-1]["bytes"]:
            self.log = []
            return
        os.truncate(array, self.log[-1]["bytes"])
        self._verify()
        write_atomic(self.folder / LOG, b"".join(map(_line, self.log)), fsync=True)
        self.done, self.classes = self.log[-1]["done"], self.log[-1]["classes"]

    def _verify(self) -> str:
        """Return the checksum of the array, after a check of every block against the log.

        Raises:
            CorruptCacheError: for a block that was changed since it was written.
        """
        total, path = hashlib.sha256(), self.folder / LOGITS
        with open(path, "rb") as file:
            for entry in self.log:
                start = file.tell()
                block = file.read(max(0, entry["bytes"] - start))
                if entry["sha256"] != _block_check(entry, block):
                    raise CorruptCacheError(
                        f"{path} or {LOG} beside it was changed since it was written: bytes {start} to "
                        f"{entry['bytes']} have another checksum. Remove {self.folder} and record again."
                    )
                total.update(block)
            if file.read(1):
                raise CorruptCacheError(f"{path} is longer than {LOG} says. Remove {self.folder} and record again.")
        return total.hexdigest()

    def _query(self) -> None:
        total, size = self.key["rows"], self.batches.batch_size
        with progress(total, self.done, self.quiet) as advance:
            first, pending, last_write = self.done, [], time.monotonic()
            while first < total:
                ids = torch.arange(first, min(first + size, total))
                pending.append(self._stored(query_teacher(self.teacher, self.batches, ids), first))
                first += len(ids)
                advance(len(ids))
                if time.monotonic() - last_write >= EVERY or first == total:
                    with self._writing():
                        self._write(pending)
                    pending, last_write = [], time.monotonic()

    def _stored(self, logits: Tensor, first: int) -> np.ndarray:
        """Return the rows in the type of the file."""
        cast = to_stored_precision(logits, self.key["precision"], first).cpu().contiguous()
        return cast.view(torch.uint16).numpy() if cast.dtype == torch.bfloat16 else cast.numpy()

    def _write(self, blocks: list[np.ndarray]) -> None:
        """Append blocks and sync them to the disk, then append to the log and sync it."""
        content = b"".join(block.tobytes() for block in blocks)
        start = 0
        if not self.done:
            self.classes = blocks[0].shape[1]
            for name in (LOG, LOGITS):
                (self.folder / name).unlink(missing_ok=True)
            write_atomic(self.folder / KEY, json.dumps(self.key), fsync=True)
            header = io.BytesIO()
            of_array = {"descr": STORED[self.key["precision"]][1].str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(header, {**of_array, "shape": (self.key["rows"], self.classes)})
            content = header.getvalue() + content
        else:
            start = self.log[-1]["bytes"]
        with open_synced(self.folder / LOGITS, "ab") as file:
            file.write(content)
        self.done += sum(map(len, blocks))
        entry = {"done": self.done, "classes": self.classes, "bytes": start + len(content)}
        entry["sha256"] = _block_check(entry, content)
        with open_synced(self.folder / LOG, "ab") as file:
            file.write(_line(entry))
        self.log.append(entry)

    def _finish(self) -> None:
        size = (self.folder / LOGITS).stat().st_size
        files = {"classes": self.classes, "bytes": size, "sha256": self._verify()}
        finish(self.path, self.folder, self.key, self.teacher, **files)

    def _writing(self) -> AbstractContextManager[None]:
        size = self.key["rows"] * self.classes * STORED[self.key["precision"]][1].itemsize
        return explain_write_errors(self.folder, size)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _block_check(entry: Mapping[str, Any], block: bytes) -> str:
    """Return the checksum of a block and of what the log says of it."""
    return hashlib.sha256(f"{entry['done']} {entry['classes']} {entry['bytes']} ".encode() + block).hexdigest()


def to_stored_precision(
    values: Float[Tensor, "B C"], precision: str, first: int, *, what: str = "logits"
) -> Float[Tensor, "B C"]:
    """Cast rows to a stored precision.

    Args:
        values: the rows.
        precision: a key of ``STORED``.
        first: the number of the first row, for error messages.
        what: name of the values, for error messages.

    Raises:
        ValueError: for a row with NaN or positive infinity, or beyond the precision's range.
    """
    invalid = torch.isnan(values) | torch.isposinf(values)
    if invalid.any():
        row = int(invalid.any(-1).nonzero()[0])
        kind = "NaN" if torch.isnan(values[row]).any() else "infinity"
        raise ValueError(
            f"the teacher's {what} contain {kind} in row {first + row}. Is its checkpoint complete, and are its inputs "
            "prepared as in its training? In half precision, try Live(precision='fp32')."
        )
    dtype, _ = STORED[precision]
    cast = values.to(dtype)
    overflow = torch.isinf(cast) & torch.isfinite(values)
    if overflow.any():
        largest, row = float(values[overflow].abs().max()), int(overflow.any(-1).nonzero()[0])
        other = "'bf16' or 'fp32'" if precision == "fp16" else "'fp32'"
        raise ValueError(
            f"the teacher's {what} reach {largest:.6g} (first in row {first + row}), and the largest {precision} "
            f"number is {torch.finfo(dtype).max:.6g}. Record with precision={other}."
        )
    return cast


@contextmanager
def progress(total: int, done: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar and yield the function that advances it."""
    if quiet:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("querying the teacher", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
