"""tempering compare: a grid of runs, each a process, begun once, resumed after a kill, recorded in a file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments import recipe as recipefile
from tempering.experiments.compare import plan as arena_plan
from tempering.experiments.compare import status as arena_view
from tempering.experiments.compare.plan import Cell, Plan, lock_path
from tempering.reports.records import pack, read_cell, write_cell
from tempering.utils.files import inheritable_descriptors, try_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

POLL_SECONDS = 0.2  # seconds
STOP_TIMEOUT = 20.0  # seconds for a stopped cell to close its record


@dataclass
class Running:
    """A running cell: its process, and its lock, which the process keeps if this one is killed."""

    cell: Cell
    process: subprocess.Popen[bytes]
    lock: BaseFileLock
    slot: int


class Arena:
    """Runs the open cells of a plan, ``jobs`` at once.

    Args:
        folder: of the comparison; records go to records/, runs to work/.
        plan: the grid.
        recipe: the recipe's file.
        flags: the recipe's flags, the same in every cell.
        jobs: cells at once.
        threads: of each cell.
        gpus: ids of GPUs to share out, one a cell; none leaves that to the recipe.
        quiet: print nothing but failures.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        recipe: Path,
        flags: Sequence[str],
        *,
        jobs: int = 1,
        threads: int = 1,
        gpus: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        if jobs < 1 or threads < 1:
            raise ValueError(f"jobs and threads must be 1 or more; got {jobs} and {threads}.")
        known = recipefile.flags(recipe)
        wanted = {"method", "seed", "out"} | ({"temperature"} if any(c.temperature for c in plan.cells) else set())
        if missing := sorted(wanted - known):
            raise ValueError(f"{recipe}: main() takes no {', '.join(missing)}; a comparison needs these as its flags.")
        self.folder, self.plan, self.recipe, self.flags, self.known = folder, plan, recipe, list(flags), known
        self.jobs, self.threads, self.gpus, self.quiet = jobs, threads, list(gpus), quiet
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}
        self.stopped: int | None = None

    def run(self) -> int:
        """Run what is open; 0 where every cell is done, 1 where one failed, 130 where it was stopped.

        Raises:
            ValueError: for a record that was edited.
        """
        self._set_up()
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with arena_view.Display(self.folder, self.plan, quiet=self.quiet) as self.display:
                while self.stopped is None and self._poll():
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        arena_view.render(self.folder, self.plan)
        if self.stopped is not None:
            arena_view.say(f"stopped; the same command goes on: {self._left()} cells are open", quiet=self.quiet)
            return 130
        return 1 if self.failed else 0

    def _set_up(self) -> None:
        for name in ("records", "work"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "work" / ".gitignore").write_text("*\n")
        arena_plan.write(self.folder, self.plan)
        arena_view.records(self.folder, self.plan)  # an edited record stops it here, before an hour is spent

    def _poll(self) -> bool:
        """One look at all cells: take up what ended, begin what can be begun; whether there is more to do."""
        for running in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(running)
            self._on_exit(running.cell, running.process.returncode)
            running.lock.release()
        busy = {running.cell.id for running in self.running}
        waiting = [c for c in self.plan.cells if not self._done(c) and c.id not in self.failed and c.id not in busy]
        for cell in sorted(waiting, key=lambda c: c.seed):  # a stopped grid has some seeds of all arms, not all of some
            if len(self.running) >= self.jobs:
                break
            self._launch(cell)
        self.display.show(self.failed, self.jobs)
        return bool(waiting or self.running)

    def _done(self, cell: Cell) -> bool:
        return arena_plan.record_of(self.folder, cell).is_file()

    def _left(self) -> int:
        return sum(not self._done(cell) for cell in self.plan.cells)

    # a cell

    def _launch(self, cell: Cell) -> None:
        """Start a cell, unless another process has it; pack it where it is already run."""
        place = arena_plan.work_of(self.folder, cell)
        lock = try_lock(lock_path(place))
        if lock is None:
            return
        if self._done(cell):  # by another arena, since we looked
            lock.release()
            return
        if arena_view.read_facts(place).get("status") == "done":
            self._on_exit(cell, 0)
            lock.release()
            return
        place.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.jobs)) - {running.slot for running in self.running})
        with open(place / "log.txt", "ab") as log:
            process = subprocess.Popen(
                self._command(cell, place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                # the process keeps the lock if this one is killed; Ctrl-C reaches it through us alone
                pass_fds=inheritable_descriptors(lock),
                start_new_session=True,
            )
        _as_nice(process.pid)
        self.running.append(Running(cell, process, lock, slot))
        self.display.began(cell)

    def _command(self, cell: Cell, place: Path) -> list[str]:
        own = {"method": cell.method, "seed": str(cell.seed), "out": str(place)}
        optional = {"temperature": cell.temperature, "label": cell.label, "threads": str(self.threads)}
        own |= {name: value for name, value in optional.items() if value is not None and name in self.known}
        given = [f"--{name}={value}" for name, value in own.items()]
        quiet = ["--quiet"] if "quiet" in self.known else []
        return [sys.executable, "-m", "tempering", "run", str(self.recipe), *self.flags, *given, *quiet]

    def _environment(self, slot: int) -> dict[str, str]:
        threads = str(self.threads)
        chosen = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            chosen["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return {**os.environ, **chosen}

    def _on_exit(self, cell: Cell, code: int) -> None:
        """Record how a cell went."""
        place, record = arena_plan.work_of(self.folder, cell), arena_plan.record_of(self.folder, cell)
        facts, failure = arena_view.read_facts(place), record.with_suffix(".failed.json")
        if facts.get("status") == "done":
            write_cell(record, pack(place))
            failure.unlink(missing_ok=True)
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        else:
            self.failed[cell.id] = failure_reason(place, facts, code)
            if facts.get("status") == "failed":
                write_cell(failure, pack(place))
        self.display.ended(cell, self.failed.get(cell.id), None if cell.id in self.failed else read_cell(record))
        try:
            arena_view.render(self.folder, self.plan)
        except Exception as error:  # the cells that run must not end because a table cannot be made
            self.display.say(f"table and page are left as they were: {error}")

    # stopping

    def _stop(self, number: int, _: object) -> None:
        self.stopped = number

    def _end_all(self) -> None:
        """Let the running cells close their records, then make sure that none is left."""
        for running in self.running:
            running.process.terminate()
        until = time.monotonic() + STOP_TIMEOUT
        for running in self.running:
            try:
                running.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            running.lock.release()
        self.running = []


def renice() -> None:
    """Make this process and all that it starts give way to everything else."""
    if hasattr(os, "nice"):
        os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return  # where a sandbox forbids it, nice 19 has to do


def _as_nice(pid: int) -> None:
    """Give a new session our niceness: Linux shares the CPU between sessions first, and a new one has none."""
    if not hasattr(os, "nice"):
        return
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(os.nice(0)))
    except OSError:
        return  # no such thing here: then niceness alone counts


def failure_reason(place: Path, facts: Mapping[str, Any], code: int) -> str:
    """What went wrong in a run, in a line, and where to read more."""
    if facts.get("status") == "failed" and facts.get("error"):
        return str(facts["error"])
    log = place / "log.txt"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}; the same command resumes it"
    return f"exit code {code}: {said[-1].strip() if said else 'it said nothing'} (all of it: {log})"
