"""`tempering bench`: a method file of a user, run by the protocol of recorded runs, on their seeds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tempering.cli import bench
from tempering.cli import main as cli
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.presets import method_of, presets_from
from tempering.experiments.recipe import find
from tempering.experiments.spec import is_policy, policy_from
from tempering.methods import METHODS
from tempering.reports.records import pack, read_cell, write_cell
from tempering.temperature import POLICIES
from tests import recipes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="cells are locked by flock, which is POSIX")
FLAGS = {"epochs": 1, "teacher_epochs": 1, "subset": 100, "selfcheck": False}
WORDS = ("--epochs=1", "--teacher-epochs=1", "--subset=100", "--no-selfcheck")
METHOD = '''
from tempering.methods import Method
from tempering.objectives import kl
from tempering.temperature import Static


class Confident(Method):
    """KD whose rows count by the teacher's confidence."""

    paper = "none: an example"

    def __init__(self, *, soft: float = 0.9, hard: float = 0.1) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard

    def forward(self, rows, progress):
        T = Static(4.0)(rows, progress)
        return self.with_hard({"soft": self.soft * rows.teacher.softmax(-1).amax(-1) * kl(rows, T)}, rows)
'''
POLICY = '''
from tempering.temperature import Policy, Temperatures
from tempering.temperature.base import constant


class Twice(Policy):
    """Twice tau."""

    paper = "none: an example"

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, rows, progress):
        T = constant(2 * self.tau, rows.student)
        return Temperatures(T, T)
'''


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded runs on digits: the student alone and two fixed temperatures, of two seeds."""
    folder, work = tmp_path_factory.mktemp("arena"), tmp_path_factory.mktemp("runs")
    presets = [*presets_from("supervised,kd-matched"), *presets_from("kd-matched", "static(2)")]
    plan = compare_plan.plan_for(find("digits"), presets, range(2), WORDS)
    for cell in plan.cells:
        flags: dict[str, Any] = {"method": cell.method, "temperature": cell.temperature, "seed": cell.seed}
        recipes.run("digits", FLAGS | flags | {"label": cell.label, "out": work / cell.id, "threads": 1, "quiet": True})
        write_cell(compare_plan.record_of(folder, cell), pack(work / cell.id))
    compare_plan.write(folder, plan)
    return folder


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "policy.py").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for registry in (METHODS, POLICIES):
        monkeypatch.setattr(registry, "added", dict(registry.added))
    return tmp_path / "mine.py"


def test_a_method_file_is_placed_among_the_recorded_runs_and_resumes(
    arena: Path, mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["bench", "mine.py", f"--arena={arena}", "--quiet"]
    assert cli.main([*call, "--seeds=1"]) == 0
    (folder,) = Path("runs/bench").iterdir()
    (first,) = (folder / "records").glob("*.json")
    at = first.stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    assert first.stat().st_mtime_ns == at, "a finished run is not repeated"
    records = [read_cell(path) for path in sorted((folder / "records").glob("*.json"))]
    assert [run.seed for run in records] == [0, 1] and {run.of("method")["name"] for run in records} == {"Confident"}
    recorded = [read_cell(path) for path in sorted((arena / "records").glob("*.json"))]
    for key in ("epochs", "total_steps"):
        assert len({run.of("settings")[key] for run in (*records, *recorded)}) == 1
    # one seed: the same first weights and batch, so the same first cross entropy
    for seed in (0, 1):
        hard = {
            round(r.steps[0]["terms"]["hard"] / r.of("method")["hard"], 5)
            for r in (*records, *recorded)
            if r.seed == seed
        }
        assert len(hard) == 1
    assert "Confident (mine.py)" in said or "mine (mine.py) (yours)" in said
    assert "student alone" in said and "control" in said and "±" in said
    # a file that was changed is another bench
    mine.write_text(METHOD.replace("0.9", "0.8"))
    assert bench.own_preset("mine.py", ())[1] != folder.name


def test_the_protocol_is_that_of_the_records(arena: Path, mine: Path) -> None:
    plan, recipe = compare_plan.read(arena), find("digits")
    flags = bench.protocol_flags(plan, arena, recipe, ["--keep=1"])
    assert sorted(flags) == ["--epochs=1", "--keep=1", "--no-selfcheck", "--subset=100", "--teacher-epochs=1"]
    with pytest.raises(ValueError, match=r"recorded protocol, where --epochs is 1; got 9\. Leave it out"):
        bench.protocol_flags(plan, arena, recipe, ["--epochs=9"])
    with pytest.raises(ValueError, match=r"takes no --epoch\. Did you mean 'epochs'"):
        bench.protocol_flags(plan, arena, recipe, ["--epoch=1"])


def test_a_file_of_the_protocol_is_found_beside_the_records_or_asked_for(arena: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    flags = {"data": "cifar100", "teacher_weights": "net.safetensors", "size": "16"}
    plan = compare_plan.Plan("cifar100", flags, None, ())
    (weights := tmp_path / "teacher" / "net.safetensors").parent.mkdir()
    weights.touch()
    with pytest.raises(ValueError, match=r"a file --data cifar100. Name yours: -- --data PATH"):
        bench.protocol_flags(plan, grid, find("cifar100"), [])
    found = bench.protocol_flags(plan, grid, find("cifar100"), ["--data", "elsewhere"])
    assert found == ["--data", "elsewhere", f"--teacher-weights={weights}", "--size=16"]


def test_other_data_is_refused_before_anything_is_run(
    arena: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = mine.parent / "other"
    (other / "records").mkdir(parents=True)
    plan = compare_plan.read(arena)
    compare_plan.write(other, compare_plan.Plan(plan.recipe, plan.flags | {"subset": "50"}, None, plan.cells))
    for path in (arena / "records").glob("*.json"):
        (other / "records" / path.name).write_bytes(path.read_bytes())
    assert cli.main(["bench", "mine.py", f"--arena={other}"]) == 1
    assert "the training data are not those of the records" in capsys.readouterr().err
    assert not (mine.parent / "runs").exists()


def test_a_policy_file_is_benched_in_kd_with_equal_weights(mine: Path) -> None:
    preset, name = bench.own_preset("policy.py:Twice(tau=3)", ())
    assert (preset.label, preset.temperature) == ("Twice(tau=3) (policy.py)", "policy.py:Twice(tau=3)")
    method = method_of(preset.spec, preset.temperature)
    assert (method.soft, method.hard) == (4, 1) and type(method.temperature).__name__ == "Twice"
    assert method.policies()["temperature"].tau == 3 and name.startswith("twice-tau-3-policy.py-")
    assert policy_from("policy.py").tau == 4.0
    assert is_policy("policy.py") and is_policy("cosine(tau=2)") and not is_policy("mine.py") and not is_policy("dkd")
    assert bench.own_preset("dkd", {"dkd"})[0].label == "dkd, yours"


@pytest.mark.parametrize(
    ("content", "text", "said"),
    [
        (None, "none.py", "there is no file none.py. Write FILE.py, or FILE.py:NAME"),
        ("x = 1\n", "bad.py", "bad.py needs one subclass of Method; it defines none"),
        (
            METHOD + METHOD.replace("Confident", "Other"),
            "bad.py",
            r"it defines Confident, Other. Name one: bad.py:NAME",
        ),
        (
            METHOD.replace("Confident", "KD"),
            "bad.py",
            "bad.py defines KD, and tempering.methods has KD. Rename the class",
        ),
        (METHOD, "bad.py:confidant", "no method is called 'confidant'. Did you mean 'confident'"),
        (METHOD, "bad.py:confident(sofd=1)", "Confident has no argument 'sofd'. Did you mean 'soft'"),
    ],
)
def test_bad_files_are_refused(mine: Path, content: str | None, text: str, said: str) -> None:
    if content is not None:
        Path("bad.py").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        bench.own_preset(text, ())


def test_an_arena_without_finished_runs_is_refused(arena: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ((f"--arena={mine.parent / 'none'}",), (f"--arena={arena}", "--seeds=0")):
        assert cli.main(["bench", "mine.py", *args]) == 1
    said = capsys.readouterr().err
    assert "contains no comparison" in said and "bench needs finished runs to pair with, and seeds >= 1" in said


def test_a_method_file_is_a_method_of_every_command(mine: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"method": "mine.py:confident(soft=2)", "out": tmp_path / "run", "threads": 1, "quiet": True}
    recipes.run("digits", flags)
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["method"]["soft"] == 2
