"""Flags from a file: a run's facts.json, or YAML or JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempering.cli.main import main, split_argv
from tempering.experiments.flag_files import flags_from
from tests.cases import each
from tests.test_cli import TINY

GOOD = {
    "a.json": json.dumps({"recipe": "RECIPE", "method": "kd", "skip-checks": ["scores", "labels"], "quiet": True}),
    "b.yaml": "recipe: RECIPE\nmethod: kd\nskip_checks: [scores, labels]\nquiet: yes\n",
}
BAD = {
    "unknown": ({"recipe": "RECIPE", "epoch": 3}, "takes no --epoch. Did you mean 'epochs'"),
    "no recipe": ({"epochs": 3}, "names no recipe"),
    "nested": ({"recipe": "RECIPE", "config": {"epochs": 3}}, "config needs a value or a list; got {'epochs': 3}"),
    "a list": ([1], "must hold flags and their values"),
    "a script": ({"command": ["mine.py"], "versions": {}}, "was started by mine.py, not by tempering run RECIPE"),
    "a secret": (
        {"command": ["tempering", "run", "RECIPE", "--method", "***"], "versions": {}},
        "does not hold the value of --method, a secret",
    ),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def test_flags_come_from_a_file_and_the_command_line_has_precedence(recipe: Path) -> None:
    pytest.importorskip("yaml")
    for name, text in GOOD.items():
        path = recipe.with_name(name)
        path.write_text(text.replace("RECIPE", str(recipe)))
        words = ("--method", "kd", "--skip-checks", "scores", "labels", "--quiet")
        assert flags_from(path, None, ()) == (recipe, words)
        given = ("--no-quiet", "--method=dkd", "--epochs", "2")
        assert flags_from(path, None, given) == (recipe, (*words[2:5], *given))
        assert flags_from(path, "digits", ())[0].stem == "digits"


@each(("content", "said"), BAD.values(), ids=list(BAD))
def test_a_file_of_flags_that_cannot_be_used_is_refused_by_name(content: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(content).replace("RECIPE", str(tmp_path / "tiny.py")))
    with pytest.raises(ValueError) as caught:
        flags_from(path, None, ())
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_facts_of_a_run_repeat_it(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object) -> None:
        argv = [*map(str, args), "--threads=1", "--quiet"]
        monkeypatch.setattr("sys.argv", ["tempering", *argv])
        torch.manual_seed(0)  # of the recipe's student
        assert main(argv) == 0

    run("run", recipe, "--method=dkd", "--epochs", 2, "--out", tmp_path / "a", "--no-selfcheck")
    run("run", "--from", tmp_path / "a" / "facts.json", "--seed=1", "--out", tmp_path / "b")
    run("run", "--from", tmp_path / "b", "--out", tmp_path / "c")  # of a run that was repeated itself
    first, second, third = (json.loads((tmp_path / x / "facts.json").read_text()) for x in "abc")
    assert first["method"] == third["method"] and first["settings"] | {"seed": 1} == third["settings"]
    assert second["command"][:3] == ["tempering", "run", str(recipe)] and "--from" not in second["command"]
    assert (tmp_path / "b/student.safetensors").read_bytes() == (tmp_path / "c/student.safetensors").read_bytes()


def test_from_may_stand_anywhere_and_is_the_commands_own() -> None:
    wanted = ["run", "digits", "--from", "a.json"], ("--seed", "1")
    assert split_argv(["run", "digits", "--seed=1", "--from=a.json"]) == wanted
    assert split_argv(["run", "--from", "a.json", "digits", "--seed", "1"]) == wanted
    assert split_argv(["run", "--help"]) == (["run", "--help"], ())
