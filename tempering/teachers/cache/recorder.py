"""Asking a teacher once about a whole data set, so that a kill half-way costs a moment's work."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import KEY, check_key
from tempering.utils.files import PARTIAL, file_lock, open_synced, sha256_file, write_atomic
from tempering.utils.tensors import to_device

LOGITS, LOG = "logits.npy", "done.jsonl"
EVERY = 2.0  # seconds of work that a kill may cost
STORED = {  # precision -> (as torch computes, as the file holds it); numpy has no bf16
    "fp16": (torch.float16, np.dtype("<f2")),
    "bf16": (torch.bfloat16, np.dtype("<u2")),
    "fp32": (torch.float32, np.dtype("<f4")),
}


class Recordable(Protocol):
    """Batches that can be recorded: they know what they are and give any sample again. ``data.Batches`` is one."""

    @property
    def batch_size(self) -> int:
        """Samples to ask about at a time."""
        ...

    @property
    def identity(self) -> str:
        """sha256 of the data and its preprocessing."""
        ...

    @property
    def rows(self) -> int:
        """How many ids there are."""
        ...

    @property
    def augmentation(self) -> dict[str, Any]:
        """What is done to the samples, JSON-able; "views" is None where ids are indices."""
        ...

    def gather(self, ids: Tensor) -> tuple[Any, Any, Tensor]:
        """(inputs, labels, ids) of any ids."""
        ...

    def clean(self) -> Recordable:
        """The same without augmentation."""
        ...

    def replay(self, views: int) -> Recordable:
        """The same in this many recorded augmentations."""
        ...


def as_recorded(batches: Recordable, views: int | None) -> Recordable:
    """The batches as a recording sees them: clean, or in their recorded views."""
    return batches.clean() if views is None else batches.replay(views)


@torch.no_grad()
def query_teacher(teacher: Teacher, batches: Recordable, ids: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """The teacher's logits for these samples.

    Raises:
        ValueError: for outputs that are no (B, C) logits.
    """
    inputs, _, ids = batches.gather(ids)
    device = device_of(teacher)
    said = teacher(to_device(inputs, device), ids.to(device))
    logits = getattr(said, "logits", said)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(ids):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"only logits (B, C) can be recorded, here B = {len(ids)}; the teacher answers {got}.")
    return logits


def device_of(teacher: Teacher) -> torch.device:
    """Where the teacher's weights lie; the CPU where it has none."""
    parameters = () if teacher.model is None else teacher.model.parameters()
    return next((p.device for p in parameters), torch.device("cpu"))


@contextmanager
def partial_folder(path: Path) -> Iterator[Path | None]:
    """Lock and yield the folder in which the recording of ``path`` is written; None if it is finished.

    Waits for another process that records it.
    """
    folder = path.with_name(path.name + PARTIAL)
    lock = folder.with_name(folder.name + ".lock")  # outside, since Windows renames no folder that holds an open file
    with file_lock(lock):
        if (path / KEY).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            yield None
        else:
            folder.mkdir(exist_ok=True)
            yield folder
    if (path / KEY).is_file():
        lock.unlink(missing_ok=True)


def finish(path: Path, folder: Path, key: Mapping[str, Any], teacher: Teacher, **files: Any) -> None:
    """Write the key with what ``files`` says of the recording's files, then rename the folder to ``path``."""
    from tempering._version import __version__

    model = teacher.model
    made = {
        "teacher": type(teacher if model is None else model).__name__,
        "device": device_of(teacher).type,
        "torch": str(torch.__version__),
        "tempering": __version__,
    }
    write_atomic(folder / KEY, json.dumps({**key, **files, "made": made}, indent=1), fsync=True)
    folder.rename(path)


class Recording:
    """A recording under way beside its path: the array, and a log of the rows that are safely in it."""

    def __init__(self, path: Path, teacher: Teacher, batches: Recordable, key: dict[str, Any], *, quiet: bool) -> None:
        self.path, self.teacher, self.batches, self.key, self.quiet = path, teacher, batches, key, quiet
        self.folder = path.with_name(path.name + PARTIAL)
        self.done, self.classes = 0, 0

    def run(self) -> None:
        """Take up what is there, ask about the rest, and move the whole to its path. Waits for another who does so."""
        with partial_folder(self.path) as folder:
            if folder is None:
                return
            self._recover()
            self._query()
            with self._writing():
                self._finish()

    def _recover(self) -> None:
        """Go to the last row the log vouches for, and cut off what lies behind."""
        if not (self.folder / KEY).is_file() or not (self.folder / LOG).is_file():
            return
        check_key(self.folder, self.key)
        lines = (self.folder / LOG).read_bytes().split(b"\n")[:-1]  # a kill can leave the last line torn
        try:
            last = json.loads(lines[-1])
            end, done, classes = int(last["bytes"]), int(last["done"]), int(last["classes"])
            if (self.folder / LOGITS).stat().st_size < end:
                return
        except (IndexError, KeyError, TypeError, ValueError, OSError):
            return
        os.truncate(self.folder / LOGITS, end)
        (self.folder / LOG).write_bytes(lines[-1] + b"\n")
        self.done, self.classes = done, classes

    def _query(self) -> None:
        total, size = self.key["rows"], self.batches.batch_size
        with progress(total, self.done, self.quiet) as advance:
            first, waiting, since = self.done, [], time.monotonic()
            while first < total:
                ids = torch.arange(first, min(first + size, total))
                waiting.append(self._stored(query_teacher(self.teacher, self.batches, ids), first))
                first += len(ids)
                advance(len(ids))
                if time.monotonic() - since >= EVERY or first == total:
                    with self._writing():
                        self._write(waiting)
                    waiting, since = [], time.monotonic()

    def _stored(self, logits: Tensor, first: int) -> np.ndarray:
        """The rows as the file holds them."""
        cast = to_stored_precision(logits, self.key["precision"], first).cpu().contiguous()
        return cast.view(torch.uint16).numpy() if cast.dtype == torch.bfloat16 else cast.numpy()

    def _write(self, blocks: list[np.ndarray]) -> None:
        """Append blocks and make them last, then say so in the log and make that last."""
        if not self.done:
            self.classes = blocks[0].shape[1]
            for name in (LOG, LOGITS):
                (self.folder / name).unlink(missing_ok=True)
            write_atomic(self.folder / KEY, json.dumps(self.key), fsync=True)
        with open_synced(self.folder / LOGITS, "ab") as file:
            if not self.done:
                header = {"descr": STORED[self.key["precision"]][1].str, "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (self.key["rows"], self.classes)})
            for block in blocks:
                file.write(block.data)
        self.done += sum(map(len, blocks))
        entry = {"done": self.done, "classes": self.classes, "bytes": (self.folder / LOGITS).stat().st_size}
        with open_synced(self.folder / LOG, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")

    def _finish(self) -> None:
        array = self.folder / LOGITS
        whole = {"classes": self.classes, "bytes": array.stat().st_size, "sha256": sha256_file(array)}
        finish(self.path, self.folder, self.key, self.teacher, **whole)
        (self.path / LOG).unlink(missing_ok=True)  # not before: killed here, it would be all to do again

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needed = self.key["rows"] * self.classes * STORED[self.key["precision"]][1].itemsize
            raise OSError(
                error.errno,
                f"cannot write the teacher's answers ({needed / 2**20:.1f} MB) under {self.folder}: {error.strerror}. "
                "Free some space there and call record() again: it goes on where it stopped.",
            ) from error


def to_stored_precision(
    values: Float[Tensor, "B C"], precision: str, first: int, *, what: str = "logits"
) -> Float[Tensor, "B C"]:
    """The rows in a stored precision; ``first`` is the number of the first of them, for errors.

    Raises:
        ValueError: for a row with NaN or infinity, or beyond the precision's range.
    """
    broken = torch.isnan(values) | torch.isposinf(values)
    if broken.any():
        row = int(broken.any(-1).nonzero()[0])
        found = "NaN" if torch.isnan(values[row]).any() else "infinity"
        raise ValueError(
            f"the teacher gives {found} on row {first + row}: nothing can be learned from it. Is its checkpoint "
            "whole, are its inputs normalized as in its training? In half precision, try Live(precision='fp32')."
        )
    dtype, _ = STORED[precision]
    cast = values.to(dtype)
    beyond = torch.isinf(cast) & torch.isfinite(values)
    if beyond.any():
        largest, row = float(values[beyond].abs().max()), int(beyond.any(-1).nonzero()[0])
        other = "'bf16' or 'fp32'" if precision == "fp16" else "'fp32'"
        raise ValueError(
            f"the teacher's {what} reach {largest:.6g} (first in row {first + row}), and {precision} ends at "
            f"{torch.finfo(dtype).max:.6g}. Record with precision={other}."
        )
    return cast


@contextmanager
def progress(total: int, done: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    if quiet:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("asking the teacher", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
