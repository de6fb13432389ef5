"""Atomic writes, checksums, records that are verified, file locks; signals, after which files stay whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

COUNTERS = {"steps.jsonl": "step", "epochs.jsonl": "epoch"}  # of the lines of a run's records, by file
CHUNK = 1 << 20  # bytes
PARTIAL = ".partial"  # suffix of a file or folder that is being written
# sent before a job is ended or suspended: by Slurm (--signal, preemption), Grid Engine (-notify), LSF, a terminal
BATCH_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
STOP_SIGNALS = (signal.SIGINT, *BATCH_SIGNALS)
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class LockedError(TimeoutError):
    """Another process holds the lock."""


class LockUnsupportedError(OSError):
    """The file system has no file locks; the message names the path and what to do."""


class DamagedRecordError(ValueError):
    """A file of records is not as it was written; the message names it, with the line where there is one."""


# reading and writing


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no file.

    Raises:
        DamagedRecordError: if it is no JSON object, naming the file.
    """
    return parse_line(path, 1, path.read_bytes()) if path.is_file() else {}


def read_json_lines(path: Path, counter: str | None = None) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; skip a last line that a kill cut short; [] if there is no file.

    Args:
        counter: as in ``parse_line``.

    Raises:
        DamagedRecordError: if any other line is not an object, naming the line.
    """
    if not path.is_file():
        return []
    *raw, rest = path.read_bytes().split(b"\n")
    lines = [parse_line(path, number, line, counter) for number, line in enumerate(raw, 1)]
    with suppress(DamagedRecordError):
        lines += [parse_line(path, len(raw) + 1, rest, counter)]
    return lines


def parse_line(path: Path, number: int, line: bytes, counter: str | None = None) -> dict[str, Any]:
    """Return the object in a line.

    Args:
        number: of the line, from 1, for the message.
        counter: a key whose value must be a whole number, such as "step".

    Raises:
        DamagedRecordError: naming file and line.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DamagedRecordError(f"{path}, line {number}, is not JSON: {error}. Was it edited by hand?") from error
    if not isinstance(value, dict):
        raise DamagedRecordError(
            f"{path}, line {number}, must be an object; got {type(value).__name__}. Was it edited by hand?"
        )
    if counter is not None and type(value.get(counter)) is not int:
        raise DamagedRecordError(
            f"{path}, line {number}, needs {counter!r}, a whole number; got {value.get(counter)!r}. Was it edited by "
            "hand?"
        )
    return value


def folder_path(path: str | Path, name: str, argument: str) -> Path:
    """Return the path of a folder that exists or can be made, with ~ for the home directory.

    Args:
        path: of the folder.
        name: of it, for error messages.
        argument: that names another one, for error messages.

    Raises:
        ValueError: if it cannot be a folder.
    """
    folder = Path(path).expanduser()
    blocking = next((p for p in (folder, *folder.parents) if p.is_symlink() or p.exists()), folder)
    if blocking.exists() != blocking.is_dir() or (blocking.is_symlink() and not blocking.exists()):
        what = "is a file" if blocking.exists() else "is a symbolic link to a path that does not exist"
        raise ValueError(f"{name} must be a folder, and {blocking} {what}. Give another {argument}.")
    return folder


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


def blocking_folder(error: OSError) -> Path | None:
    """Return the folder that is where a file was to be written, as the error names it; None if there is none."""
    named = (name for name in (error.filename, error.filename2) if name is not None)
    return next((Path(os.fsdecode(name)) for name in named if os.path.isdir(name)), None)


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


# records


def verify(path: Path, position: Mapping[str, Any], counter: str | None = None, *, whole: bool = False) -> Any:
    """Check that a file begins with the bytes that were recorded; return their hash.

    Args:
        counter: the key that increases from line to line, for the message.
        whole: whether nothing may follow them.

    Raises:
        DamagedRecordError: if lines are missing or were changed, naming the first such line if it is found.
    """
    size = path.stat().st_size if path.is_file() else 0
    wanted, last = int(position["bytes"]), position.get("last")
    advice = "Restore the file, or start the run again: resume=False (--no-resume)."
    if not wanted and not (whole and size):
        return hashlib.sha256()
    if size >= wanted:
        with open(path, "rb") as file:
            digest = prefix_digest(file, wanted)
        if digest.hexdigest() == position["sha256"]:
            if not whole or size == wanted:
                return digest
            raise DamagedRecordError(
                f"{path} has lines after the run's last, {counter} {last}: {size - wanted:,} bytes."
            )
    first = _first_odd_line(path, wanted, counter)
    if size < wanted:
        raise DamagedRecordError(
            f"{path} has lost lines: {wanted:,} bytes were written up to {counter or 'line'} {last}, and it has "
            f"{size:,}{first}. {advice}"
        )
    raise DamagedRecordError(f"{path} is not as it was written: lines were changed or lost{first}. {advice}")


def verify_records(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compare the records of a run with the sizes and hashes in its facts, and these with their own, if there are any.

    Raises:
        DamagedRecordError: if lines are missing or were changed, or were added to a finished run.
    """
    verify_object(folder / "facts.json", facts)
    positions = facts.get("records")
    for name, position in positions.items() if isinstance(positions, Mapping) else ():
        if name in COUNTERS:
            verify(folder / name, position, COUNTERS[name], whole=facts.get("status") == "done")
        elif not (folder / name).is_file() or sha256_file(folder / name) != position["sha256"]:
            raise DamagedRecordError(f"{folder / name} is missing or not as it was written. Restore the file.")


def verify_object(path: Path, content: Mapping[str, Any]) -> None:
    """Compare the content of a file, such as facts.json, with its own hash, if it has one.

    Raises:
        DamagedRecordError: if it is not as it was written.
    """
    last = next(iter([*content.values()][-1:]), None)  # the hash, whose name may be damaged
    written = content.get("sha256", last if isinstance(last, str) and len(last) == 64 else None)
    if written is not None and written != facts_digest(content):
        raise DamagedRecordError(f"{path} is not as it was written: a value was changed. Restore the file.")


def read_verified(path: Path) -> dict[str, Any]:
    """Read a JSON object that may have its hash; {} if there is no file.

    Raises:
        DamagedRecordError: if it is no JSON object, or not as it was written.
    """
    content = read_json(path)
    verify_object(path, content)
    return content


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and hash of files in a folder, by their path in it: {"bytes": ..., "sha256": ...}."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(paths)
    }


def damaged_files(folder: Path, described: Mapping[str, Any], *, sizes_only: bool = False) -> list[str]:
    """Compare files with what ``describe_files`` returned: "PATH is missing" or "PATH is not as it was written".

    Args:
        sizes_only: whether to leave out the hashes, which take the time to read the files.
    """
    out: list[str] = []
    for name, position in described.items():
        path = folder / name
        if not path.is_file():
            out.append(f"{path} is missing")
        elif path.stat().st_size != position["bytes"] or not (sizes_only or sha256_file(path) == position["sha256"]):
            out.append(f"{path} is not as it was written")
    return out


def sealed(content: Mapping[str, Any]) -> str:
    """Return JSON-able ``content`` with its hash, as the text of a file that ``read_sealed`` verifies."""
    content = json.loads(json.dumps(content))
    return json.dumps({**content, "sha256": facts_digest(content)}, indent=1) + "\n"


def read_sealed(path: Path, *, required: int) -> dict[str, Any]:
    """Read an object that ``sealed`` wrote; earlier files, of a "format" below ``required``, need no hash.

    Raises:
        DamagedRecordError: if it is not as it was written.
    """
    content = parse_line(path, 1, path.read_bytes())
    written, old = content.pop("sha256", None), content.get("format") in range(1, required)
    if written != facts_digest(content) and not (old and written is None):
        raise DamagedRecordError(f"{path} is not as it was written: a value was changed. Restore the file.")
    return content


def facts_digest(facts: Mapping[str, Any]) -> str:
    """Return the hash of a run's facts, JSON-able, without their own hash."""
    return sha256_text(json.dumps({key: value for key, value in facts.items() if key != "sha256"}, sort_keys=True))


def _first_odd_line(path: Path, wanted: int, counter: str | None) -> str:
    """Name the first line that is not valid, or whose counter does not increase; "" if there is none."""
    if not path.is_file():
        return ""
    before, read = -1, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            if read > wanted:
                break
            try:
                value = parse_line(path, number, line, counter)
            except DamagedRecordError as error:
                return f" (line {number}: {str(error).partition(', is ')[2].partition('. Was')[0] or 'not a record'})"
            if counter is not None and (now := value[counter]) <= before:
                return f" (line {number}: {counter} {now} after {counter} {before})"
            before = value[counter] if counter is not None else -1
    return ""


def prefix_digest(file: IO[bytes], size: int) -> Any:
    """Return the hash of the next ``size`` bytes."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest


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

    # filelock 3.12 to 4.3 have no public name for it; test_a_lock_outlives_its_comparison_with_the_cell covers it
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


# signals


@contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], object], numbers: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Handle signals in a context; those that are ignored, as under nohup, stay ignored."""
    before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


_INTERRUPTED: list[int] = []  # signals whose KeyboardInterrupt is not known to have ended anything


def interrupt(number: int, _: object) -> None:
    """Handle a signal by a KeyboardInterrupt, and note it: an import may catch that and continue."""
    _INTERRUPTED.append(number)
    raise KeyboardInterrupt


def raise_lost_interrupt() -> None:
    """Raise KeyboardInterrupt if an earlier one was caught on its way; called before anything is begun."""
    if forget_interrupts():
        raise KeyboardInterrupt


def forget_interrupts() -> bool:
    """Forget the signals that were noted, since they have ended what they should; return whether there were any."""
    found = bool(_INTERRUPTED)
    _INTERRUPTED.clear()
    return found
