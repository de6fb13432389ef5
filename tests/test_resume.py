"""A run that was stopped, in whatever moment, goes on to the same bits as one that was not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn

from tempering.methods import KD
from tempering.training import checkpoint, distributed
from tempering.training.distributed import RunInterrupted
from tempering.training.fabric import fabric_for
from tempering.training.resumable_loader import ResumableLoader
from tempering.training.run_dir import _to_text
from tempering.training.trainer import Trainer
from tests.killed_runs import KILLS
from tests.paths import ROOT
from tests.runs import ADAMW, LOADERS, SGD, STEPS, Noisy, identical, left, resumable, stop_at


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What runs leave that nobody stopped, by loader."""
    folder = tmp_path_factory.mktemp("whole")
    out = {}
    for loader in LOADERS:
        resumable(loader, folder / loader)
        out[loader] = left(folder / loader)
    return out


def same(out: Path, reference: dict[str, Any]) -> None:
    found = left(out)
    for part in ("student", "method", "optimizer", "ranks", "at", "precision", "key"):
        assert identical(found["state"][part], reference["state"][part]), part
    assert found["lines"] == reference["lines"]
    assert found["files"] == reference["files"]


def test_the_runs_are_worth_comparing(whole: dict[str, dict[str, Any]]) -> None:
    """Every loader makes other weights, the method learned something, and every step left a line."""
    students = [w["files"]["student.safetensors"] for w in whole.values()]
    assert len(set(students)) == len(students)
    for found in whole.values():
        assert float(found["state"]["method"]["scale"]) != 1.0
        assert [line["step"] for line in found["lines"]["steps.jsonl"]] == list(range(1, STEPS + 1))
        assert [line["epoch"] for line in found["lines"]["epochs.jsonl"]] == [1, 2, 3]
        assert found["state"]["optimizer"]["state"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("stop", [4, 10, 16], ids=["in mid-epoch", "half-way", "at an epoch's end"])
def test_stopped_and_resumed(loader: str, stop: int, tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        resumable(loader, tmp_path, on_step=stop_at(stop))
    assert json.loads((tmp_path / "facts.json").read_text())["status"] == "interrupted"
    told = []
    run = resumable(loader, tmp_path, on_step=lambda number, loss: told.append(number))
    assert told == list(range(run.facts["resumed"][0], STEPS)) and told[0] <= stop
    same(tmp_path, whole[loader])


def test_stopped_again_and_again(tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    for stop in (3, 6, 7, 12, 19):
        with pytest.raises(KeyboardInterrupt):
            resumable("shuffled", tmp_path, on_step=stop_at(stop))
    run = resumable("shuffled", tmp_path)
    assert run.facts["resumed"] == [3, 6, 6, 12, 18]
    same(tmp_path, whole["shuffled"])


def test_how_often_there_are_checkpoints_changes_nothing(tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        resumable("shuffled", tmp_path, on_step=stop_at(13), checkpoint_every=5)
    resumable("shuffled", tmp_path, checkpoint_every=None)
    same(tmp_path, whole["shuffled"])


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_accumulated_and_resumed(optimizer: Any, tmp_path: Path) -> None:
    more = {"accumulate": 3, "optimizer": optimizer, "method": KD(), "steps": 9, "checkpoint_every": 1}
    resumable("shuffled", tmp_path / "whole", **more)
    with pytest.raises(KeyboardInterrupt):
        resumable("shuffled", tmp_path / "stopped", on_step=stop_at(5), **more)
    resumable("shuffled", tmp_path / "stopped", **more)
    same(tmp_path / "stopped", left(tmp_path / "whole"))


def test_a_finished_run_is_not_run_again(tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    first = resumable("shuffled", tmp_path)
    told = []
    again = resumable("shuffled", tmp_path, on_step=lambda number, loss: told.append(number))
    assert not told and again.last == first.last and again.best == first.best and again.epochs == first.epochs
    assert identical(dict(again.student.state_dict()), dict(first.student.state_dict()))
    same(tmp_path, whole["shuffled"])


# killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the runs of tests/killed_runs.py left behind."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.killed_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed(name: str, killed: Path, whole: dict[str, dict[str, Any]]) -> None:
    loader, what, _ = KILLS[name]
    out = killed / name
    facts = json.loads((out / "facts.json").read_text())
    assert facts["status"] == "running" and not (out / "student.safetensors").exists()
    leftovers = [p.name for p in (out / "checkpoints").glob("*")] if (out / "checkpoints").exists() else []
    if what in ("tensors.safetensors", "state.json"):
        assert any(n.endswith(".partial") for n in leftovers), leftovers
    if what == "replace":
        assert not [n for n in leftovers if n == "step-00000008"], "the moment in which neither is in its place"
    run = resumable(loader, out)
    assert run.facts["status"] == "done"
    assert run.facts.get("resumed", []) == ([] if name == "before the first checkpoint" else [_resumed(leftovers)])
    same(out, whole[loader])
    assert not list(out.rglob("*.partial")) and not list(out.rglob(f"*{checkpoint.OLD}"))


def _resumed(names: list[str]) -> int:
    """The newest step among these names of whole checkpoints."""
    return max(int(n.removesuffix(checkpoint.OLD)[5:]) for n in names if not n.endswith(".partial"))


# what it stands on


def test_the_global_random_numbers_of_an_epoch_depend_on_nothing_before_it(tmp_path: Path) -> None:
    """What evaluation draws, or a self-check, leaves the training as it is."""
    resumable("shuffled", tmp_path / "a", selfcheck=True, evaluate_every=1)
    torch.rand(5)
    resumable("shuffled", tmp_path / "b", selfcheck=False, evaluate_every=3)
    a, b = (left(tmp_path / name) for name in "ab")
    assert a["files"]["student.safetensors"] == b["files"]["student.safetensors"]


def test_a_loader_with_its_own_generator_keeps_the_users_seed() -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(Noisy(12).y.tolist(), batch_size=2, shuffle=True, generator=generator)
        stream = ResumableLoader(loader, fabric)
        list(stream.epoch(0, 0))
        return [tuple(batch.tolist()) for batch in stream.epoch(epoch, start)]

    fabric = fabric_for(accelerator="cpu", devices=1, strategy="auto", precision="32-true")
    assert order(3, 2) == order(3, 2) != order(3, 1)
    assert order(3, 2) != order(4, 2)
    assert order(3, 2, start=4) == order(3, 2)[4:]
    assert order(3, 2, start=99) == []


def test_a_key_holds_no_addresses() -> None:
    assert _to_text(stop_at) == "<function stop_at>"
    assert " at 0x" not in _to_text(nn.ReLU().forward) and _to_text(torch.float32) == "torch.float32"


# signals


class Handled:
    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: object) -> None:
        self.received.append(number)


def sent(name: str, step: int) -> Any:
    """An ``on_step`` that gets a signal."""

    def send(number: int, loss: torch.Tensor) -> None:
        if number == step:
            os.kill(os.getpid(), getattr(signal, name))

    return send


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_leaves_a_checkpoint_of_the_next_step(
    name: str, tmp_path: Path, whole: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as ended:
        resumable("shuffled", tmp_path, on_step=sent(name, 9), checkpoint_every=None)
    assert isinstance(ended.value, RunInterrupted) and ended.value.code == 99
    assert f"interrupted by {name} at step 10, checkpoint written to {tmp_path}" in capsys.readouterr().err
    assert json.loads((tmp_path / "facts.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(getattr(signal, name)) is before
    run = resumable("shuffled", tmp_path)
    assert run.facts["resumed"] == [10] and run.how == "resumed"
    same(tmp_path, whole["shuffled"])


def test_signals_that_somebody_handles_are_theirs(tmp_path: Path) -> None:
    """A handler of the caller's, and nohup's."""
    theirs = Handled()
    before = {s: signal.signal(s, h) for s, h in ((signal.SIGUSR1, theirs), (signal.SIGHUP, signal.SIG_IGN))}
    try:
        resumable("list", tmp_path / "a", on_step=sent("SIGUSR1", 2), steps=4)
        resumable("list", tmp_path / "b", on_step=sent("SIGHUP", 2), steps=4)
        assert theirs.received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is theirs and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_in_the_last_step_or_in_an_evaluation(tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    """The checkpoint is between the last step of an epoch and its scores."""
    for name, step in (("last", STEPS - 1), ("of an epoch", 7)):
        with pytest.raises(RunInterrupted):
            resumable("shuffled", tmp_path / name, on_step=sent("SIGTERM", step))
        assert resumable("shuffled", tmp_path / name).facts["resumed"] == [step + 1]
        same(tmp_path / name, whole["shuffled"])


def test_a_signal_that_comes_too_late_for_a_run_ends_the_next(
    tmp_path: Path, whole: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's last evaluation, say, before its student is trained."""
    finish = Trainer._finish

    def sends(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_finish", sends)
        assert resumable("list", tmp_path / "first", steps=4).facts["status"] == "done"
    with pytest.raises(RunInterrupted):
        resumable("shuffled", tmp_path / "next")
    assert resumable("shuffled", tmp_path / "next").facts["resumed"] == [1]
    same(tmp_path / "next", whole["shuffled"])


class Ended:
    """A loader whose workers get the signal too, before their fourth batch."""

    def __init__(self, batches: list[Any], where: str) -> None:
        self.batches, self.where = batches, where

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.batches):
            if i == 3 and self.where:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
            yield batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_that_the_signal_ends_too_leave_a_checkpoint(
    accumulate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOADERS, "ended", lambda: Ended(LOADERS["list"](), where))
    settings = {"accumulate": accumulate, "steps": 4, "checkpoint_every": None}
    where = ""
    resumable("ended", tmp_path / "whole", **settings)
    where = "fetch"
    with pytest.raises(RunInterrupted) as ended:
        resumable("ended", tmp_path / "run", **settings)
    step = 3 // accumulate
    assert ended.value.code == 99 and f"by SIGTERM at step {step}, checkpoint written" in capsys.readouterr().err
    where = ""
    assert resumable("ended", tmp_path / "run", **settings).facts["resumed"] == [step]
    same(tmp_path / "run", left(tmp_path / "whole"))


def test_workers_that_end_by_themselves_are_a_failure_and_those_before_the_first_step_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            if name:
                os.kill(os.getpid(), getattr(signal, name))
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

        return fail

    monkeypatch.setattr(distributed, "GRACE", 0.0)
    with pytest.raises(RuntimeError, match="Terminated"):
        resumable("list", tmp_path / "alone", on_step=fails(""))
    assert json.loads((tmp_path / "alone" / "facts.json").read_text())["status"] == "failed"
    with pytest.raises(RunInterrupted) as ended:
        resumable("list", tmp_path / "both", on_step=fails("SIGTERM"))  # in a step, which is not done then
    assert ended.value.code == 99 and "at step 0, together with the loader's workers" in capsys.readouterr().err
    assert json.loads((tmp_path / "both" / "facts.json").read_text())["status"] == "interrupted"


def test_workers_that_end_do_not_break_off_the_step(tmp_path: Path, whole: dict[str, dict[str, Any]]) -> None:
    """torch raises in a handler of SIGCHLD, whatever is being done."""

    ended: list[int] = []

    def raises(number: int, frame: object) -> None:
        if ended:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    def both(step: int, loss: torch.Tensor) -> None:
        if step == 5:
            ended.append(7)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCHLD)

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        with pytest.raises(RunInterrupted):
            resumable("list", tmp_path, on_step=both)
        assert ended and signal.getsignal(signal.SIGCHLD) is raises
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert resumable("list", tmp_path).facts["resumed"] == [6]
    same(tmp_path, whole["list"])


@pytest.mark.parametrize("array", [False, True])
def test_a_slurm_job_is_queued_again(array: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {called}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(RunInterrupted):
        resumable("list", tmp_path / "run", on_step=sent("SIGUSR1", 3), requeue=True)
    job = "12_3" if array else "17"
    assert called.read_text() == f"requeue {job}\n" and f"the Slurm job {job} is queued again" in capfd.readouterr().err
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.raises(RunInterrupted):
        resumable("list", tmp_path / "run", on_step=sent("SIGUSR1", 5), requeue=True)
    assert f"the Slurm job {job} could not be queued again: no such job" in capfd.readouterr().err


# what a person reads


def test_where_there_is_no_terminal_each_epoch_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def go(**more: Any) -> list[str]:
        resumable("list", tmp_path / str(more), quiet=False, steps=None, epochs=3, method=KD(), **more)
        return capsys.readouterr().out.splitlines()

    name, *lines = go()
    assert name == "KD:" and len(lines) == 3
    for epoch, line in enumerate(lines, 1):
        left = r", \d+ s left" if epoch < 3 else ""
        words = rf"epoch {epoch}/3, step {8 * epoch}/24, loss [\d.]+, lr [\d.e-]+, validation \d+\.\d\d %{left}"
        assert re.fullmatch(words, line), line
    lines = go(evaluate_every=2, selfcheck=True)
    assert lines[0].startswith("self-check ok") and lines[1] == "KD:" and len(lines) == 5
    assert ["validation" in line for line in lines[2:]] == [False, True, True]


def test_the_bar_shows_epoch_loss_and_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda self, task, **f: shown.append(f) or update(self, task, **f))
    resumable("list", tmp_path, quiet=False, steps=None, epochs=2, method=KD())
    bars = [f["now"] for f in shown if "now" in f]
    assert len(bars) == 16 and re.fullmatch(r"epoch 2/2, loss [\d.]+, lr [\d.e-]+", bars[-1])
    assert any(str(f.get("note", "")).startswith("validation accuracy") for f in shown)
