"""Atomic writes, checksums and locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    out = []
    raw = path.read_text().splitlines()
    for number, line in enumerate(raw, 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(raw):
                break
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Was it edited by hand?") from error
    return out


def write_atomic(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text)
    beside.replace(path)


LOCK = "lock"


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lasting(path: Path, mode: str, what: Callable[[IO[Any]], Any]) -> None:
    """Write and do not return before it is on the disk."""
    with open(path, mode) as file:
        what(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process records in this folder; the system lets go of the lock when a process dies."""
    import fcntl

    with open(folder / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def taken(place: Path) -> int | None:
    """The cell's lock, held until closed here and in every process it was passed to; None where another has it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(place.with_name(place.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
