"""tempering tune: temperature and weights of a method searched on the validation split, pruned and resumed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments import recipe as recipefile
from tempering.experiments.compare import plan as arena_plan
from tempering.experiments.compare import runner as arena
from tempering.experiments.compare import status as arena_view
from tempering.experiments.tune.space import Space
from tempering.experiments.tune.study import finished, parameter, shown, study_of, suggest
from tempering.reports.compare import Metric
from tempering.reports.records import load_run, number
from tempering.utils.files import inheritable_descriptors, sha256_text, try_lock, write_atomic

if TYPE_CHECKING:
    import optuna
    from filelock import BaseFileLock

FILE = "tune.json"
GRACE = 0.25  # share of a run before which no trial is cut: early scores rank learning rates, not losses


@dataclass
class Running:
    """A running trial: its folder, its process (none where it was run before), its lock, and the epoch last told."""

    trial: optuna.Trial
    place: Path
    process: subprocess.Popen[bytes] | None
    lock: BaseFileLock
    told: int = 0
    cut: bool = False


class Search:
    """Runs trials of a space until ``trials`` of them are finished; a finished one never runs again.

    Args:
        folder: of the search; trials run in trials/, and a killed one goes on from its checkpoint.
        recipe: the recipe's file.
        flags: the recipe's flags, the same in every trial.
        space: what is varied.
        trials: how many, those of earlier calls counted.
        seed: of every trial's run, and of the search.
        jobs: trials at once.
        threads: of each.
        prune: cut a trial that is worse, after the same epoch, than the median of those before.
        quiet: print nothing but failures.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Path,
        flags: Sequence[str],
        space: Space,
        *,
        trials: int,
        seed: int = 0,
        jobs: int = 1,
        threads: int = 1,
        prune: bool = True,
        quiet: bool = False,
    ) -> None:
        if min(trials, jobs, threads) < 1:
            raise ValueError(f"trials, jobs and threads must be 1 or more; got {trials}, {jobs} and {threads}.")
        self.known = recipefile.flags(recipe)
        if missing := sorted({"method", "seed", "out"} - self.known):
            raise ValueError(f"{recipe}: main() takes no {', '.join(missing)}; a search needs these as its flags.")
        self.folder, self.recipe, self.flags, self.space = folder, recipe, list(flags), space
        self.shared = arena_plan.shared_flags(flags, arena_plan.OWN, "tune")
        self.trials, self.seed, self.jobs, self.threads = trials, seed, jobs, threads
        self.prune, self.quiet = prune, quiet
        self.running: list[Running] = []
        self.metric: Metric | None = None
        self.stopped: int | None = None

    def run(self) -> int:
        """Run what is left of the trials; 0, or 130 where it was stopped.

        Raises:
            ValueError: where the folder holds another search, or a trial cannot be run.
        """
        self._remember()
        with self._lock(), _signals(self._stop):
            self.study = study_of(self.folder, self.seed, prune=self.prune)
            self._recover()
            try:
                while self.stopped is None and self._poll():
                    time.sleep(arena.POLL_SECONDS)
            finally:
                self._end_all()
        left = self.trials - len(finished(self.study))
        if self.stopped is not None:
            arena_view.say(f"stopped; the same command goes on: {max(0, left)} trials are open", quiet=self.quiet)
            return 130
        return 0

    # what is kept

    def _remember(self) -> None:
        """Write what is searched, once.

        Raises:
            ValueError: where the folder holds another search, naming what differs.
        """
        what = {
            "recipe": self.recipe.stem,
            "flags": self.shared,
            "method": self.space.template,
            "space": [str(d) for d in self.space.dimensions.values()],
            "seed": self.seed,
        }
        path = self.folder / FILE
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            for name, now in what.items():
                if old.get(name) != now:
                    raise ValueError(
                        f"{self.folder} holds another search: its {name} was {old.get(name)!r}, now it is {now!r}. "
                        "Give another --out."
                    )
            return
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        (self.folder / "trials" / ".gitignore").write_text("*\n")
        write_atomic(path, json.dumps({"format": 1, **what}, indent=1) + "\n")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = try_lock(arena_plan.lock_path(self.folder / "trials"))
        if lock is None:
            raise ValueError(f"another process is at work on {self.folder}. Wait for it, or give another --out.")
        try:
            yield
        finally:
            lock.release()

    def _recover(self) -> None:
        """Begin with the method as it is; ask again for what an interruption left unfinished."""
        import optuna

        for old in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(old.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(old.params)
        if not self.study.get_trials(deepcopy=False):
            own = {d.name: parameter(d, self.space.defaults.get(d.name)) for d in self.space.varied}
            if inside := {name: value for name, value in own.items() if value is not None}:
                self.study.enqueue_trial(inside)

    # trials

    def _poll(self) -> bool:
        """One look at the trials at work, beginning others where there is room; whether there is more to do."""
        for running in list(self.running):
            self._poll_trial(running)
        while len(self.running) < self.jobs and len(finished(self.study)) + len(self.running) < self.trials:
            self._launch()
        return bool(self.running)

    def _launch(self) -> None:
        trial = self.study.ask()
        chosen = {d.name: suggest(trial, d) for d in self.space.varied}
        method, flags = self.space.method(chosen), self.space.flags(chosen)
        trial.set_user_attr("method", method)
        trial.set_user_attr("flags", flags)
        place = self.folder / "trials" / _name(method, flags)
        place.mkdir(parents=True, exist_ok=True)
        self.running.append(Running(trial, place, *self._start(place, method, flags)))

    def _start(
        self, place: Path, method: str, flags: Sequence[str]
    ) -> tuple[subprocess.Popen[bytes] | None, BaseFileLock]:
        """Start the trial's process and return it with its lock; no process for a trial that was run before.

        Waits for a process on the same trial that a killed search left running.
        """
        own = {"method": method, "seed": str(self.seed), "out": str(place)}
        own |= {"threads": str(self.threads)} if "threads" in self.known else {}
        given = [*self.flags, *flags, *(f"--{name}={value}" for name, value in own.items())]
        given += ["--quiet"] if "quiet" in self.known else []
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        while (lock := try_lock(arena_plan.lock_path(place))) is None:
            for running in self.running:  # a trial of ours may have the same values
                if running.place == place and running.process is not None and running.process.poll() is not None:
                    running.lock.release()
            time.sleep(arena.POLL_SECONDS)
        facts = arena_view.read_facts(place)
        if facts.get("status") == "done" or _diverged(facts):
            lock.release()
            return None, lock
        with open(place / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tempering.experiments.tune.trial", str(self.recipe), *given],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads},
                # the process keeps the lock if this one is killed
                pass_fds=inheritable_descriptors(lock),
                start_new_session=True,
            )
        return process, lock

    def _poll_trial(self, running: Running) -> None:
        """Tell the pruner of new epochs, cut the trial where it says so, and take up its end."""
        ended = (
            running.process is None or running.process.poll() is not None
        )  # before reading, so that nothing is written after
        facts = arena_view.read_facts(running.place)
        if facts.get("best_by"):
            self._measure(facts)
            self._report_epochs(running, facts)
        if not ended:
            return
        self.running.remove(running)
        running.lock.release()
        self._on_exit(running, facts)

    def _measure(self, facts: dict[str, Any]) -> None:
        """What trials are ranked by; the validation split's score, or nothing at all.

        Raises:
            ValueError: for a run that chooses its best epoch by another split.
        """
        self.metric = Metric(str(facts["best_by"]))
        if not self.metric.name.startswith("validation/"):
            raise ValueError(
                f"a search scores its trials on a validation split, and {self.recipe} chooses by {self.metric.name}. "
                "Give it one, such as --validation=5000."
            )
        if self.study.user_attrs.get("metric") != self.metric.name:
            self.study.set_user_attr("metric", self.metric.name)

    def _report_epochs(self, running: Running, facts: dict[str, Any]) -> None:
        epochs = load_run(running.place).epochs
        total = (facts.get("settings") or {}).get("epochs") or 0
        for line in epochs:
            epoch, value = int(line["epoch"]), self._value(line)
            if value is None or epoch <= running.told:
                continue
            running.told = epoch
            running.trial.report(value, epoch)
            if GRACE * total <= epoch < total and not running.cut and running.trial.should_prune():
                running.cut = True
                if running.process is not None:
                    running.process.terminate()

    def _value(self, line: dict[str, Any]) -> float | None:
        """The score of an evaluation, larger is better; of the validation split alone."""
        assert self.metric is not None
        value = number((line.get("validation") or {}).get(self.metric.key))
        return None if value is None else -value if self.metric.lower else value

    def _on_exit(self, running: Running, facts: dict[str, Any]) -> None:
        from optuna.trial import TrialState

        said = facts.get("status")
        last = self._value((facts.get("result") or {}).get("last") or {}) if said == "done" else None
        if last is not None:
            self.study.tell(running.trial, last)
            shutil.rmtree(running.place / "checkpoints", ignore_errors=True)
        elif running.cut:
            self.study.tell(running.trial, state=TrialState.PRUNED)
        elif _diverged(facts):
            running.trial.set_user_attr("error", facts["error"])
            self.study.tell(running.trial, state=TrialState.PRUNED)
        elif self.stopped is None:
            code = 0 if running.process is None else running.process.returncode
            why = arena.failure_reason(running.place, facts, code)
            raise ValueError(f"a trial of {running.trial.user_attrs['method']} could not be run: {why}")
        else:
            return  # it goes on in the next call
        self._report(running)

    def _report(self, running: Running) -> None:
        """One line on a finished trial."""
        frozen = self.study.get_trials(deepcopy=False)[running.trial.number]
        how = "cut" if frozen.state.name == "PRUNED" else "done"
        value = shown(self.metric, frozen.value)
        of = f"{len(finished(self.study))} of {self.trials}"
        words = " ".join([running.trial.user_attrs["method"], *running.trial.user_attrs["flags"]])
        arena_view.say(f"trial {of}, {how}: {value}  {words}", quiet=self.quiet)

    # stopping

    def _stop(self, number: int, _: object) -> None:
        self.stopped = number

    def _end_all(self) -> None:
        """Let the running trials close their records; they go on in the next call."""
        processes = [running.process for running in self.running if running.process is not None]
        for process in processes:
            process.terminate()
        until = time.monotonic() + arena.STOP_TIMEOUT
        for process in processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for running in self.running:
            running.lock.release()
        self.running = []


def command(recipe: Path, flags: Sequence[str], trial: optuna.trial.FrozenTrial) -> str:
    """What to type to run a trial's values."""
    return (
        shlex.join(["tempering", "run", str(recipe), *flags, *trial.user_attrs["flags"]])
        + " "
        + shlex.join(["--method", trial.user_attrs["method"]])
    )


def _diverged(facts: dict[str, Any]) -> bool:
    """Whether the loss was no number, which says something about these values and nothing about the search."""
    return facts.get("status") == "failed" and str(facts.get("error")).startswith("FloatingPointError")


def _name(method: str, flags: Sequence[str]) -> str:
    return sha256_text(json.dumps([method, *flags]))[:10]


@contextmanager
def _signals(stop: Any) -> Iterator[None]:
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number_, handler in before.items():
            signal.signal(number_, handler)
