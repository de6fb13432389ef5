"""Read records: a run's folder, or the single file that a run is packed into for committing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tempering.reports.schema import misfit
from tempering.utils.files import is_locked, read_verified, sha256_text, verify_records, write_atomic
from tempering.utils.text import number as number
from tempering.utils.text import printable_texts, without_private_paths

FORMAT = 1
MOST_STEPS = 20_000  # lines of steps.jsonl that are kept in memory


@dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    Attributes:
        source: the folder or file it was read from.
        facts: the content of facts.json.
        epochs: the lines of epochs.jsonl.
        steps: the lines of steps.jsonl; of more than 20,000, evenly spaced ones.
        analysis: the content of analysis.json; None if there is none.
        audits: the content of audits.json; None if the run was not audited.
    """

    source: Path
    facts: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    analysis: dict[str, Any] | None = None
    audits: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """Return the label that groups runs of one method."""
        return str(self.facts["label"])

    @property
    def seed(self) -> int:
        """Return the seed, by which runs of two methods are paired."""
        return int(self.facts["seed"])

    @property
    def status(self) -> str:
        """Return "running", "done", "failed" or "interrupted"."""
        return str(self.facts["status"])

    @property
    def done(self) -> bool:
        """Return whether the run finished and has a result."""
        return self.status == "done" and bool(self.facts.get("result"))

    @property
    def name(self) -> str:
        """Return the last two components of its path."""
        return "/".join(self.source.absolute().parts[-2:])

    def of(self, part: str) -> dict[str, Any]:
        """Return a part of the facts, such as "student"; {} if it is null, missing, or not an object."""
        value = self.facts.get(part)
        return value if isinstance(value, dict) else {}

    def score(self, metric: str, which: str = "last") -> float | None:
        """Return a result by name, such as "test/accuracy", last or best; None if there is no such finite number."""
        split, _, key = metric.partition("/")
        scores = (self.of("result").get(which) or {}).get(split) or {}
        return number(scores.get(key))


def load_run(path: str | Path) -> RunRecord:
    """Load the record in a run's folder, or a packed run (a .json file).

    Raises:
        FileNotFoundError: if the folder has no facts.json.
        ValueError: if the record is invalid, lacks lines, has another format, or is a packed run that was edited.
    """
    path = Path(path)
    if path.is_file():
        return read_cell(path)
    if not (path / "facts.json").is_file():
        raise FileNotFoundError(
            f"{path} contains no run: there is no facts.json. Pass the folder of a run (its out=), or a parent of it."
        )
    analysis, audits = path / "analysis.json", path / "audits.json"
    facts = _object(path / "facts.json")
    verify_records(path, facts)
    content = {
        "facts": facts,
        "epochs": _lines(path / "epochs.jsonl"),
        "steps": _lines(path / "steps.jsonl"),
        "analysis": _object(analysis) if analysis.is_file() else None,
        "audits": _without_hash(read_verified(audits)) if audits.is_file() else None,
    }
    run = _record(path, content, path / "facts.json")
    return replace(run, facts={**run.facts, "status": "interrupted"}) if _was_killed(path, run.status) else run


def _was_killed(path: Path, status: str) -> bool:
    """Whether a run that says it is running holds no lock any more; without a lock file it is not known."""
    lock = path / ".lock"
    if status != "running" or not lock.is_file():
        return False
    try:
        return not is_locked(lock)
    except OSError:  # a file system without locks, or a folder of another user
        return False


def load_runs(paths: Iterable[str | Path], *, public: bool = False) -> list[RunRecord]:
    """Load every run at or below these paths; ``public`` is without private values.

    Raises:
        FileNotFoundError: if a path does not exist, or contains no record.
        ValueError: as in ``load_run``.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    return [without_private(run) for run in runs] if public else runs


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return folders of runs and packed runs at or below the given paths; sorted, without duplicates.

    Raises:
        FileNotFoundError: if a path does not exist, or contains no record.
    """
    unique: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist. Pass folders of runs, parents of them, or packed runs.")
        paths_here = [path.parent if path.name == "facts.json" else path] if path.is_file() else _below(path)
        if not paths_here:
            raise FileNotFoundError(
                f"there is no record in {path} or below: no facts.json, no packed run. Runs write records only if out= "
                "is set."
            )
        unique |= {p.resolve(): p for p in paths_here}
    return sorted(unique.values())


def pack(run_dir: str | Path, max_steps: int = 60) -> dict[str, Any]:
    """Pack a run into one object for committing: subsample steps, remove host, paths and examples, add a hash.

    Non-finite numbers become null, since JSON cannot represent them.
    """
    run = load_run(run_dir)
    # hashes are of the whole files, which are not packed
    facts = {key: value for key, value in _without_host(run.facts).items() if key not in ("records", "sha256")}
    steps = run.steps
    if len(steps) > max_steps:
        steps = [steps[round(i * (len(steps) - 1) / max(1, max_steps - 1))] for i in range(max_steps)]
    content = {
        "format": FORMAT,
        "kind": "cell",
        "facts": facts,
        "epochs": run.epochs,
        "steps": steps,
        "analysis": _without_examples(run.analysis),
        **({} if run.audits is None else {"audits": run.audits}),
    }
    content = without_private_paths(_clean(content), run.of("host").get("name"))
    return {**content, "sha256": _hash(content)}


def without_private(run: RunRecord) -> RunRecord:
    """Return the record without host name, private paths, secrets and examples of the data, for publishing."""
    host = run.of("host").get("name")
    parts = {"facts": _without_host(run.facts), "analysis": _without_examples(run.analysis), "audits": run.audits}
    cleaned = {name: without_private_paths(part, host) for name, part in parts.items()}
    return replace(run, source=Path(*run.source.absolute().parts[-2:]), **cleaned)


def _without_examples(analysis: dict[str, Any] | None) -> dict[str, Any] | None:
    return analysis and {key: value for key, value in analysis.items() if key != "examples"}


def _without_hash(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "sha256"}


def _without_host(facts: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(facts.get("host"), Mapping):
        return dict(facts)
    return {**facts, "host": {key: value for key, value in facts["host"].items() if key != "name"}}


def write_cell(path: str | Path, cell: Mapping[str, Any]) -> Path:
    """Write a packed run atomically, and return the path.

    Raises:
        ValueError: if the content was changed after packing.
    """
    path = Path(path)
    _check_seal(cell, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical(cell) + "\n")
    return path


def read_cell(path: str | Path) -> RunRecord:
    """Read a packed run.

    Raises:
        ValueError: if the file is not a packed run, or its hash does not match its content.
    """
    path = Path(path)
    cell = _object(path)
    if cell.get("kind") != "cell":
        raise ValueError(f'{path} is not a packed run: it lacks "kind": "cell". pack() and write_cell() make one.')
    if cell.get("format") != FORMAT:
        raise ValueError(f"{path} has format {cell.get('format')!r}; this version reads format {FORMAT}.")
    _check_seal(cell, path)
    return _record(path, cell, path)


def canonical(value: object) -> str:
    """Return the canonical JSON of ``value``: sorted keys, no spaces, shortest exact floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _record(source: Path, content: Mapping[str, Any], path: Path) -> RunRecord:
    _check_facts(content.get("facts"), path)
    parts = {part: content.get(part) for part in ("facts", "epochs", "steps", "analysis", "audits")}
    if wrong := misfit(parts):
        raise ValueError(f"{path.parent if path.name == 'facts.json' else path}: {wrong}. Was it edited by hand?")
    for part in parts.keys() - {"steps"}:  # whose texts are names of terms
        parts[part] = printable_texts(parts[part])
    return RunRecord(source, **{part: value for part, value in parts.items() if value is not None})


def _hash(content: Mapping[str, Any]) -> str:
    return sha256_text(canonical(_without_hash(content)))


def _check_seal(cell: Mapping[str, Any], path: Path) -> None:
    try:
        actual = _hash(cell)
    except ValueError:
        actual = "none, a number in it is not finite,"
    if cell.get("sha256") != actual:
        raise ValueError(
            f"{path} was edited: its content has sha256 {actual}, and the stored one is {cell.get('sha256')}. Records "
            "must not be changed by hand; pack the run again, or restore the file from git."
        )


def _check_facts(facts: object, path: Path) -> None:
    if not isinstance(facts, dict):
        raise ValueError(f"{path} needs an object of facts; got {type(facts).__name__}.")
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} has format {facts.get('format')!r}; this version reads format {FORMAT}.")
    for key, kind in (("label", str), ("seed", int), ("status", str)):
        if not isinstance(facts.get(key), kind):
            raise ValueError(f"{path} needs {key!r}, {kind.__name__}; got {facts.get(key)!r}.")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(_broken(path, error.lineno, error.msg)) from error
    if not isinstance(value, dict):
        raise ValueError(_broken(path, 1, f"expected an object, got {type(value).__name__}"))
    return value


def _lines(path: Path, limit: int = MOST_STEPS) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, [] if it does not exist; skip an incomplete last line.

    Of more than ``limit`` lines, evenly spaced ones are read, the first and the last among them.
    """
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        count = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        file.seek(0)
        every, out = -(-count // limit) or 1, list[dict[str, Any]]()
        for number_, line in enumerate(file, 1):
            if (number_ - 1) % every and number_ != count:
                continue
            try:
                value = json.loads(line.decode("utf-8", errors="replace"))
            except json.JSONDecodeError as error:
                if number_ > count:
                    break  # without a newline: the process was killed while writing it
                raise ValueError(_broken(path, number_, error.msg)) from error
            if not isinstance(value, dict):
                raise ValueError(_broken(path, number_, f"expected an object, got {type(value).__name__}"))
            out.append(value)
    return out


def _broken(path: Path, line: int, reason: str) -> str:
    return f"{path}, line {line}, is not the JSON of a record: {reason}. Was it truncated or edited by hand?"


def _below(path: Path) -> list[Path]:
    """Return runs and packed runs at or below a folder, without descending into a run's folder."""
    if (path / "facts.json").is_file():
        return [path]
    records = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            records += _below(entry)
        elif entry.suffix == ".json" and _is_cell(entry):
            records.append(entry)
    return records


def _is_cell(path: Path) -> bool:
    """Return whether a .json file is a packed run; raise if it is not valid JSON, since it may be a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(_broken(path, error.lineno, error.msg)) from error
    return isinstance(value, dict) and value.get("kind") == "cell"


def _clean(value: Any) -> Any:
    """Replace non-finite numbers by None."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
