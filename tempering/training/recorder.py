"""What a run writes: facts.json, steps.jsonl, epochs.jsonl, analysis.json. Reports read nothing else."""

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
    """Writes one run's records into a folder; nowhere, where ``folder`` is None or this is not the first rank."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self.epochs: list[dict[str, Any]] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def begin(self, facts: Mapping[str, Any], *, upto: int, epochs: int) -> None:
        """Start, or go on after a kill: lines past step ``upto`` and past epoch ``epochs`` are made again, and go."""
        self.facts = {"format": 1, "status": "running", "started": _now(), "finished": None, "result": None, **facts}
        if self.folder is None:
            return
        older = self.folder / "facts.json"
        if upto and older.is_file():
            self.facts["started"] = json.loads(older.read_text()).get("started", self.facts["started"])
            self.facts["resumed"] = [*json.loads(older.read_text()).get("resumed", []), upto]
        for name, counter, most in (("steps.jsonl", "step", upto), ("epochs.jsonl", "epoch", epochs)):
            kept = [line for line in read_json_lines(self.folder / name) if line[counter] <= most]
            write_atomic(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            self.epochs = kept  # the epochs', which come last
        (self.folder / "analysis.json").unlink(missing_ok=True)
        if not upto:  # the findings of audits are of other weights
            (self.folder / "audits.json").unlink(missing_ok=True)
        self._write_facts()

    def update(self, **facts: Any) -> None:
        """Add to or change facts.json."""
        self.facts.update(facts)
        self._write_facts()

    def step(self, line: Mapping[str, Any]) -> None:
        """One line of steps.jsonl."""
        self._append("steps.jsonl", line)

    def epoch(self, line: dict[str, Any]) -> None:
        """One line of epochs.jsonl."""
        self.epochs.append(line)
        self._append("epochs.jsonl", line)

    def analysis(self, content: Mapping[str, Any]) -> None:
        """What the report shows beyond scores."""
        if self.folder is not None:
            write_atomic(self.folder / "analysis.json", json.dumps(content, indent=1))

    def end(self, status: str, **facts: Any) -> None:
        """Close the record with how it went: done, interrupted or failed."""
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
    """Command, host, versions and commit: what a reader needs to run it again."""
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
        named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        return named[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """The commit of the tree this package lies in, and whether it has uncommitted changes; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        ask = [["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
        said = [subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10) for a in ask]
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if any(p.returncode for p in said):
        return None, None
    return said[0].stdout.strip(), bool(said[1].stdout.strip())
