"""tempering compare: run a grid, one process per run; each runs once, resumes after a kill, and is recorded."""

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

from tempering.experiments import recipe as recipe_file
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import status as compare_status
from tempering.experiments.compare.plan import Cell, Plan, lock_path
from tempering.reports.records import pack, read_cell, write_cell
from tempering.training.config import VERDICTS
from tempering.utils.files import handle_signals, inheritable_descriptors, raise_lost_interrupt, try_lock
from tempering.utils.text import counted

if TYPE_CHECKING:
    from filelock import BaseFileLock

POLL_SECONDS = 0.2  # seconds
STOP_TIMEOUT = 20.0  # seconds for a stopped run to close its record
TRACEBACK_HINT = "(--traceback shows where)"  # the line after an error of the command


@dataclass
class Running:
    """A run in progress: its process, and its lock, which the process keeps if this one is killed."""

    cell: Cell
    process: subprocess.Popen[bytes]
    lock: BaseFileLock
    slot: int


class ComparisonRunner:
    """Run the unfinished cells of a plan, ``jobs`` in parallel.

    Args:
        folder: folder of the comparison; records go to records/, runs to work/.
        plan: the grid.
        recipe: the recipe's file.
        flags: the recipe's flags, shared by all runs.
        jobs: parallel runs.
        threads: threads per run.
        gpus: ids of GPUs to distribute, one per run; empty leaves that to the recipe.
        quiet: print failures only.
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
        recipe_flags = recipe_file.flags(recipe)
        required = {"method", "seed", "out"} | ({"temperature"} if any(c.temperature for c in plan.cells) else set())
        if missing := sorted(required - recipe_flags):
            raise ValueError(f"{recipe}: main() takes no {', '.join(missing)}; a comparison needs these as its flags.")
        self.folder, self.plan, self.recipe, self.flags, self.known = folder, plan, recipe, list(flags), recipe_flags
        self.jobs, self.threads, self.gpus, self.quiet = jobs, threads, list(gpus), quiet
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}
        self.stopped: signal.Signals | None = None

    def run(self) -> int:
        """Run unfinished cells; return 0 if all are done, 1 if one failed, 130 if stopped.

        Raises:
            ValueError: if a record was edited.
        """
        raise_lost_interrupt()
        self._set_up()
        with handle_signals(self._stop):
            try:
                with compare_status.Display(self.folder, self.plan, quiet=self.quiet) as self.display:
                    while self.stopped is None and self._poll():
                        time.sleep(POLL_SECONDS)
            finally:
                self._end_all()
        compare_status.render(self.folder, self.plan)
        if self.stopped is not None:
            say_stopped(self.stopped, counted(self._remaining(), "run"))
            return 130
        return 1 if self.failed else 0

    def _set_up(self) -> None:
        for name in ("records", "work"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "work" / ".gitignore").write_text("*\n")
        # whether a teacher is above chance is decided again in a grid that is started again; work/teachers has weights
        shutil.rmtree(self._verdicts, ignore_errors=True)
        compare_plan.write(self.folder, self.plan)
        compare_status.records(self.folder, self.plan)  # fail early if a record was edited

    def _poll(self) -> bool:
        """Collect finished processes and launch new ones; return whether there is more to do."""
        for running in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(running)
            self._on_exit(running.cell, running.process.returncode)
            running.lock.release()
        busy = {running.cell.id for running in self.running}
        waiting = [c for c in self.plan.cells if not self._done(c) and c.id not in self.failed and c.id not in busy]
        for cell in sorted(
            waiting, key=lambda c: c.seed
        ):  # seed by seed, so that a stopped grid has some seeds of all presets
            if len(self.running) >= self.jobs:
                break
            self._launch(cell)
        self.display.show(self.failed, self.jobs)
        return bool(waiting or self.running)

    @property
    def _verdicts(self) -> Path:
        return self.folder.absolute() / "work" / "verdicts"

    def _done(self, cell: Cell) -> bool:
        return compare_plan.record_of(self.folder, cell).is_file()

    def _remaining(self) -> int:
        return sum(not self._done(cell) for cell in self.plan.cells)

    # a cell

    def _launch(self, cell: Cell) -> None:
        """Start a run, unless another process has locked it; pack it if it has already finished."""
        run_dir = compare_plan.work_of(self.folder, cell)
        lock = try_lock(lock_path(run_dir))
        if lock is None:
            return
        if self._done(cell):  # finished by another process in the meantime
            lock.release()
            return
        if compare_status.read_facts(run_dir).get("status") == "done":
            self._on_exit(cell, 0)
            lock.release()
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.jobs)) - {running.slot for running in self.running})
        with open(run_dir / "log.txt", "ab") as log:
            process = subprocess.Popen(
                self._command(cell, run_dir),
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

    def _command(self, cell: Cell, run_dir: Path) -> list[str]:
        values = {"method": cell.method, "seed": str(cell.seed), "out": str(run_dir)}
        optional = {"temperature": cell.temperature, "label": cell.label, "threads": str(self.threads)}
        values |= {name: value for name, value in optional.items() if value is not None and name in self.known}
        run_flags = [f"--{name}={value}" for name, value in values.items()]
        quiet = ["--quiet"] if "quiet" in self.known else []
        return [sys.executable, "-m", "tempering", "run", str(self.recipe), *self.flags, *run_flags, *quiet]

    def _environment(self, slot: int) -> dict[str, str]:
        threads = str(self.threads)
        overrides = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        overrides[VERDICTS] = str(self._verdicts)  # each teacher is judged once
        if self.gpus:
            overrides["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return {**os.environ, **overrides}

    def _on_exit(self, cell: Cell, code: int) -> None:
        """Record the outcome of a run."""
        run_dir, record = compare_plan.work_of(self.folder, cell), compare_plan.record_of(self.folder, cell)
        facts, failure_path = compare_status.read_facts(run_dir), record.with_suffix(".failed.json")
        if facts.get("status") == "done":
            write_cell(record, pack(run_dir))
            failure_path.unlink(missing_ok=True)
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        else:
            self.failed[cell.id] = failure_reason(run_dir, facts, code)
            if facts.get("status") == "failed":
                write_cell(failure_path, pack(run_dir))
        self.display.ended(cell, self.failed.get(cell.id), None if cell.id in self.failed else read_cell(record))
        try:
            compare_status.render(self.folder, self.plan)
        except Exception as error:  # runs in progress must not be stopped because a table cannot be rendered
            self.display.say(f"table and page were not updated: {error}")

    # stopping

    def _stop(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number)

    def _end_all(self) -> None:
        """Let running processes close their records, then kill the remaining ones."""
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


def say_stopped(by: signal.Signals, left: str) -> None:
    """Print that a signal stopped a grid or a search, also a quiet one; ``left`` is as "1 run"."""
    print(f"stopped by {by.name}; the same command resumes: {left} left", file=sys.stderr, flush=True)


def renice() -> None:
    """Give this process and its children the lowest priority."""
    if hasattr(os, "nice"):
        os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return  # not permitted in a sandbox: nice 19 remains


def _as_nice(pid: int) -> None:
    """Copy our niceness to a new session: Linux schedules sessions (autogroups) first, and a new one has niceness 0."""
    if not hasattr(os, "nice"):
        return
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(os.nice(0)))
    except OSError:
        return  # without autogroups the process's niceness applies


def failure_reason(run_dir: Path, facts: Mapping[str, Any], code: int) -> str:
    """Return why a run failed, in one line, and where to read more."""
    if facts.get("status") == "failed" and facts.get("error"):
        return str(facts["error"])
    log = run_dir / "log.txt"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}; the same command resumes it"
    said = [line for line in lines if line != TRACEBACK_HINT]
    return f"exit code {code}: {said[-1].strip() if said else 'no output'} (full log: {log})"
