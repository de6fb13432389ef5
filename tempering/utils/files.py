"""Atomic writes, checksums and file locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

PARTIAL = ".partial"  # suffix of a file or folder that is being written
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class LockedError(TimeoutError):
    """Another process holds the lock."""


class LockUnsupportedError(OSError):
    """The file system has no file locks; the message names the path and what to do."""


# reading and writing


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; skip a last line that a kill cut short; [] if there is no file.

    Raises:
        ValueError: if any other line is not JSON, naming the line.
    """
    if not path.is_file():
        return []
    out = []
    raw = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(raw, 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(raw):
                break
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Was it edited by hand?") from error
    return out


def write_atomic(path: Path, content: str | bytes, *, fsync: bool = False, concurrent: bool = False) -> None:
    """Write a temporary file in the same folder, then rename it, so that ``path`` never has partial ``content``.

    Args:
        path: the file to write or replace.
        content: text is written as UTF-8 with its line ends unchanged.
        fsync: flush to the disk before renaming.
        concurrent: use a temporary file per process, for files that several processes may write at once.

    Raises:
        OSError: if it cannot be written; an existing file is kept.
    """
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}" if concurrent else path.name + PARTIAL)
    data = content.encode() if isinstance(content, str) else content
    try:
        write_file(tmp_path, data, fsync=fsync)
        tmp_path.replace(path)
    except BaseException:
        tmp_path.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Write bytes; return when they are on the disk. For files in a folder that is renamed as a whole."""
    if fsync:
        with open_synced(path, "wb") as file:
            file.write(data)
    else:
        path.write_bytes(data)


@contextmanager
def open_synced(path: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file for writing; flush it to the disk when the block ends."""
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


# checksums


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


# locks


@contextmanager
def file_lock(path: Path, *, blocking: bool = True, timeout: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock between processes; the operating system releases it when the process ends.

    Args:
        path: the lock file, which is created if needed and may stay behind, empty.
        blocking: wait for another process that holds the lock.
        timeout: seconds to wait at most; None waits forever.

    Raises:
        LockedError: if another process holds the lock, at once or after ``timeout``.
        LockUnsupportedError: if the file system has no locks.
    """
    lock = _acquire(path, (-1 if timeout is None else timeout) if blocking else 0)
    if lock is None:
        raise LockedError(errno.EAGAIN, "another process holds the lock", str(path))
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path) -> BaseFileLock | None:
    """Take an exclusive lock without waiting; None if another process holds it. Call ``.release()`` on the result.

    Raises:
        LockUnsupportedError: if the file system has no locks.
    """
    return _acquire(path, 0)


def inheritable_descriptors(lock: BaseFileLock) -> tuple[int, ...]:
    """Return the ``pass_fds`` of ``subprocess.Popen`` with which a child keeps the lock if this process is killed.

    Empty where locks are not inherited: on Windows, and where Python has no ``fcntl``.
    """
    from filelock import UnixFileLock

    # filelock 3.12 to 4.3 have no public name for it; test_a_lock_outlives_its_arena_with_the_cell covers it
    descriptor = lock._context.lock_file_fd if isinstance(lock, UnixFileLock) else None
    return () if descriptor is None else (descriptor,)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock. Creates nothing; needs no write permission where Python has ``fcntl``.

    Raises:
        LockUnsupportedError: if the file system has no locks.
    """
    if not path.exists():
        return False
    contended = _probe(path)
    if contended is None:
        lock = try_lock(path)
        if lock is not None:
            lock.release()
        return lock is None
    return contended


def _acquire(path: Path, timeout: float) -> BaseFileLock | None:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _probe(path)  # filelock 3 treats any error as another process's lock, and would wait forever
            if timeout == 0:
                return None
            lock.acquire(timeout=timeout)
    except Timeout:
        return None
    except NotImplementedError as error:  # filelock 3, for ENOSYS
        raise _unsupported(path, errno.ENOSYS) from error
    except OSError as error:
        if error.errno in UNSUPPORTED and not isinstance(error, LockUnsupportedError):
            raise _unsupported(path, error.errno) from error
        raise
    return lock


def _probe(path: Path) -> bool | None:
    """Return whether another process holds the lock on an existing file; None where Python has no ``fcntl``."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError) as error:
        return isinstance(error, BlockingIOError)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise _unsupported(path, error.errno) from error
        raise
    return False


def _unsupported(path: Path, number: int | None) -> LockUnsupportedError:
    return LockUnsupportedError(
        number,
        f"cannot lock {path}: its file system has no file locks ({os.strerror(number or errno.ENOLCK)}). Write to a "
        "folder on a local disk, or mount the file system with locks (Lustre: -o flock; NFS: a lock service).",
    )
