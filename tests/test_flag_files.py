"""Flags from a file: a run's facts.json, or YAML or JSON."""

from __future__ import annotations

import json
from itertools import pairwise
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
    "nested": (
        {"recipe": "RECIPE", "config": {"epochs": 3}},
        "config needs a value or a list of values; got {'epochs': 3}",
    ),
    "a list": ([1], "must hold flags and their values"),
    "a script": ({"command": ["mine.py"], "versions": {}}, "was started by mine.py, not by tempering run RECIPE"),
    "a secret": (
        {"command": ["tempering", "run", "RECIPE", "--method", "***"], "versions": {}},
        "does not hold the value of --method, a secret",
    ),
}


BOMB = "a: &a x\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
HOSTILE = {
    "an object": (
        "a.yaml",
        "method: !!python/object/apply:os.system ['touch made']",
        "could not determine a constructor",
    ),
    "a bomb": ("a.yaml", BOMB, "c needs a value or a list of values; got [["),
    "a cycle": ("a.yaml", "skip_checks: &a [*a]", "skip_checks needs a value or a list of values; got [[[["),
    "a map of itself": ("a.yaml", "&a\nmethod: *a", "method needs a value or a list of values; got {"),
    "a flag as a value": ("a.json", '{"method": "--out=x"}', "method is '--out=x', which looks like a flag"),
    "a flag in a list": ("a.json", '{"skip_checks": ["scores", "--out"]}', "looks like a flag"),
    "twice": ("a.json", '{"seed": 1, "seed": 2}', "seed is given twice"),
    "twice, spelled apart": ("a.yaml", "log-every: 1\nlog_every: 2", "log_every is given twice"),
    "true for text": ("a.yaml", "method: no", "method takes no true or false. Write text in quotes"),
    "deep": ("a.json", '{"a":' * 100_000, "cannot be read: "),
    "no list": ("a.json", '{"command": "tempering run digits", "versions": {}}', "is no list of words"),
    "no words": ("a.json", '{"command": ["tempering", "run", 3], "versions": {}}', "is no list of words"),
    "two documents": ("a.yaml", "seed: 1\n---\nseed: 2", "cannot be read: "),
    "nothing": ("a.yaml", "", 'must hold flags and their values, such as {"epochs": 3}; got None'),
    "other bytes": ("a.json", "\udcff", "cannot be read: "),
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


@each(("name", "text", "said"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused_and_nothing_is_executed(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        flags_from(Path(name), "digits", ())
    assert said in str(caught.value) and name in str(caught.value) and len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_value_of_another_type_ends_before_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"recipe": str(recipe), "epochs": "many"}))
    with pytest.raises(SystemExit) as caught:
        main(["run", "--from", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and "many" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
