"""Base class of cached teachers: opens a recording, and checks its files, its data and its teacher."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tempering.teachers.base import Teacher, key_digest
from tempering.utils.files import PARTIAL, sha256_file

KEY, FORMAT = "key.json", 1
FORMATS = (FORMAT, 2)  # 2: recordings of texts, in shards
CHECKED = 256 * 2**20  # size in bytes below which checksums are compared whenever a cache is opened


class CorruptCacheError(RuntimeError):
    """Raised for a cache with a missing, truncated or edited file; the message names the file and what to do."""


class StoredFile(NamedTuple):
    """A file of a recording, with the size and checksum of the key."""

    path: Path
    size: int
    sha256: str


class CachedTeacher(Teacher):
    """A teacher whose outputs are read from disk by sample id. Files are memory-mapped, so processes share them.

    Args:
        path: the folder of the recording.
        batches: refuse to open for other data than these.
        teacher: refuse to open for another teacher's outputs.
        checksum: whether to compare every file with its checksum; None does below 256 MB.

    Raises:
        FileNotFoundError: if there is no finished recording.
        CorruptCacheError: for a file that is missing, truncated or edited.
        ValueError: for a recording of another kind, other data or another teacher, naming the difference.
    """

    kind: ClassVar[str]  # required contents of the recording
    recorded_by: ClassVar[str]  # the call that makes such a recording
    things: ClassVar[str] = "samples"  # words of error messages: what is recorded, and what identifies it
    data_parts: ClassVar[str] = "samples, labels, preprocessing and order"

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self.key = read_key(self.path)
        kind = self.key.get("kind", "logits")
        if kind != self.kind:
            raise ValueError(f"{self.path} contains {kind}, and {type(self).__name__} reads {self.kind}.")
        self.checksum = checksum
        try:
            self.rows: int = self.key["rows"]
            self.identity = key_digest({n: value for n, value in self.key.items() if n not in ("made", "check")})
            self._open()
            size = sum(file.size for file in self.files())
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptCacheError(
                f"{self.path / KEY} does not have the fields of a recording of {self.kind} ({type(error).__name__}: "
                f"{error}). Remove the folder and record it again: {self.recorded_by}."
            ) from error
        self._mapped: Any = self._map()
        self.check_files(checksum=size < CHECKED if checksum is None else checksum)
        reason = None if batches is None else self.incompatibility(batches)
        if reason is not None:
            raise ValueError(reason)
        if teacher is not None and teacher.identity != self.key["teacher"]:
            raise ValueError(
                f"{self.path} contains the outputs of another teacher: its teacher is {self.key['teacher']}, the one "
                f"given is {teacher.identity} (of weights, precision and fuse_conv_bn). Give that teacher, or record "
                f"this one in another folder: {self.recorded_by}."
            )

    def _open(self) -> None:
        """Read the fields of the key that this kind of recording needs."""

    @abstractmethod
    def files(self) -> list[StoredFile]:
        """Return the files of the recording besides its key."""

    @abstractmethod
    def _map(self) -> Any:
        """Memory-map the files; called again after unpickling in another process."""

    def check_files(self, *, checksum: bool = True) -> None:
        """Compare the size of every file with the key, and its checksum.

        Raises:
            CorruptCacheError: naming the file.
        """
        for file in self.files():
            check_file(file, f"Remove the folder and record it again: {self.recorded_by}.", checksum=checksum)

    def incompatibility(self, batches: Any) -> str | None:
        name, identity = getattr(batches, "name", type(batches).__name__), getattr(batches, "identity", None)
        if identity == self.key["data"]:
            return None
        has = "has no identity" if identity is None else f"is {identity}"
        return (
            f"{self.path} contains outputs for other data: its data is {self.key['data']}, and {name} {has} (of "
            f"{self.data_parts}). Give the batches it was recorded with, or record again: "
            f"{self.recorded_by}."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mapped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._mapped = self._map()


def check_file(file: StoredFile, advice: str, *, checksum: bool = True) -> None:
    """Compare the size of a file with what was recorded, and its checksum.

    Raises:
        CorruptCacheError: naming the file, with the advice.
    """
    got = file.path.stat().st_size if file.path.is_file() else None
    if got != file.size:
        problem = "is missing" if got is None else f"has {got} bytes, and {KEY} says {file.size}"
        raise CorruptCacheError(f"{file.path} {problem}. {advice}")
    if checksum and sha256_file(file.path) != file.sha256:
        raise CorruptCacheError(
            f"{file.path} was changed since it was recorded: its checksum is not that of {KEY}. {advice}"
        )


def read_key(path: Path) -> dict[str, Any]:
    """Read the key of a finished recording.

    Raises:
        FileNotFoundError: if there is no recording.
        CorruptCacheError: for a key that cannot be read or was edited, an unfinished recording, or another format.
    """
    if not (path / KEY).is_file():
        partial = path.with_name(path.name + PARTIAL)
        hint = f" {partial} is an unfinished recording; the same record() resumes it." if partial.is_dir() else ""
        raise FileNotFoundError(
            f"there is no teacher cache in {path}: no {KEY}.{hint} Make one: teachers.record(teacher, batches, path)."
        )
    key = read_object(path / KEY)
    if key.get("format") not in FORMATS:
        raise CorruptCacheError(
            f"{path / KEY} has format {key.get('format')!r}; this version reads {' and '.join(map(str, FORMATS))}. "
            "Remove the folder and record it again."
        )
    if key.get("check", None if key["format"] == FORMAT else "") not in (None, key_check(key)):
        raise CorruptCacheError(
            f"{path / KEY} was changed since it was recorded: its checksum is another. Remove the folder and record it "
            "again."
        )
    if "sha256" not in key:
        raise CorruptCacheError(f"{path / KEY} is that of an unfinished recording. Remove the folder and record again.")
    return key


def key_check(key: Mapping[str, Any]) -> str:
    """Return the checksum of a key."""
    return key_digest({name: value for name, value in key.items() if name != "check"})


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptCacheError: if the file cannot be read, naming it.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"it is no object but {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{path} cannot be read ({error}). Remove the folder and record it again.") from error
    return value


def check_key(folder: Path, key: Mapping[str, Any]) -> None:
    """Check that the recording in a folder, finished or not, is the one that ``key`` describes.

    Raises:
        CorruptCacheError: for a key that cannot be read.
        ValueError: naming the field that differs, and both values.
    """
    stored = read_object(folder / KEY)
    for name, value in key.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{folder} contains another recording: its {name} is {stored.get(name)!r}, requested is {value!r} (see "
                f"{folder / KEY}). Give another path, or remove that folder to record again."
            )
