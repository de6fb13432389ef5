"""Flipped bits, cut and deleted files of a run, a grid and a search: harmless or named, never silent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tempering.cli import main as cli
from tempering.experiments.tune import study as tune_study
from tempering.models import load
from tempering.reports.records import load_run
from tests.runs import cut, go, identical, left, points, stop_at, student_net, timeless
from tests.test_cache_faults import DAMAGES, damage
from tests.test_comparison import FAKE as CELL
from tests.test_comparison import TINY
from tests.test_tune import FAKE as TRIAL

Way = Callable[[Path], Any]
IDLE = (".lock", ".gitignore", "begun.txt")  # without content, or written by the recipes of these tests


class NamedError(ValueError):
    """A command's message."""


def check_damage(origin: Path, folder: Path, ways: list[Way], *, times: int) -> None:
    """Damage one file of a copy of ``origin`` at a time; each way to use it gives what it gave before, or names it."""
    draw, named = random.Random(folder.name), 0
    times = DAMAGES if "TEMPERING_DAMAGES" in os.environ else times
    shutil.copytree(origin, folder)
    want = [way(folder) for way in ways]
    for _ in range(times):
        seed = draw.random()
        for way, before in zip(ways, want, strict=True):
            shutil.rmtree(folder)
            shutil.copytree(origin, folder)
            again = random.Random(seed)
            files = sorted(
                p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and not p.name.endswith(IDLE)
            )
            path = again.choice(files)
            done = damage(path, again)
            try:
                got = way(folder)
            except (RuntimeError, ValueError, OSError, UserWarning) as error:
                shown = str(error)
                assert path.name in shown or str(path.parent) in shown, f"{done}: {type(error).__name__}: {error}"
                named += 1
            else:
                assert identical(got, before), f"{path.relative_to(folder)}, {done}: other content, in silence"
    assert named >= times // 4, f"{named} of {times} were named"


def run(out: Path, **more: Any) -> Any:
    settings = {"epochs": 2, "checkpoint_every": 2, "selfcheck": False, "test": cut(points(8, seed=9), 8)}
    return go(cut(points(24), 8), out=out, **settings | more)


def record_and_weights(out: Path) -> Any:
    record = load_run(out)
    weights = dict(load(student_net(), out / "student.safetensors").state_dict()) if record.done else {}
    return [record.facts, record.epochs, record.steps, record.analysis, weights]


def resumed(out: Path) -> Any:
    """Everything that the same call leaves, without times."""
    run(out)
    record = load_run(out)
    kept = ("label", "seed", "status", "method", "student", "teacher", "data", "settings", "optimizer", "best_by")
    best = [timeless(record.facts["result"][which]) for which in ("last", "best")]
    return [{key: record.facts[key] for key in kept}, best, record.analysis, left(out)]


@pytest.mark.parametrize("state", ["half", "finished"])
def test_damage_of_a_run_is_harmless_or_named(state: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    if state == "half":
        with pytest.raises(KeyboardInterrupt):
            run(whole, on_step=stop_at(5))
    else:
        run(whole)
    check_damage(whole, tmp_path / state, [record_and_weights, resumed], times=6)


def command(*words: object, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code = cli.main(list(map(str, words)))
    shown = capsys.readouterr()
    if " is missing, though its run is finished" in shown.out or "though its run is recorded" in shown.err:
        raise NamedError(shown.out + shown.err)
    if code:
        failures = [line for line in shown.out.splitlines() if "failed: " in line]
        raise NamedError("\n".join([*failures, shown.err]))


posix = pytest.mark.skipif(os.name != "posix", reason="cells and trials are locked by flock, which is POSIX")


@posix
@pytest.mark.usefixtures("forked_jobs")
def test_damage_of_a_grid_is_harmless_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, whole = tmp_path / "fake.py", tmp_path / "whole"
    recipe.write_text(CELL)

    def compare(out: Path) -> Any:
        flags = ("--methods=kd,dkd", "--seeds=1", "--no-controls", f"--out={out}", "--quiet", "--no-nice")
        command("compare", recipe, *flags, capsys=capsys)
        return content(out)

    def report(out: Path) -> Any:
        command("compare", "report", out, capsys=capsys)
        return content(out)

    def content(out: Path) -> Any:
        records = [json.loads(path.read_text()) for path in sorted((out / "records").iterdir())]
        return [(out / "table.md").read_text(), [timeless(r["facts"]["result"]) for r in records]]

    compare(whole)
    check_damage(whole, tmp_path / "grid", [compare, report], times=4)


@posix
@pytest.mark.usefixtures("forked_jobs")
def test_damage_of_a_half_done_grid_is_harmless_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run is recorded; the other was killed in its second epoch, and goes on from its checkpoint."""
    recipe, whole = tmp_path / "tiny.py", tmp_path / "whole"
    recipe.write_text(TINY.replace("if step == die_at", "if method == 'dkd' and step == die_at"))

    def compare(out: Path) -> Any:
        flags = ("--methods=kd,dkd", "--seeds=1", "--no-controls", f"--out={out}", "--quiet", "--no-nice")
        command("compare", recipe, *flags, "--", "--die-at=12", capsys=capsys)
        return content(out)

    def report(out: Path) -> Any:
        command("compare", "report", out, capsys=capsys)
        return [(out / "table.md").read_text(), content(out)]

    def content(out: Path) -> Any:
        """Everything that is learned and scored, without times."""
        records = [json.loads(path.read_text()) for path in sorted((out / "records").iterdir())]
        results = [[timeless(r["facts"]["result"][which]) for which in ("last", "best")] for r in records]
        lines = [[timeless(line) for r in records for line in r[part]] for part in ("steps", "epochs")]
        return [results, lines, [p.read_bytes() for p in sorted((out / "work").glob("*/*.safetensors"))]]

    with pytest.raises(NamedError, match="ended by SIGKILL"):
        compare(whole)
    assert len(list((whole / "records").iterdir())) == 1 and list((whole / "work").glob("*/checkpoints/*"))
    check_damage(whole, tmp_path / "grid", [report, compare], times=4)


@posix
@pytest.mark.usefixtures("forked_jobs")
def test_damage_of_a_search_is_harmless_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason="needs optuna, the extra 'tune'")
    recipe, whole = tmp_path / "fake.py", tmp_path / "whole"
    recipe.write_text(TRIAL)

    def search(out: Path, trials: int) -> Any:
        command("tune", recipe, "--method=kd", f"--trials={trials}", f"--out={out}", "--quiet", capsys=capsys)
        done = tune_study.finished(tune_study.study_of(out, 0))
        return [[t.params, t.value, t.user_attrs, t.intermediate_values] for t in done]

    search(whole, 2)
    check_damage(whole, tmp_path / "search", [partial(search, trials=2), partial(search, trials=3)], times=4)
