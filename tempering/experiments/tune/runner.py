"""tempering tune: search temperature and weights of a method on the validation split, with pruning and resuming."""

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

from tempering.experiments import recipe as recipe_file
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import runner as compare_runner
from tempering.experiments.compare import status as compare_status
from tempering.experiments.tune.space import Space
from tempering.experiments.tune.study import JOURNAL, SEAL, finished, parameter, seal, shown, study_of, suggest
from tempering.reports.compare import Metric
from tempering.reports.records import load_run, number
from tempering.utils.files import (
    handle_signals,
    inheritable_descriptors,
    raise_lost_interrupt,
    read_json_lines,
    read_sealed,
    sealed,
    sha256_text,
    try_lock,
    write_atomic,
)
from tempering.utils.text import counted

if TYPE_CHECKING:
    import optuna
    from filelock import BaseFileLock

FILE = "tune.json"
TRIAL = "trial.json"  # in a trial's folder: its parameters, from which a lost journal is restored
FORMAT = 2  # of tune.json; 2 has a checksum
GRACE = 0.25  # fraction of a run before which no trial is pruned: early scores rank learning rates, not losses


@dataclass
class Running:
    """A trial in progress: folder, process (None if it was run before), lock, and the last epoch reported."""

    trial: optuna.Trial
    run_dir: Path
    process: subprocess.Popen[bytes] | None
    lock: BaseFileLock
    last_epoch: int = 0
    pruned: bool = False


class SearchRunner:
    """Run trials of a search space until ``trials`` of them are finished; finished trials are never repeated.

    Args:
        folder: folder of the search; trials run in trials/, and a killed one resumes from its checkpoint.
        recipe: the recipe's file.
        flags: the recipe's flags, shared by all trials.
        space: the search space.
        trials: number of trials, including those of earlier calls.
        seed: seed of every trial's run, and of the search.
        jobs: parallel trials.
        threads: threads per trial.
        prune: stop a trial that is worse than the median of earlier ones after the same epoch.
        quiet: print failures only.
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
        self.known = recipe_file.flags(recipe)
        if missing := sorted({"method", "seed", "out"} - self.known):
            raise ValueError(f"{recipe}: main() takes no {', '.join(missing)}; a search needs these as its flags.")
        self.folder, self.recipe, self.flags, self.space = folder, recipe, list(flags), space
        self.shared = compare_plan.shared_flags(flags, compare_plan.OWN, "tune")
        self.trials, self.seed, self.jobs, self.threads = trials, seed, jobs, threads
        self.prune, self.quiet = prune, quiet
        self.running: list[Running] = []
        self.metric: Metric | None = None
        self.stopped: signal.Signals | None = None

    def run(self) -> int:
        """Run the remaining trials; return 0, or 130 if stopped.

        Raises:
            ValueError: if the folder contains another search, or a trial fails to run.
        """
        raise_lost_interrupt()
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        with self._lock(), handle_signals(self._stop):
            self._write_settings()
            self.study = study_of(self.folder, self.seed, prune=self.prune)
            self._recover()
            try:
                while self.stopped is None and self._poll():
                    seal(self.folder)
                    time.sleep(compare_runner.POLL_SECONDS)
            finally:
                self._end_all()
                seal(self.folder)
        remaining = counted(max(0, self.trials - len(finished(self.study))), "trial")
        if self.stopped is not None:
            compare_runner.say_stopped(self.stopped, remaining)
            return 130
        return 0

    # state on disk

    def _write_settings(self) -> None:
        """Write the settings of the search, once; those of a search without any score are replaced.

        Raises:
            ValueError: if the folder contains another search, naming the difference; or if its settings are damaged.
        """
        settings = {
            "recipe": self.recipe.stem,
            "flags": self.shared,
            "method": self.space.template,
            "space": [str(d) for d in self.space.dimensions.values()],
            "seed": self.seed,
        }
        path = self.folder / FILE
        old = read_sealed(path, required=FORMAT) if path.is_file() else settings
        for name, now in settings.items():
            if old.get(name) != now:
                if any(map(_has_scores, (self.folder / "trials").iterdir())):
                    raise ValueError(
                        f"{self.folder} contains another search: its {name} was {old.get(name)!r}, now it is {now!r}. "
                        "Use another --out."
                    )
                self._discard()
                break
        (self.folder / "trials" / ".gitignore").write_text("*\n")
        write_atomic(path, sealed({"format": FORMAT, **settings}))

    def _discard(self) -> None:
        """Delete what a search left whose trials all failed before their first score.

        Raises:
            ValueError: if one of them still runs.
        """
        for path in (self.folder / "trials").glob(f"*/{TRIAL}"):  # teachers are kept
            lock = try_lock(compare_plan.lock_path(path.parent))
            if lock is None:
                raise ValueError(f"a trial of another search still runs in {path.parent}. Wait for it, or stop it.")
            lock.release()
            shutil.rmtree(path.parent)
        for name in (JOURNAL, SEAL):
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = try_lock(compare_plan.lock_path(self.folder / "trials"))
        if lock is None:
            raise ValueError(f"another process is working on {self.folder}. Wait for it, or use another --out.")
        try:
            yield
        finally:
            lock.release()

    def _recover(self) -> None:
        """Enqueue trials that were interrupted, that the journal lacks, and the default values as the first trial."""
        import optuna

        for old in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(old.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(old.params)
        if not self.study.get_trials(deepcopy=False):
            defaults = {d.name: parameter(d, self.space.defaults.get(d.name)) for d in self.space.varied}
            if valid := {name: value for name, value in defaults.items() if value is not None}:
                self.study.enqueue_trial(valid)
        self._restore()
        seal(self.folder)

    def _restore(self) -> None:
        """Enqueue trials that have a folder and are not in the journal; finished runs are not repeated."""
        trials = self.study.get_trials(deepcopy=False)
        known = [t.system_attrs.get("fixed_params", t.params) for t in trials] + [t.params for t in trials]
        lost = [c for path in (self.folder / "trials").glob(f"*/{TRIAL}") if (c := read_sealed(path, required=1))]
        lost = [content for content in lost if content["params"] not in known]
        for content in sorted(lost, key=lambda content: content["number"]):
            self.study.enqueue_trial(content["params"])
        if lost:
            text = f"{counted(len(lost), 'trial')} with a folder, absent from the journal: read or run again"
            compare_status.say(text, quiet=self.quiet)

    # trials

    def _poll(self) -> bool:
        """Poll running trials and launch new ones; return whether there is more to do."""
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
        run_dir = self.folder / "trials" / _name(method, flags)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / TRIAL, sealed({"format": 1, "number": trial.number, "params": trial.params}))
        self.running.append(Running(trial, run_dir, *self._start(run_dir, method, flags)))

    def _start(
        self, run_dir: Path, method: str, flags: Sequence[str]
    ) -> tuple[subprocess.Popen[bytes] | None, BaseFileLock]:
        """Start the trial's process and return it with its lock; None instead of a process if it was run before.

        Waits for a process on the same trial that a killed search left running.
        """
        values = {"method": method, "seed": str(self.seed), "out": str(run_dir)}
        values |= {"threads": str(self.threads)} if "threads" in self.known else {}
        run_flags = [*self.flags, *flags, *(f"--{name}={value}" for name, value in values.items())]
        run_flags += ["--quiet"] if "quiet" in self.known else []
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        while (lock := try_lock(compare_plan.lock_path(run_dir))) is None:
            for running in self.running:  # another trial of this search may have the same values
                if running.run_dir == run_dir and running.process is not None and running.process.poll() is not None:
                    running.lock.release()
            time.sleep(compare_runner.POLL_SECONDS)
        facts = compare_status.read_facts(run_dir)
        if facts.get("status") == "done" or _diverged(facts):
            lock.release()
            return None, lock
        with open(run_dir / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tempering.experiments.tune.trial", str(self.recipe), *run_flags],
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
        """Report new epochs to the pruner, stop the trial if it decides so, and handle its end."""
        # poll before reading, so that nothing is written after it
        ended = running.process is None or running.process.poll() is not None
        facts = compare_status.read_facts(running.run_dir)
        if facts.get("best_by"):
            self._measure(facts)
            self._report_epochs(running, facts)
        if not ended:
            return
        self.running.remove(running)
        running.lock.release()
        self._on_exit(running, facts)

    def _measure(self, facts: dict[str, Any]) -> None:
        """Set the metric that ranks trials, which must be on the validation split.

        Raises:
            ValueError: if the run chooses its best epoch on another split.
        """
        self.metric = Metric(str(facts["best_by"]))
        if not self.metric.name.startswith("validation/"):
            raise ValueError(
                f"a search scores its trials on a validation split, but {self.recipe} chooses by {self.metric.name}. "
                "Set one, such as --validation=5000."
            )
        if self.study.user_attrs.get("metric") != self.metric.name:
            self.study.set_user_attr("metric", self.metric.name)

    def _report_epochs(self, running: Running, facts: dict[str, Any]) -> None:
        epochs = load_run(running.run_dir).epochs
        total = (facts.get("settings") or {}).get("epochs") or 0
        for line in epochs:
            epoch, value = int(line["epoch"]), self._value(line)
            if value is None or epoch <= running.last_epoch:
                continue
            running.last_epoch = epoch
            running.trial.report(value, epoch)
            if GRACE * total <= epoch < total and not running.pruned and running.trial.should_prune():
                running.pruned = True
                if running.process is not None:
                    running.process.terminate()

    def _value(self, line: dict[str, Any]) -> float | None:
        """Return the validation score of an evaluation, larger is better."""
        assert self.metric is not None
        value = number((line.get("validation") or {}).get(self.metric.key))
        return None if value is None else -value if self.metric.lower else value

    def _on_exit(self, running: Running, facts: dict[str, Any]) -> None:
        from optuna.trial import TrialState

        status = facts.get("status")
        last = self._value((facts.get("result") or {}).get("last") or {}) if status == "done" else None
        if last is not None:
            self.study.tell(running.trial, last)
            shutil.rmtree(running.run_dir / "checkpoints", ignore_errors=True)
        elif running.pruned:
            self.study.tell(running.trial, state=TrialState.PRUNED)
        elif _diverged(facts):
            running.trial.set_user_attr("error", facts["error"])
            self.study.tell(running.trial, state=TrialState.PRUNED)
        elif self.stopped is None:
            code = 0 if running.process is None else running.process.returncode
            reason = compare_runner.failure_reason(running.run_dir, facts, code)
            raise ValueError(f"a trial of {running.trial.user_attrs['method']} failed to run: {reason}")
        else:
            return  # the next call resumes it
        self._report(running)

    def _report(self, running: Running) -> None:
        """Print one line on a finished trial."""
        frozen = self.study.get_trials(deepcopy=False)[running.trial.number]
        outcome = "pruned" if frozen.state.name == "PRUNED" else "done"
        value = shown(self.metric, frozen.value)
        progress = f"{len(finished(self.study))} of {self.trials}"
        call = " ".join([running.trial.user_attrs["method"], *running.trial.user_attrs["flags"]])
        compare_status.say(f"trial {progress}, {outcome}: {value}  {call}", quiet=self.quiet)

    # stopping

    def _stop(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number)

    def _end_all(self) -> None:
        """Let the running trials close their records; the next call resumes them."""
        processes = [running.process for running in self.running if running.process is not None]
        for process in processes:
            process.terminate()
        until = time.monotonic() + compare_runner.STOP_TIMEOUT
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
    """Return the command that runs a trial's values."""
    return (
        shlex.join(["tempering", "run", str(recipe), *flags, *trial.user_attrs["flags"]])
        + " "
        + shlex.join(["--method", trial.user_attrs["method"]])
    )


def _diverged(facts: dict[str, Any]) -> bool:
    """Return whether the loss was NaN or infinite, which is a property of these values, not an error of the search."""
    return facts.get("status") == "failed" and str(facts.get("error")).startswith("FloatingPointError")


def _has_scores(run_dir: Path) -> bool:
    """Return whether a trial was evaluated on the validation split, so that it is of use to its search."""
    return any("validation" in line for line in read_json_lines(run_dir / "epochs.jsonl"))


def _name(method: str, flags: Sequence[str]) -> str:
    return sha256_text(json.dumps([method, *flags]))[:10]
