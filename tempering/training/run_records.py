"""Write the records of a run: facts.json, steps.jsonl, epochs.jsonl, analysis.json. Reports read nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, cast

import torch

from tempering._version import __version__
from tempering.utils.files import (
    COUNTERS,
    DamagedRecordError,
    facts_digest,
    parse_line,
    prefix_digest,
    read_json_lines,
    sha256_text,
    verify,
    write_atomic,
)
from tempering.utils.text import without_secrets

SMALL = 1 << 22  # bytes of a file all of whose lines are checked
Position = dict[str, Any]  # {"bytes": size of the file, "sha256": of these bytes, "last": counter of the last line}


class Recorder:
    """Write the records of a run.

    Args:
        folder: of the run; None, as on ranks other than 0, writes nothing.

    Attributes:
        facts: the content of facts.json.
        epochs: the lines of epochs.jsonl.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self.epochs: list[dict[str, Any]] = []
        self.files: dict[str, GrowingFile] = {}
        self.analyzed: dict[str, Position] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.files = {name: GrowingFile(folder / name, counter) for name, counter in COUNTERS.items()}

    @property
    def positions(self) -> dict[str, Position]:
        """The size and hash of steps.jsonl and epochs.jsonl, by which lost lines are noticed, and of analysis.json."""
        return {name: file.position for name, file in self.files.items()} | self.analyzed

    def begin(
        self, facts: Mapping[str, Any], *, upto: int, epochs: int, positions: Mapping[str, Position] | None = None
    ) -> None:
        """Start the records, or resume those of an interrupted run.

        Args:
            upto: the step to resume from, 0 for a new run; lines of later steps are removed.
            epochs: number of completed epochs; lines of later epochs are removed.
            positions: of the checkpoint to resume from; None, as in checkpoints of earlier versions: lines before it
                are not verified.

        Raises:
            DamagedRecordError: if earlier records are damaged or incomplete, naming file and line.
        """
        self.facts = {"format": 1, "status": "running", "started": _now(), "finished": None, "result": None, **facts}
        if self.folder is None:
            return
        if upto and (previous := read_facts(self.folder)):
            self.facts["started"] = previous.get("started", self.facts["started"])
            self.facts["resumed"] = [*previous.get("resumed", []), upto]
            self.facts["extended"] = [*previous.get("extended", []), *facts.get("extended", [])]
            if not self.facts["extended"]:
                del self.facts["extended"]
            if (before := previous.get("versions")) and "versions" in facts and before != facts["versions"]:
                self.facts["earlier_versions"] = [*previous.get("earlier_versions", []), before]
                changed = [f"{name} {v}" for name, v in before.items() if v != facts["versions"].get(name)]
                warnings.warn(
                    f"the run in {self.folder} began under {', '.join(changed)}, so it may not end with the bits of a "
                    "run that was not interrupted.",
                    stacklevel=4,
                )
        for (name, file), last in zip(self.files.items(), (upto, epochs), strict=True):
            file.find(last, (positions or {}).get(name) if upto else None)
        self._write_facts()  # without positions, until lines are removed
        for file in self.files.values():
            file.truncate()
        self.epochs = read_json_lines(self.folder / "epochs.jsonl", "epoch")
        (self.folder / "analysis.json").unlink(missing_ok=True)
        if not upto:  # audits of earlier weights
            (self.folder / "audits.json").unlink(missing_ok=True)
        self.save_positions()

    def save_positions(self) -> None:
        """Write the present size and hash of the records to facts.json; called when there is a checkpoint."""
        self.update(records=self.positions)

    def update(self, **facts: Any) -> None:
        """Add to or change facts.json."""
        self.facts.update(facts)
        self._write_facts()

    def step(self, line: Mapping[str, Any]) -> None:
        """Append a line to steps.jsonl."""
        self._append("steps.jsonl", line)

    def epoch(self, line: dict[str, Any]) -> None:
        """Append a line to epochs.jsonl."""
        self.epochs.append(line)
        self._append("epochs.jsonl", line)

    def analysis(self, content: Mapping[str, Any]) -> None:
        """Write analysis.json, which the report shows in addition to scores."""
        if self.folder is not None:
            text = json.dumps(content, indent=1)
            write_atomic(self.folder / "analysis.json", text)
            self.analyzed = {"analysis.json": {"bytes": len(text.encode()), "sha256": sha256_text(text)}}

    def end(self, status: str, **facts: Any) -> None:
        """Write the final status: "done", "interrupted" or "failed"."""
        self.facts.update(facts, status=status, finished=_now(), records=self.positions)
        self._write_facts()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self.files[name].append(dict(line))

    def _write_facts(self) -> None:
        """Write facts.json without secrets, such as an API key in the command or in an error."""
        if self.folder is not None:
            self.facts.pop("sha256", None)  # it is the last value
            plain = without_secrets(json.loads(json.dumps(self.facts, default=str)))
            self.facts["sha256"] = plain["sha256"] = facts_digest(plain)
            write_atomic(self.folder / "facts.json", json.dumps(plain, indent=1))


class GrowingFile:
    """A JSON-lines file that one process appends to; its position is the size and hash of what it has written.

    Args:
        counter: the key that increases from line to line.
    """

    def __init__(self, path: Path, counter: str) -> None:
        self.path, self.counter = path, counter
        self.size, self.last, self.digest = 0, 0, hashlib.sha256()

    @property
    def position(self) -> Position:
        """The size and hash of what has been written, and the last line's counter."""
        return {"bytes": self.size, "sha256": self.digest.hexdigest(), "last": self.last}

    def append(self, line: dict[str, Any]) -> None:
        """Append a line."""
        data = json.dumps(line).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.write(data)
        self.size, self.last = self.size + len(data), line.get(self.counter, self.last)
        self.digest.update(data)

    def find(self, last: int, position: Position | None) -> None:
        """Set the position to the end of the line whose counter is ``last``, in constant memory.

        Args:
            position: of that line, as it was recorded; the bytes before are verified. None: it is found by bisection.

        Raises:
            DamagedRecordError: if lines before ``position`` are missing or were changed.
        """
        self.path.touch()
        self.last = last
        if position is not None:
            self.size, self.digest = int(position["bytes"]), verify(self.path, position, self.counter)
            return
        with open(self.path, "rb") as file:
            self.size = _end_of(self.path, file, self.counter, last)
            file.seek(0)
            self.digest = prefix_digest(file, self.size)

    def truncate(self) -> None:
        """Remove what follows the position."""
        os.truncate(self.path, self.size)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read facts.json in a run's folder; {} if there is none.

    Raises:
        DamagedRecordError: if it is not an object, naming the line.
    """
    path = folder / "facts.json"
    if not path.is_file():
        return {}
    advice = "Restore it, or remove it: the run resumes without it, and loses when it was started."
    try:
        facts = json.loads(path.read_bytes())
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DamagedRecordError(f"{path}, line {line}, is damaged: {error}. {advice}") from error
    if not isinstance(facts, dict):
        raise DamagedRecordError(f"{path}, line 1, must be an object; got {type(facts).__name__}. {advice}")
    facts = cast("dict[str, Any]", facts)
    for name in ("resumed", "extended", "earlier_versions"):
        if not isinstance(facts.get(name, []), list):
            raise DamagedRecordError(f"{path} needs {name!r}, a list; got {facts[name]!r}. {advice}")
    if "sha256" in facts and facts["sha256"] != facts_digest(facts):
        raise DamagedRecordError(f"{path} is not as it was written: a value was changed. {advice}")
    return facts


def _end_of(path: Path, file: IO[bytes], counter: str, last: int) -> int:
    """Return the end of the last line whose counter is at most ``last``; lines are in the order of their counters.

    All lines of a small file are checked; in a large one, the line is found by bisection.
    """
    low, high = 0, file.seek(0, os.SEEK_END)
    small = high <= SMALL
    while low < high:  # lines before ``low`` stay; at ``high`` is the end, or a line that goes
        file.seek(low if small else (low + high) // 2)
        if not small:
            file.readline()
            if file.tell() >= high:  # the middle is in the last of these lines
                file.seek(low)
        begin, line = file.tell(), file.readline()
        # a line without an end was cut short by a kill
        if line.endswith(b"\n") and _counter(path, file, begin, line, counter) <= last:
            low = begin + len(line)
        elif begin == low:
            break
        else:
            high = begin
    return low


def _counter(path: Path, file: IO[bytes], begin: int, line: bytes, counter: str) -> int:
    """Return a line's counter; lines are counted only for the message of an error."""
    try:
        return parse_line(path, 0, line, counter)[counter]
    except DamagedRecordError:
        file.seek(0)
        number = 1
        while file.tell() < begin:
            number += file.readline().endswith(b"\n")
        parse_line(path, number, line, counter)
        raise


def surroundings() -> dict[str, Any]:
    """Return command, host, versions and commit, which are needed to reproduce a run."""
    commit, dirty = _git()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": {
            "name": socket.gethostname(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "tempering": __version__,
            **{name: _version(name) for name in ("torch", "numpy", "lightning-fabric")},
            "torch": str(torch.__version__),  # with its build, such as +cu128, which a wheel's metadata may lack
        },
        "commit": commit,
        "dirty": dirty,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _cpu() -> str:
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        return names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """Return the commit of the package's git repository and whether it has uncommitted changes; None outside one."""
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    first, *rest = result.stdout.splitlines() or [""]
    commit = first.removeprefix("# branch.oid ")
    if result.returncode or not commit.isalnum():  # before the first commit it is "(initial)"
        return None, None
    return commit, not all(line.startswith("# ") for line in rest)
