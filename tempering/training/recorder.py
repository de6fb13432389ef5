"""Write the records of a run: facts.json, steps.jsonl, epochs.jsonl, analysis.json. Reports read nothing else."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tempering.utils.files import read_json_lines, write_atomic


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
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def begin(self, facts: Mapping[str, Any], *, upto: int, epochs: int) -> None:
        """Start the records, or resume those of an interrupted run.

        Args:
            upto: the step to resume from, 0 for a new run; lines of later steps are removed.
            epochs: number of completed epochs; lines of later epochs are removed.
        """
        self.facts = {"format": 1, "status": "running", "started": _now(), "finished": None, "result": None, **facts}
        if self.folder is None:
            return
        path = self.folder / "facts.json"
        if upto and path.is_file():
            previous: dict[str, Any] = json.loads(path.read_text())
            self.facts["started"] = previous.get("started", self.facts["started"])
            self.facts["resumed"] = [*previous.get("resumed", []), upto]
        for name, counter, last in (("steps.jsonl", "step", upto), ("epochs.jsonl", "epoch", epochs)):
            kept = [line for line in read_json_lines(self.folder / name) if line[counter] <= last]
            write_atomic(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            self.epochs = kept  # after the loop: those of epochs.jsonl
        (self.folder / "analysis.json").unlink(missing_ok=True)
        if not upto:  # audits of earlier weights
            (self.folder / "audits.json").unlink(missing_ok=True)
        self._write_facts()

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
            write_atomic(self.folder / "analysis.json", json.dumps(content, indent=1))

    def end(self, status: str, **facts: Any) -> None:
        """Write the final status: "done", "interrupted" or "failed"."""
        self.facts.update(facts, status=status, finished=_now())
        self._write_facts()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self.folder is not None:
            with open(self.folder / name, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")

    def _write_facts(self) -> None:
        if self.folder is not None:
            write_atomic(self.folder / "facts.json", json.dumps(self.facts, indent=1, default=str))


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
            **{name: _version(name) for name in ("tempering", "torch", "numpy", "lightning-fabric")},
        },
        "commit": commit,
        "dirty": dirty,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        return names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """Return the commit of the package's git repository and whether it has uncommitted changes; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        commands = [["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
        results = [subprocess.run(["git", *c], cwd=here, capture_output=True, text=True, timeout=10) for c in commands]
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if any(p.returncode for p in results):
        return None, None
    return results[0].stdout.strip(), bool(results[1].stdout.strip())
