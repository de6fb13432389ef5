"""Reading records: a run's folder, or the single file that a run is packed into to be committed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempering.reports.schema import misfit
from tempering.utils.files import sha256_text, write_atomic

FORMAT = 1
# a path that starts at the root of a machine, up to its last part; not the slashes of an address or a relative path
MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(?:[^\s/'\"=,]+/)+")


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded.

    Attributes:
        source: the folder or the file it was read from.
        facts: the content of facts.json.
        epochs: the lines of epochs.jsonl.
        steps: the lines of steps.jsonl.
        analysis: the content of analysis.json; None for a run that wrote none.
        audits: the content of audits.json; None for a run that was not audited.
    """

    source: Path
    facts: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    analysis: dict[str, Any] | None = None
    audits: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The arm this run belongs to."""
        return str(self.facts["label"])

    @property
    def seed(self) -> int:
        """The seed, by which runs of two arms are paired."""
        return int(self.facts["seed"])

    @property
    def status(self) -> str:
        """running, done, failed or interrupted."""
        return str(self.facts["status"])

    @property
    def done(self) -> bool:
        """Whether the run reached its end and has a result."""
        return self.status == "done" and bool(self.facts.get("result"))

    @property
    def name(self) -> str:
        """Where it lies, without the path of the machine."""
        return "/".join(self.source.absolute().parts[-2:])

    def of(self, part: str) -> dict[str, Any]:
        """A part of the facts, such as "student"; {} where it is null, not there, or has no parts itself."""
        value = self.facts.get(part)
        return value if isinstance(value, dict) else {}

    def score(self, metric: str, which: str = "last") -> float | None:
        """The result by its name, such as "test/accuracy", last or best; None where there is no such finite number."""
        split, _, key = metric.partition("/")
        scores = (self.of("result").get(which) or {}).get(split) or {}
        return number(scores.get(key))


def number(value: object) -> float | None:
    """``value`` as a float; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def load_run(path: str | Path) -> RunRecord:
    """The record in a run's folder, or in a packed cell (a .json file).

    Raises:
        FileNotFoundError: for a folder without facts.json.
        ValueError: for a record that is broken, of another format, or a cell that was edited.
    """
    path = Path(path)
    if path.is_file():
        return read_cell(path)
    if not (path / "facts.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no run: there is no facts.json. Give a folder that a run wrote to (its out=), or one above."
        )
    analysis, audits = path / "analysis.json", path / "audits.json"
    content = {
        "facts": _object(path / "facts.json"),
        "epochs": _lines(path / "epochs.jsonl"),
        "steps": _lines(path / "steps.jsonl"),
        "analysis": _object(analysis) if analysis.is_file() else None,
        "audits": _object(audits) if audits.is_file() else None,
    }
    return _record(path, content, path / "facts.json")


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Folders of runs and packed cells: those given, and those anywhere below the folders given; sorted, each once.

    Raises:
        FileNotFoundError: for a path that is not there, or that has no record at it or below.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there. Give folders of runs, folders above them, or packed cells.")
        here = [path.parent if path.name == "facts.json" else path] if path.is_file() else _below(path)
        if not here:
            raise FileNotFoundError(
                f"there is no record in {path} or below: no facts.json, no packed cell. Runs write records only where "
                "out= is given."
            )
        found |= {place.resolve(): place for place in here}
    return sorted(found.values())


def pack(run_dir: str | Path, max_steps: int = 60) -> dict[str, Any]:
    """A run as one object to be committed: steps thinned, host name and machine paths taken out, sealed by its hash.

    Numbers that are not finite become null, since JSON has none.
    """
    run = load_run(run_dir)
    facts = dict(run.facts)
    if isinstance(facts.get("host"), Mapping):
        facts["host"] = {key: value for key, value in facts["host"].items() if key != "name"}
    kept = run.steps
    if len(kept) > max_steps:
        kept = [kept[round(i * (len(kept) - 1) / max(1, max_steps - 1))] for i in range(max_steps)]
    content = {
        "format": FORMAT,
        "kind": "cell",
        "facts": facts,
        "epochs": run.epochs,
        "steps": kept,
        "analysis": run.analysis,
        **({} if run.audits is None else {"audits": run.audits}),
    }
    content = _clean(content)
    return {**content, "sha256": _hash(content)}


def write_cell(path: str | Path, cell: Mapping[str, Any]) -> Path:
    """Write what ``pack`` made beside its place, then rename; the path.

    Raises:
        ValueError: where the content was changed after it was packed.
    """
    path = Path(path)
    _check_seal(cell, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical(cell) + "\n")
    return path


def read_cell(path: str | Path) -> RunRecord:
    """The run in a packed cell.

    Raises:
        ValueError: for a file that is no cell, or whose hash does not fit its content.
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
    """The one way to write ``value`` as JSON: keys sorted, no spaces, floats by their shortest exact form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _record(source: Path, content: Mapping[str, Any], path: Path) -> RunRecord:
    _check_facts(content.get("facts"), path)
    parts = {part: content.get(part) for part in ("facts", "epochs", "steps", "analysis", "audits")}
    if wrong := misfit(parts):
        raise ValueError(f"{path.parent if path.name == 'facts.json' else path}: {wrong}. Was it edited by hand?")
    return RunRecord(source, **{part: value for part, value in parts.items() if value is not None})


def _hash(content: Mapping[str, Any]) -> str:
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return sha256_text(canonical(unsealed))


def _check_seal(cell: Mapping[str, Any], path: Path) -> None:
    try:
        made = _hash(cell)
    except ValueError:
        made = "none, a number in it is not finite,"
    if cell.get("sha256") != made:
        raise ValueError(
            f"{path} was edited: its content has sha256 {made}, and the seal says "
            f"{cell.get('sha256')}. A record is not changed by hand; pack the run again, or "
            "take the file back from git."
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
        raise ValueError(_broken(path, 1, f"an object is wanted, this is {type(value).__name__}"))
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] where there is none; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    out, raw = [], path.read_text(encoding="utf-8", errors="replace").split("\n")
    for lineno, line in enumerate(raw, 1):
        if lineno == len(raw) and not line:
            break
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if lineno == len(raw):
                break  # no newline after it: the kill came while it was written
            raise ValueError(_broken(path, lineno, error.msg)) from error
        if not isinstance(value, dict):
            raise ValueError(_broken(path, lineno, f"an object is wanted, this is {type(value).__name__}"))
        out.append(value)
    return out


def _broken(path: Path, line: int, why: str) -> str:
    return f"{path}, line {line}, is not the JSON of a record: {why}. Was it cut short or edited by hand?"


def _below(path: Path) -> list[Path]:
    """Runs and cells at or below a folder; what lies inside a run's folder is that run's."""
    if (path / "facts.json").is_file():
        return [path]
    found = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            found += _below(entry)
        elif entry.suffix == ".json" and _is_cell(entry):
            found.append(entry)
    return found


def _is_cell(path: Path) -> bool:
    """Whether a .json file is a packed run; one that is no JSON may have been one, and is not passed over."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(_broken(path, error.lineno, error.msg)) from error
    return isinstance(value, dict) and value.get("kind") == "cell"


def _clean(value: Any) -> Any:
    """``value`` with numbers that JSON lacks as None, and paths of the machine cut to their last part."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return MACHINE_PATH.sub("", value) if isinstance(value, str) else value
