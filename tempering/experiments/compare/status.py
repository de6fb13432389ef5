"""Status of a comparison: progress and remaining time of its runs, its table and its page, made from records."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments.compare.plan import Cell, Plan, lock_path, record_of, work_of
from tempering.reports.compare import display_name
from tempering.reports.records import RunRecord, number, read_cell
from tempering.utils.files import damaged_files, is_locked, read_verified, write_atomic
from tempering.utils.text import counted, duration, printable, scores

if TYPE_CHECKING:
    from rich.table import Table

STATES = ("done", "running", "failed", "interrupted", "open")
RECENT = 40  # lines of steps.jsonl used to estimate the speed
MOST_HASHED = 1 << 32  # bytes of a grid's weights
OVERHEAD = 1.15  # estimated ratio of a run's time to its training steps: evaluation, startup, analysis


@dataclass(frozen=True)
class CellStatus:
    """Progress of one run.

    Attributes:
        state: one of ``STATES``.
        epoch, step, total: current epoch and step, and the total number of steps; 0 if unknown.
        seconds: duration of the whole run, estimated until it is done; None if unknown.
        note: its score, or why it failed.
    """

    cell: Cell
    state: str
    epoch: int = 0
    step: int = 0
    total: int = 0
    seconds: float | None = None
    note: str = ""

    @property
    def left(self) -> float | None:
        """Return the estimated remaining seconds; None if unknown."""
        return None if self.seconds is None or not self.total else self.seconds * (1 - self.step / self.total)


def cell_statuses(folder: Path, plan: Plan, failed: Mapping[str, str] | None = None) -> list[CellStatus]:
    """Return the status of every run; ``failed`` maps ids of runs that failed in this call to reasons."""
    return [_cell_status(folder, cell, (failed or {}).get(cell.id)) for cell in plan.cells]


def _cell_status(folder: Path, cell: Cell, failed: str | None) -> CellStatus:
    record, run_dir = record_of(folder, cell), work_of(folder, cell)
    if record.is_file():
        run = read_cell(record)
        result = run.of("result")
        steps = int(result.get("steps") or 0)
        return CellStatus(
            cell, "done", _last(run).get("epoch", 0), steps, steps, _duration(run.facts), scores(_last(run))
        )
    facts = read_facts(run_dir)
    lines = _tail(run_dir / "steps.jsonl", RECENT)
    total = int((facts.get("settings") or {}).get("total_steps") or 0)
    step, epoch = (int(lines[-1]["step"]), int(lines[-1]["epoch"])) if lines else (0, 0)
    seconds = _expected_seconds(facts, lines, total, run_dir / "steps.jsonl") if lines and total else None
    note = failed or ""
    if failed is not None:
        state = "failed"
    elif is_running(run_dir):
        state, note = "running", scores(next(iter(_tail(run_dir / "epochs.jsonl", 1)), {}))
    elif facts.get("status") == "failed":
        state, note = "failed", str(facts.get("error"))
    else:
        state = "interrupted" if facts else "open"
    return CellStatus(cell, state, epoch, step, total, seconds, note)


def _expected_seconds(facts: Mapping[str, Any], lines: list[dict[str, Any]], total: int, path: Path) -> float:
    """Estimate seconds of the whole run: from elapsed time, or after a resume from the time of recent steps."""
    begun = _time(facts.get("started"))
    if begun is not None and not facts.get("resumed"):
        return (path.stat().st_mtime - begun) / lines[-1]["step"] * total
    return statistics.fmean(line["step_ms"] for line in lines) / 1000 * total * OVERHEAD


def _duration(facts: Mapping[str, Any]) -> float | None:
    begun, ended = _time(facts.get("started")), _time(facts.get("finished"))
    if begun is not None and ended is not None and not facts.get("resumed"):
        return ended - begun
    seconds = number((facts.get("result") or {}).get("seconds"))
    return None if seconds is None else seconds * OVERHEAD


def _time(text: object) -> float | None:
    return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def _last(run: RunRecord) -> dict[str, Any]:
    return run.of("result").get("last") or {}


def remaining(statuses: Iterable[CellStatus], jobs: int) -> float | None:
    """Estimate seconds until all runs are done with ``jobs`` in parallel; None if no duration is known yet."""
    statuses = list(statuses)
    durations = [s.seconds for s in statuses if s.seconds is not None]
    open_cells = [s for s in statuses if s.state in ("open", "interrupted", "running")]
    if not durations:
        return None if open_cells else 0.0
    by_label: dict[str, list[float]] = {}
    for s in statuses:
        if s.seconds is not None:
            by_label.setdefault(s.cell.label, []).append(s.seconds)
    total, longest = 0.0, 0.0
    for s in open_cells:
        seconds_left = statistics.fmean(by_label.get(s.cell.label, durations)) if s.left is None else s.left
        total, longest = total + seconds_left, max(longest, seconds_left)
    return max(total / max(1, jobs), longest)


def summary(statuses: list[CellStatus], jobs: int) -> str:
    """Summarize how many runs are done, running, open and failed, and the estimated end, in one line."""
    counts = {state: sum(s.state == state for s in statuses) for state in STATES}
    counts_text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    seconds_left = remaining(statuses, jobs)
    if counts["open"] + counts["interrupted"] + counts["running"] == 0:
        return f"{counted(len(statuses), 'run')}: {counts_text}"
    if seconds_left is None:
        return f"{counted(len(statuses), 'run')}: {counts_text}; the remaining time is not known yet"
    end = datetime.now() + timedelta(seconds=seconds_left)
    time_left = f"about {duration(seconds_left)} left, until {end:%a %d %b %H:%M}"
    return f"{counted(len(statuses), 'run')}: {counts_text}; {jobs} at once: {time_left}"


def status_table(statuses: list[CellStatus], *, max_rows: int | None = None) -> Table:
    """Return the runs as a table for a terminal; if there are more than ``max_rows``, show running and failed ones."""
    from rich.table import Table
    from rich.text import Text

    rows = statuses
    if max_rows is not None and len(statuses) > max_rows:
        rows = [s for s in statuses if s.state in ("running", "failed")] or statuses
        rows = rows[:max_rows]
    table = Table(header_style="bold")
    for head in ("method", "seed", "state", "epoch", "done", "left", ""):
        table.add_column(head, justify="right" if head in ("seed", "epoch", "done", "left") else "left")
    styles = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
    for s in rows:
        share = f"{100 * s.step / s.total:.0f} %" if s.total else ""
        left_text = duration(s.left) if s.left is not None and s.state in ("running", "interrupted") else ""
        state = Text(s.state, style=styles.get(s.state, "dim"))
        epoch = str(s.epoch or "")
        table.add_row(
            Text(display_name(s.cell.label)),
            str(s.cell.seed),
            state,
            epoch,
            share,
            left_text,
            Text(s.note, overflow="fold"),
        )
    return table


# table and page


def records(folder: Path, plan: Plan) -> list[RunRecord]:
    """Return records of the plan's runs: finished ones, failed ones, and the others with status "open".

    Raises:
        ValueError: if a record was edited.
    """
    done: list[RunRecord] = []
    missing: list[Cell] = []
    for cell in plan.cells:
        path = record_of(folder, cell)
        path = path if path.is_file() else path.with_suffix(".failed.json")
        if path.is_file():
            done.append(read_cell(path))
        else:
            missing.append(cell)
    return done + [_open(folder, cell, done) for cell in missing]


def unrecorded(folder: Path, plan: Plan) -> list[Path]:
    """Return the paths of missing records of finished runs, such as deleted ones."""
    paths = {record_of(folder, cell): work_of(folder, cell) for cell in plan.cells}
    return [path for path, run in paths.items() if not path.is_file() and read_facts(run).get("status") == "done"]


def damaged(folder: Path, plan: Plan) -> list[str]:
    """Say which files of recorded runs, such as weights, are missing or not as they were written.

    Runs without a folder, such as those of a grid that was copied without work/, have no such files. In grids of more
    than ``MOST_HASHED`` bytes, sizes alone are compared.
    """
    kept = [(cell, work_of(folder, cell), record_of(folder, cell)) for cell in plan.cells]
    kept = [(work, record, read_cell(record).facts.get("files") or {}) for _, work, record in kept if record.is_file()]
    total = sum(part["bytes"] for _, _, files in kept for part in files.values())
    return [
        f"{text}, though its run is recorded. The record is whole; to train the run again, remove {work} and {record}"
        for work, record, files in kept
        if work.is_dir()
        for text in damaged_files(work, files, sizes_only=total > MOST_HASHED)
    ]


def _open(folder: Path, cell: Cell, done: list[RunRecord]) -> RunRecord:
    """Return a placeholder record for a run without one, with the student and method of the others."""
    student = next((run.facts.get("student") for run in done), None)
    method = next((run.facts.get("method") for run in done if run.label == cell.label), None)
    facts = {"format": 1, "label": cell.label, "seed": cell.seed, "status": "open"}
    return RunRecord(record_of(folder, cell), facts | {"student": student, "method": method})


def render(folder: Path, plan: Plan) -> tuple[Path, Path | None]:
    """Write table.md and report.html from the records, and return their paths.

    Raises:
        ValueError: if a record was edited, or records cannot be compared.
    """
    from tempering.reports.page import write_page
    from tempering.reports.table import compare, markdown

    runs = records(folder, plan)
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in plan.flags.items())
    done = sum(run.done for run in runs)
    lines = [
        f"# {plan.recipe}: {done} of {counted(len(runs), 'run')}",
        "",
        f"Made from the records in this folder by `tempering compare report`. Flags of every run: `{flags or 'none'}`.",
        "",
        markdown(compare(runs, plan.control)),
    ]
    table = folder / "table.md"
    write_atomic(table, "\n".join(lines))
    return table, write_page(runs, folder / "report.html", control=plan.control)


# live


class Display:
    """Show running jobs in a terminal, redrawn every second; elsewhere print a line when one starts or ends."""

    def __init__(self, folder: Path, plan: Plan, *, quiet: bool) -> None:
        from rich.console import Console

        self.folder, self.plan, self.console, self.quiet = folder, plan, Console(), quiet
        self.live: Any = None
        self.due = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, failed: Mapping[str, str], jobs: int) -> None:
        """Redraw if a second has passed."""
        if self.live is None or time.monotonic() < self.due:
            return
        from rich.console import Group

        self.due = time.monotonic() + 1.0
        statuses = cell_statuses(self.folder, self.plan, failed)
        most = max(4, self.console.height - 6)
        self.live.update(Group(status_table(statuses, max_rows=most), summary(statuses, jobs)), refresh=True)

    def began(self, cell: Cell) -> None:
        """Print that a run starts, unless the live table shows it."""
        if self.live is None:
            say(f"{_clock()}  {display_name(cell.label)}, seed {cell.seed}: started", quiet=self.quiet)

    def ended(self, cell: Cell, failure: str | None, run: RunRecord | None) -> None:
        """Print how a run ended."""
        name = display_name(cell.label)
        if failure is not None:
            self.say(f"{_clock()}  {name}, seed {cell.seed}: failed: {failure}")
        elif run is not None and not self.quiet:
            self.say(f"{_clock()}  {name}, seed {cell.seed}: {scores(_last(run)) or 'done'}")

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def show(folder: Path, plan: Plan, failed: Mapping[str, str]) -> None:
    """Print the table of a comparison, its failures, and the paths of its files."""
    from rich.console import Console

    from tempering.reports.table import compare, rich_table

    console = Console()
    console.print(rich_table(compare(records(folder, plan), plan.control)))
    for cell in plan.cells:
        if cell.id in failed:
            name = display_name(cell.label)
            console.print(
                printable(f"failed: {name}, seed {cell.seed}: {failed[cell.id]}"), markup=False, soft_wrap=True
            )
    say(summary(cell_statuses(folder, plan, failed), 1))
    say(f"table: {folder / 'table.md'}\nreport: {folder / 'report.html'}")


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line, unless ``quiet``."""
    if not quiet:
        print(printable(text), flush=True)


def _clock() -> str:
    return f"{datetime.now():%H:%M:%S}"


# files of running jobs


def read_facts(run_dir: Path) -> dict[str, Any]:
    """Read facts.json of a run, which may be in progress; {} if it does not exist."""
    return read_verified(run_dir / "facts.json")


def is_running(run_dir: Path) -> bool:
    """Return whether a process is working on the run in this folder."""
    return is_locked(lock_path(run_dir))


def _tail(path: Path, count: int) -> list[dict[str, Any]]:
    """Read the last ``count`` complete lines of a JSON-lines file, without reading all of it."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1000 * count))
        raw = file.read().split(b"\n")[:-1]
    out = []
    for line in raw[-count:]:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue  # the first line may be incomplete
    return out
