"""A search: its space, real trials on few digits, a kill in the middle, and the test split that it never sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempering.cli import main as cli
from tempering.experiments.compare.plan import lock_path
from tempering.experiments.spec import method_from
from tempering.experiments.tune import page as tune_view
from tempering.experiments.tune import runner as tune
from tempering.experiments.tune import study as tune_study
from tempering.experiments.tune.space import space_of
from tempering.methods import METHODS
from tempering.utils.files import try_lock
from tests.paths import ROOT

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="trials are locked by flock, which is POSIX"),
    pytest.mark.usefixtures("forked_jobs"),
]
optuna = pytest.importorskip("optuna", reason="needs optuna, the extra 'tune'")
Words = tuple[str, ...]

# a run that writes what a run writes and imports no torch; its score is a curve over soft with its top at 2
FAKE = '''
"""A run that is none."""
import json, math, os, re, signal, sys, time
from pathlib import Path
from tempering.utils.files import write_atomic


class Fake:
    """Has what is asked of an Experiment."""

    def __init__(self, **flags):
        self.flags, self.check = flags, None.__init__

    def without_test(self):
        return self

    def run(self):
        train(**self.flags)


def main(*, method: str, seed: int = 0, out: Path, by: str = "validation/accuracy", epochs: int = 4, lr: float = 0.1,
         crash: bool = False, quiet: bool = False) -> Fake:
    """Describe a run."""
    return Fake(method=method, seed=seed, out=out, by=by, epochs=epochs, lr=lr, crash=crash)


def train(*, method, seed, out, by, epochs, lr, crash):
    """Write records."""
    with open(out.parent / "begun.txt", "a") as begun:
        begun.write(out.name + "\\n")
    if crash:
        raise ValueError("this run was asked to crash")
    soft = float(re.search(r"soft=([-+.e\\d]+)", method)[1])
    facts = {"format": 1, "status": "running", "label": "x", "seed": seed, "best_by": by, "result": None,
             "settings": {"epochs": epochs}}

    def write():
        write_atomic(out / "facts.json", json.dumps(facts))

    write()
    top = 0.9 - 0.2 * abs(math.log(soft / 2)) - abs(lr - 0.1)
    try:
        for epoch in range(1, epochs + 1):
            line = {"epoch": epoch, "validation": {"accuracy": top * epoch / epochs}, "test": {"accuracy": 1 - top}}
            with open(out / "epochs.jsonl", "a") as file:
                file.write(json.dumps(line) + "\\n")
            if len((out.parent / "begun.txt").read_text().split()) > 6:
                time.sleep(0.6)  # time to be cut
    except KeyboardInterrupt:
        facts["status"] = "interrupted"
        write()
        raise
    facts |= {"status": "failed", "error": "FloatingPointError: nan"} if soft > 8 else {
        "status": "done", "result": {"last": line, "best": line}}
    write()
    if soft > 8:
        sys.exit(1)
'''


def search(recipe: object, out: Path, *args: str, flags: tuple[str, ...] = ()) -> int:
    return cli.main(["tune", str(recipe), f"--out={out}", "--quiet", *args, "--", *flags])


def begun(out: Path) -> list[str]:
    return (out / "trials" / "begun.txt").read_text().split()


# the space


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - {"Sum", "OnBlocks", "TruncatedImportance", "HybridULD", "PGDAT", "Supervised"})
)
def test_every_method_has_a_space_and_both_its_ends_are_methods(name: str) -> None:
    space = space_of({"CRD": "crd(samples=64)"}.get(name, name.lower()))
    assert any(d.log for d in space.varied), "a weight, at least"
    for d in space.varied:
        assert d.low is not None and d.high is not None
        assert d.low <= float(space.defaults[d.name]) <= d.high
    own = {d.name: space.defaults[d.name] for d in space.varied}
    made = method_from(space.method(own))
    assert made.hyperparameters() == method_from({"CRD": "crd(samples=64)"}.get(name, name.lower())).hyperparameters()


def test_what_is_searched_by_itself() -> None:
    space = space_of("dtkd-published")
    assert space.template == (
        "dtkd(dynamic={dynamic}, soft={soft}, warmup={warmup}, "
        "temperature=sharpness(tau={temperature.tau}, solve=published, differentiable=True))"
    )
    assert [str(d) for d in space.varied] == [
        "dynamic=0.3..30 log",
        "soft=0.1..10 log",
        "warmup=0..0.25 linear",
        "temperature.tau=1..10 log",
    ]
    assert space_of("kd(soft=4, hard=1)").dimensions["soft"].high == 40.0
    inside = {d.name for d in space_of("sum(kd(hard=0), dkd)").varied}
    assert {"kd.soft", "kd.temperature.tau", "dkd.non_target"} <= inside and "kd.hard" not in inside


def test_a_space_can_be_typed() -> None:
    given = "soft=1..3, dynamic=3, warmup=1/240..24/240 log, solve=exact|std, tau=2..8 linear, lr=0.01..0.1"
    space = space_of("dtkd", given, {"lr", "method"})
    assert [str(d) for d in space.dimensions.values()] == [
        "dynamic=3",
        "soft=1..3 linear",
        "warmup=0.00416667..0.1 log",
        "temperature.tau=2..8 linear",
        "temperature.solve=exact|std",
        "--lr=0.01..0.1 log",
    ]
    chosen = {"soft": "2", "warmup": "0.1", "temperature.tau": "3", "temperature.solve": "std", "--lr": "0.05"}
    assert space.method(chosen) == "dtkd(dynamic=3, soft=2, warmup=0.1, temperature=sharpness(tau=3, solve=std))"
    assert space.flags(chosen) == ["--lr=0.05"]
    nested = space_of(
        "lskd(kd(soft={soft}, hard=0, temperature={T}))", "soft=1..9, T=static({t})|sharpness({t}), t=1..4"
    )
    assert nested.method({"soft": "2", "T": "sharpness({t})", "t": "3"}) == (
        "lskd(kd(soft=2, hard=0, temperature=sharpness(3)))"
    )
    other = space_of("dtkd", "temperature=static(2)|static(4)")
    assert [d.name for d in other.varied] == ["dynamic", "soft", "warmup", "temperature"]


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("dkdd", "", "no method is called 'dkdd'. Did you mean 'dkd'?"),
        ("supervised", "", "supervised has nothing to search. Name the arguments to vary: --space"),
        ("kd", "sof=1..2", "neither the method nor the recipe has an argument 'sof'. Did you mean 'soft'?"),
        ("kd", "soft", "'soft' is not a dimension of a search. Write it as in"),
        ("kd", "soft=2..1", "soft=2..1 is not a range: 2 is not below 1."),
        ("kd", "soft=0..1 log", "a logarithmic range needs a lower bound above 0; got 0"),
        ("kd", "soft=1..2..3", "soft=1..2..3 is neither a range nor a choice"),
        ("kd", "soft=1..2/0", "soft: 2/0 is not a number."),
        ("kd", "soft=-1..1", "KD needs soft >= 0 and finite; got -1"),
        ("kd", "warmup=0..20", "KD needs warmup in [0, 1]"),
        ("kd", "temperature=static|statik", "Did you mean 'static'?"),
        ("kd(soft={a})", "", "has a placeholder {a} without a range. Pass --space a=0.1..10."),
        ("sum(kd(hard=0), dkd)", "tau=1..2", "'tau' could be kd.temperature.tau or dkd.temperature.tau."),
        ("kd", "seed=1..2", "neither the method nor the recipe has an argument 'seed'"),
    ],
)
def test_a_space_that_is_none_is_refused(method: str, given: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        space_of(method, given, {"seed", "lr"})
    assert said in str(caught.value)


# the search


def test_the_best_is_found_cut_ones_are_cut_and_the_page_shows_it(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    how = ("--method=kd", "--space=soft=0.02..20, tau=4, warmup=0")
    assert search(fake, out, *how, "--trials=6") == 0
    assert len(begun(out)) == 6
    typed = capsys.readouterr().out.strip()
    assert typed.startswith(f"tempering run {fake} --method 'kd(soft=")
    assert typed.endswith("warmup=0, temperature=static(tau=4))'")
    first = begun(out)
    assert search(fake, out, *how, "--trials=6") == 0
    assert begun(out) == first, "finished trials do not run again"

    assert search(fake, out, *how, "--trials=11") == 0
    assert len(begun(out)) == 11
    study = tune_study.study_of(out, 0)
    done = tune_study.finished(study)
    assert len(done) == 11
    cut = [t for t in done if t.state.name == "PRUNED" and "error" not in t.user_attrs]
    assert cut and all(max(t.intermediate_values) < 4 for t in cut)
    top = tune_study.best(study)
    whole = [t for t in done if t.state.name == "COMPLETE"]
    assert top.value == max(t.value for t in whole) and top.value > 0.6
    assert done[0].params == {"soft": 0.9}, "it begins with the method as it is"
    values = json.loads((out / "trials" / tune._name(top.user_attrs["method"], []) / "facts.json").read_text())
    assert values["result"]["last"]["validation"]["accuracy"] == top.value

    space = space_of("kd", "soft=0.02..20, tau=4, warmup=0")
    assert tune_view.importances(study, space) == {"soft": pytest.approx(1.0)}
    page = (out / "tune.html").read_text()
    for part in ("soft=0.02..20", "Importance", "% of the variance", top.user_attrs["method"], "pruned</td>"):
        assert part.replace("soft=0.02..20", "kd(soft={soft}") in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert page == tune_view.page(out, study, space, tune.command(fake, (), top)), "the same trials, the same bytes"
    assert "biased upward" in " ".join(tune_view.words(study, space))


def test_values_whose_loss_is_no_number_count_as_bad_and_end_nothing(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert search(fake, out, "--method=kd(soft={soft})", "--space=soft=2|9|0.5", "--trials=4", "--no-prune") == 0
    study = tune_study.study_of(out, 0)
    bad = [t for t in tune_study.finished(study) if t.params["soft"] == "9"]
    assert all(t.user_attrs["error"] == "FloatingPointError: nan" and t.state.name == "PRUNED" for t in bad)
    names = begun(out)
    assert len(names) == len(set(names)) < 5, "the same values run once"
    assert {t.params["soft"] for t in tune_study.finished(study)} >= {"2"} or bad


def test_flags_of_the_recipe_are_searched_too(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    how = ("--method=kd", "--space=soft=2, tau=4, warmup=0, lr=0.1|0.4", "--trials=9", "--seed=5", "--jobs=2")
    assert search(fake, out, *how, flags=("--epochs=3",)) == 0
    assert "--epochs=3 --lr=0.1 --method" in capsys.readouterr().out


def test_the_test_split_is_never_chosen_by(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(fake, tmp_path / "a", "--method=kd", flags=("--by=test/accuracy",)) == 1
    said = capsys.readouterr().err
    assert "a search scores its trials on a validation split" in said and "chooses by test/accuracy" in said
    assert len(begun(tmp_path / "a")) == 1


@pytest.mark.parametrize(
    ("args", "flags", "said"),
    [
        (("--trials=0",), (), "trials, jobs and threads must be 1 or more; got 0, 1 and 1."),
        ((), ("--seed=3",), "tune sets --seed itself"),
        ((), ("--crash",), "failed to run: exit code 1: ValueError: this run was asked to crash"),
        (("--seed=4",), ("--epochs=9",), "contains another search: its flags was {'epochs': '2'}, now it is"),
    ],
)
def test_bad_input_is_refused(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: Words, flags: Words, said: str
) -> None:
    out = tmp_path / "s"
    if flags == ("--epochs=9",):
        assert search(fake, out, "--method=kd", "--trials=1", flags=("--epochs=2",)) == 0
    assert search(fake, out, "--method=kd", *args, flags=flags) == 1
    assert said in capsys.readouterr().err


def test_two_searches_do_not_share_a_folder(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    assert search(fake, out, "--method=kd", "--trials=1") == 0
    lock = try_lock(lock_path(out / "trials"))
    assert lock is not None
    assert search(fake, out, "--method=kd", "--trials=2") == 1
    assert f"another process is working on {out}" in capsys.readouterr().err
    lock.release()


def test_a_line_that_a_kill_cut_short_is_taken_off(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert search(fake, out, "--method=kd", "--trials=2") == 0
    journal = out / tune_study.JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')
    (out / f"{tune_study.JOURNAL}.lock").symlink_to(journal)
    assert search(fake, out, "--method=kd", "--trials=3") == 0
    assert journal.read_bytes().startswith(whole)
    assert len(tune_study.finished(tune_study.study_of(out, 0))) == 3


def test_a_search_that_failed_before_any_score_is_replaced(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, wrong in enumerate((("--crash",), ("--by=test/accuracy",))):
        out = tmp_path / f"s{number}"
        assert search(fake, out, "--method=kd", "--trials=2", flags=wrong) == 1
        (out / "trials" / "teachers").mkdir()
        if number:  # evaluated on the test split alone
            for lines in (out / "trials").glob("*/epochs.jsonl"):
                lines.write_text('{"epoch": 1, "test": {"accuracy": 0.5}}\n')
        assert search(fake, out, "--method=kd", "--trials=2") == 0, capsys.readouterr().err
        assert [t.state.name for t in tune_study.study_of(out, 0).trials] == ["COMPLETE", "COMPLETE"]
        assert (out / "trials" / "teachers").is_dir(), "a trained teacher is kept"
        assert search(fake, out, "--method=kd", "--trials=2", flags=("--lr=0.2",)) == 1
        assert "contains another search: its flags was {}" in capsys.readouterr().err


def cut_whole_lines(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))


def change_a_score(journal: Path) -> None:
    text = journal.read_text()
    journal.write_text(text.replace('"values":[0.', '"values":[1.', 1))
    assert journal.read_text() != text


@pytest.mark.parametrize("damage", [cut_whole_lines, change_a_score, Path.unlink])
def test_a_damaged_journal_is_named_and_restored_from_the_trials(
    damage: Callable[[Path], None], fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert search(fake, out, "--method=kd", "--trials=3") == 0
    before, ran = tune_study.finished(tune_study.study_of(out, 0)), begun(out)
    damage(out / tune_study.JOURNAL)
    assert search(fake, out, "--method=kd", "--trials=3") == 1
    assert f"the journal of the search in {out} is damaged" in capsys.readouterr().err
    (out / tune_study.JOURNAL).unlink(missing_ok=True)
    (out / tune_study.SEAL).unlink()
    assert search(fake, out, "--method=kd", "--trials=3") == 0
    after = tune_study.finished(tune_study.study_of(out, 0))
    assert [(t.params, t.value) for t in after] == [(t.params, t.value) for t in before] and begun(out) == ran


# real trials

DIGITS = '''
"""The digits, killed once in the second epoch."""
import os, signal
from pathlib import Path
from tempering.experiments.recipe import find, load, with_flags
from tempering.training.experiment import Experiment


def main(*, method: str, seed: int = 0, out: Path, quiet: bool = False) -> Experiment:
    """Distil."""
    def on_step(step, loss):
        if step == 4 and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    flags = {"epochs": 2, "teacher_epochs": 1, "subset": 160, "threads": 1, "quiet": quiet}
    made = with_flags(load(find("digits")), flags | {"method": method, "seed": seed, "out": out})
    made.on_step = on_step
    return made
'''


def test_digits_killed_in_the_middle_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    recipe, out = tmp_path / "killed.py", tmp_path / "s"
    recipe.write_text(DIGITS)
    assert search(recipe, out, "--method=kd", "--trials=1") == 1
    assert "failed to run: ended by SIGKILL (out of memory?); the same command resumes it" in capsys.readouterr().err
    assert search(recipe, out, "--method=kd", "--trials=1") == 0
    study = tune_study.study_of(out, 0)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"]
    first, last = study.trials
    assert first.params == last.params and list(last.intermediate_values) == [1, 2]
    place = out / "trials" / tune._name(last.user_attrs["method"], [])
    facts: dict[str, Any] = json.loads((place / "facts.json").read_text())
    assert facts["resumed"] == [3], "3 steps an epoch: it went on, and did not begin again"
    assert facts["best_by"] == "validation/accuracy"
    assert last.value == facts["result"]["last"]["validation"]["accuracy"]
    for name in (place, *(p for p in (out / "trials" / "teachers").iterdir() if p.is_dir())):
        lines = [json.loads(line) for line in (name / "epochs.jsonl").read_text().splitlines()]
        assert lines and not any("test" in line for line in lines), "the test split is not even looked at"
        assert json.loads((name / "analysis.json").read_text())["split"] == "validation"


def test_a_search_that_is_killed_leaves_its_trial_and_the_next_one_takes_it_up(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    (out / "trials").mkdir(parents=True)
    (out / "trials" / "begun.txt").write_text("-\n" * 6)  # the trials take their time
    args = ["tune", str(fake), "--method=kd", "--trials=1", f"--out={out}", "--quiet", "--"]
    process = subprocess.Popen([sys.executable, "-m", "tempering", *args], cwd=ROOT)
    _until(lambda: len(begun(out)) > 6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli.main(args) == 0
    assert len(begun(out)) == 7, "it is waited for, and not begun a second time"
    assert [t.state.name for t in tune_study.study_of(out, 0).trials] == ["FAIL", "COMPLETE"]


def test_a_stop_reaches_the_trial(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    (out / "trials").mkdir(parents=True)
    (out / "trials" / "begun.txt").write_text("-\n" * 6)
    args = ["tune", str(fake), "--method=kd", "--trials=1", f"--out={out}", "--"]
    process = subprocess.Popen([sys.executable, "-m", "tempering", *args], cwd=ROOT, stderr=subprocess.PIPE)
    _until(lambda: any((out / "trials").glob("*/epochs.jsonl")))
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and "stopped by SIGUSR1; the same command resumes: 1 trial left" in said
    (facts,) = (json.loads(p.read_text()) for p in (out / "trials").glob("*/facts.json"))
    assert facts["status"] == "interrupted"


def test_a_recipe_without_a_validation_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        '''
"""A linear student, tested and not validated."""
from pathlib import Path
import torch
from torch import nn
from tempering.experiments.presets import method_of
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment

def main(*, method: str, out: Path, config: TrainConfig = TrainConfig(epochs=1, selfcheck=False)) -> Experiment:
    """Distil."""
    batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    return Experiment(student=nn.Linear(4, 3), teacher=nn.Linear(4, 3), train=batches, test=batches,
                      method=method_of(method), config=config, out=out)
'''
    )
    assert search(recipe, tmp_path / "s", "--method=kd") == 1
    said = capsys.readouterr().err
    assert "ValueError: a search scores its trials on a validation split, so that the test split stays unseen" in said
    assert "Give the recipe one, such as --validation=5000." in said
    assert not list((tmp_path / "s" / "trials").glob("*/facts.json")), "nothing was trained"


def test_a_recipe_that_trains_in_its_main_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "old.py"
    recipe.write_text(
        "from pathlib import Path\nimport tempering as kd\n\n"
        "def main(*, method: str, seed: int = 0, out: Path) -> kd.Run:\n    raise AssertionError('it was called')\n"
    )
    assert search(recipe, tmp_path / "s", "--method=kd") == 1
    said = capsys.readouterr().err
    assert f"ValueError: main() of recipe {recipe} returned Run; return an Experiment" in said


def _until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
