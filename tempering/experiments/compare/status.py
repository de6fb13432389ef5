"""What is seen of a comparison: how its cells stand and when it ends, its table and its page, from records alone."""

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
from tempering.reports.records import RunRecord, number, read_cell
from tempering.utils.files import is_locked, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

STATES = ("done", "running", "failed", "interrupted", "open")
RECENT = 40  # lines of steps.jsonl that a speed is taken from
OVERHEAD = 1.15  # of a run over its training steps, where the clock cannot tell: evaluation, start, analysis


@dataclass(frozen=True)
class CellStatus:
    """How a cell stands.

    Attributes:
        state: one of ``STATES``.
        epoch, step, total: how far it is, and the steps of the whole run; 0 where nothing is known.
        seconds: what the whole run takes, an estimate until it is done; None where nothing is known.
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
        """Seconds to its end; None where nothing is known."""
        return None if self.seconds is None or not self.total else self.seconds * (1 - self.step / self.total)


def cell_statuses(folder: Path, plan: Plan, failed: Mapping[str, str] | None = None) -> list[CellStatus]:
    """How every cell stands; ``failed`` is what an arena at work has seen fail."""
    return [_cell_status(folder, cell, (failed or {}).get(cell.id)) for cell in plan.cells]


def _cell_status(folder: Path, cell: Cell, failed: str | None) -> CellStatus:
    record, place = record_of(folder, cell), work_of(folder, cell)
    if record.is_file():
        run = read_cell(record)
        result = run.of("result")
        steps = int(result.get("steps") or 0)
        return CellStatus(
            cell, "done", _last(run).get("epoch", 0), steps, steps, _lasted(run.facts), scores(_last(run))
        )
    facts = read_facts(place)
    lines = _tail(place / "steps.jsonl", RECENT)
    total = int((facts.get("settings") or {}).get("total_steps") or 0)
    step, epoch = (int(lines[-1]["step"]), int(lines[-1]["epoch"])) if lines else (0, 0)
    seconds = _expected(facts, lines, total, place / "steps.jsonl") if lines and total else None
    note = failed or ""
    if failed is not None:
        state = "failed"
    elif is_running(place):
        state, note = "running", scores(next(iter(_tail(place / "epochs.jsonl", 1)), {}))
    elif facts.get("status") == "failed":
        state, note = "failed", str(facts.get("error"))
    else:
        state = "interrupted" if facts else "open"
    return CellStatus(cell, state, epoch, step, total, seconds, note)


def _expected(facts: Mapping[str, Any], lines: list[dict[str, Any]], total: int, path: Path) -> float:
    """Seconds of the whole run: by the clock, or after a resume, which hides it, by the time of recent steps."""
    begun = _time(facts.get("started"))
    if begun is not None and not facts.get("resumed"):
        return (path.stat().st_mtime - begun) / lines[-1]["step"] * total
    return statistics.fmean(line["step_ms"] for line in lines) / 1000 * total * OVERHEAD


def _lasted(facts: Mapping[str, Any]) -> float | None:
    begun, ended = _time(facts.get("started")), _time(facts.get("finished"))
    if begun is not None and ended is not None and not facts.get("resumed"):
        return ended - begun
    seconds = number((facts.get("result") or {}).get("seconds"))
    return None if seconds is None else seconds * OVERHEAD


def _time(text: object) -> float | None:
    return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def _last(run: RunRecord) -> dict[str, Any]:
    return run.of("result").get("last") or {}


def scores(line: Mapping[str, Any]) -> str:
    """The accuracies (a detector's mAP) of an evaluation, else its losses, in words."""
    splits = {split: line[split] for split in ("validation", "test") if isinstance(line.get(split), Mapping)}
    right = [
        f"{split} {'mAP ' * (key == 'map')}{100 * v:.2f} %"
        for key in ("accuracy", "map")
        for split, s in splits.items()
        if (v := number(s.get(key))) is not None
    ]
    return ", ".join(right or [f"{split} loss {v:.4g}" for split, s in splits.items() if (v := number(s.get("loss")))])


def remaining(found: Iterable[CellStatus], jobs: int) -> float | None:
    """Seconds until all cells are done, ``jobs`` at once; None while nothing is known of how long one takes."""
    found = list(found)
    known = [s.seconds for s in found if s.seconds is not None]
    open_cells = [s for s in found if s.state in ("open", "interrupted", "running")]
    if not known:
        return None if open_cells else 0.0
    like: dict[str, list[float]] = {}
    for s in found:
        if s.seconds is not None:
            like.setdefault(s.cell.label, []).append(s.seconds)
    total, longest = 0.0, 0.0
    for s in open_cells:
        left = statistics.fmean(like.get(s.cell.label, known)) if s.left is None else s.left
        total, longest = total + left, max(longest, left)
    return max(total / max(1, jobs), longest)


def summary(found: list[CellStatus], jobs: int) -> str:
    """How many are done, running, open, failed, and when the whole will end, in a line."""
    counts = {state: sum(s.state == state for s in found) for state in STATES}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    left = remaining(found, jobs)
    if counts["open"] + counts["interrupted"] + counts["running"] == 0:
        return f"{len(found)} cells: {said}"
    if left is None:
        return f"{len(found)} cells: {said}; the end is known once one has run for a while"
    end = datetime.now() + timedelta(seconds=left)
    return f"{len(found)} cells: {said}; {jobs} at once: about {_span(left)} left, until {end:%a %d %b %H:%M}"


def status_table(found: list[CellStatus], *, most: int | None = None) -> Table:
    """The cells as a table for a terminal; of more than ``most`` the settled ones are left out first."""
    from rich.table import Table
    from rich.text import Text

    shown = found
    if most is not None and len(found) > most:
        shown = [s for s in found if s.state in ("running", "failed")] or found
        shown = shown[:most]
    table = Table(header_style="bold")
    for head in ("arm", "seed", "state", "epoch", "done", "left", ""):
        table.add_column(head, justify="right" if head in ("seed", "epoch", "done", "left") else "left")
    styles = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
    for s in shown:
        share = f"{100 * s.step / s.total:.0f} %" if s.total else ""
        left = _span(s.left) if s.left is not None and s.state in ("running", "interrupted") else ""
        state = Text(s.state, style=styles.get(s.state, "dim"))
        epoch = str(s.epoch or "")
        table.add_row(Text(s.cell.label), str(s.cell.seed), state, epoch, share, left, Text(s.note, overflow="fold"))
    return table


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


# table and page


def records(folder: Path, plan: Plan) -> list[RunRecord]:
    """The plan's runs: finished ones, failed ones, and the others as open.

    Raises:
        ValueError: for a record that was edited.
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


def _open(folder: Path, cell: Cell, done: list[RunRecord]) -> RunRecord:
    """A cell without a record, with what it will share with the others, so that it counts as one of them."""
    student = next((run.facts.get("student") for run in done), None)
    method = next((run.facts.get("method") for run in done if run.label == cell.label), None)
    facts = {"format": 1, "label": cell.label, "seed": cell.seed, "status": "open"}
    return RunRecord(record_of(folder, cell), facts | {"student": student, "method": method})


def render(folder: Path, plan: Plan) -> tuple[Path, Path | None]:
    """Write table.md and report.html from the records; their paths, None for a page that cannot be made here.

    Raises:
        ValueError: for a record that was edited, or records that cannot be compared.
    """
    from tempering.reports.page import write_page
    from tempering.reports.table import compare, markdown

    runs = records(folder, plan)
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in plan.flags.items())
    done = sum(run.done for run in runs)
    lines = [
        f"# {plan.recipe}: {done} of {len(runs)} runs",
        "",
        f"Made from the records beside it by `tempering compare report`. Flags of every run: `{flags or 'none'}`.",
        "",
        markdown(compare(runs, plan.control)),
    ]
    table = folder / "table.md"
    write_atomic(table, "\n".join(lines))
    return table, write_page(runs, folder / "report.html", control=plan.control)


# live


class Display:
    """The cells at work on a terminal, redrawn every second; elsewhere a line for each that begins and ends."""

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
        """Redraw, if it is due."""
        if self.live is None or time.monotonic() < self.due:
            return
        from rich.console import Group

        self.due = time.monotonic() + 1.0
        found = cell_statuses(self.folder, self.plan, failed)
        most = max(4, self.console.height - 6)
        self.live.update(Group(status_table(found, most=most), summary(found, jobs)), refresh=True)

    def began(self, cell: Cell) -> None:
        """Say that a cell begins, where there is no table that shows it."""
        if self.live is None:
            say(f"{_clock()}  {cell.label}, seed {cell.seed}: begins", quiet=self.quiet)

    def ended(self, cell: Cell, failure: str | None, run: RunRecord | None) -> None:
        """Say how a cell ended."""
        if failure is not None:
            self.say(f"{_clock()}  {cell.label}, seed {cell.seed}: failed: {failure}")
        elif run is not None and not self.quiet:
            self.say(f"{_clock()}  {cell.label}, seed {cell.seed}: {scores(_last(run)) or 'done'}")

    def say(self, text: str) -> None:
        """A line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(folder: Path, plan: Plan, failed: Mapping[str, str]) -> None:
    """The table of a comparison, what failed in it, and where its files are, on the terminal."""
    from rich.console import Console

    from tempering.reports.table import compare, rich_table

    console = Console()
    console.print(rich_table(compare(records(folder, plan), plan.control)))
    for cell in plan.cells:
        if cell.id in failed:
            console.print(f"failed: {cell.label}, seed {cell.seed}: {failed[cell.id]}", markup=False, soft_wrap=True)
    say(summary(cell_statuses(folder, plan, failed), 1))
    say(f"table: {folder / 'table.md'}\nreport: {folder / 'report.html'}")


def say(text: str, *, quiet: bool = False) -> None:
    """A line for people."""
    if not quiet:
        print(text, flush=True)


def _clock() -> str:
    return f"{datetime.now():%H:%M:%S}"


# reading what a run is writing


def read_facts(place: Path) -> dict[str, Any]:
    """facts.json of a run that may be at work; {} where there is none."""
    path = place / "facts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_running(place: Path) -> bool:
    """Return whether a process is working on the run in this folder."""
    return is_locked(lock_path(place))


def _tail(path: Path, count: int) -> list[dict[str, Any]]:
    """The last ``count`` whole lines of a JSON-lines file, without reading all of it."""
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
            continue  # the first one may be cut
    return out
