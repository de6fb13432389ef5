"""The command line and the recipes: what they explain, what they refuse, and what a run leaves behind."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tempering import __version__
from tempering.cli import main as cli
from tempering.experiments import recipe as recipe_file
from tempering.experiments.presets import PRESETS
from tempering.methods import METHODS
from tempering.temperature import POLICIES
from tempering.training.config import TrainConfig
from tempering.training.pretrained import train_or_load
from tempering.training.schedules import cifar_decay, cifar_lr
from tests import recipes
from tests.paths import ROOT, SHARED, needs_shared
from tests.records_made import RECORDED as MADE
from tests.records_made import make_run, make_set
from tests.test_cifar import write_packed

RECIPES = sorted(p for p in (ROOT / "tempering" / "recipes").glob("*.py") if p.stem not in ("__init__", "nano"))

TINY = '''
"""A linear student on random rows."""
from pathlib import Path
import torch
from torch import nn
from tempering.experiments.presets import method_of
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment


def main(*, method: str = "kd", flip: bool = False, out: Path | None = None,
         config: TrainConfig = TrainConfig(epochs=1)) -> Experiment:
    """Distil a linear student.

    Args:
        method: a preset, or a method with its arguments.
        flip: turn the teacher's classes round, so that it knows nothing.
        out: the run's folder.
        config: options of training.
    """
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    teacher, student = nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
    with torch.no_grad():
        teacher.weight.copy_(torch.cat((6 * torch.eye(3), torch.zeros(3, 3)), 1))
    batches = [(part, part[:, :3].argmax(1)) for part in x.split(32)]
    if flip:
        batches = [(part, (y + 1) % 3) for part, y in batches]
    return Experiment(student=student, teacher=teacher, train=batches, test=batches, method=method_of(method),
                      config=config, out=out)
'''
OLD = '''
"""A recipe that trains in its main()."""
from pathlib import Path
import torch
from torch import nn
import tempering as kd


def main(*, epochs: int = 1, out: Path | None = None, quiet: bool = False){annotation}:
    """Train."""
    Path("began").touch()
    batches = [(torch.eye(3), torch.arange(3))]
    return kd.distill(nn.Linear(3, 3), None, batches, method=kd.methods.Supervised(), epochs=epochs, out=out,
                      test=batches, quiet=quiet, selfcheck=False)
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def run(*args: object) -> int:
    return cli.main([str(a) for a in args])


def exits(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return int(caught.value.code or 0)


def words(text: str) -> str:
    """A help text without its frames and line breaks."""
    return " ".join(text.replace("│", " ").split())


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from tempering.cli import main as cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "numpy", "lightning_fabric", "scipy", "jinja2", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    for args in (["--help"], ["compare", "--help"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "usage: tempering" in done.stdout


def test_the_package_is_the_command_and_says_its_version() -> None:
    call = [sys.executable, "-m", "tempering", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"tempering {__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(command, "--help") == 0
    said = words(capsys.readouterr().out)
    assert (cli.load_command(command).__doc__ or "").split(".")[0].split(":")[0] in said


def test_a_mistyped_command_or_flag_names_the_nearest(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("comparee") == 2
    assert "compare" in words(capsys.readouterr().err)
    assert exits("run", tiny, "--epoch", 1) == 2
    said = words(capsys.readouterr().err)
    assert "Unrecognized options: --epoch" in said
    assert "Perhaps you meant: --epochs {None}|INT Number of epochs." in said
    assert exits("run", tiny, "--epochs=many") == 2
    assert "many" in capsys.readouterr().err


# recipes


def test_a_recipe_explains_its_flags_and_runs(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("run", tiny, "--help") == 0
    said = words(capsys.readouterr().out)
    assert "turn the teacher's classes round, so that it knows nothing." in said
    assert run("run", tiny, "--method", "kd(soft=0.5, temperature=static(2))", "--quiet", "--out", tmp_path / "r") == 0
    assert "KD, seed 0: test " in capsys.readouterr().out
    facts = json.loads((tmp_path / "r" / "facts.json").read_text())
    assert facts["status"] == "done"
    assert facts["method"]["temperature"] == {"name": "Static", "tau": 2}


def test_a_recipe_that_is_not_there_names_the_near_ones(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", tiny.with_name("tyni.py")) == 1
    assert f"there is no recipe {tiny.with_name('tyni.py')}. Did you mean {tiny}?" in capsys.readouterr().err
    assert run("run", "cifar10") == 1
    assert "Did you mean cifar100" in capsys.readouterr().err
    assert recipe_file.find("digits") == ROOT / "tempering" / "recipes" / "digits.py"
    tiny.write_text("x = 1\n")
    assert run("check", tiny) == 1
    assert f"{tiny} is no recipe: it has no function main." in capsys.readouterr().err
    tiny.write_text("def main(:\n")
    assert run("run", tiny) == 1
    assert f"{tiny} is not Python" in capsys.readouterr().err
    tiny.write_text("def main(*, seed: int = 0, config: TrainConfig = TrainConfig()):\n    pass\n")
    assert run("check", tiny) == 1
    assert "main() has an argument seed, and so has its TrainConfig" in capsys.readouterr().err


def test_errors_that_say_what_to_do_come_without_a_traceback(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", tiny, "--method=dkdd", "--quiet") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no method is called 'dkdd'. Did you mean 'dkd'?")
    assert said.endswith("(--traceback shows where)\n") and "Traceback" not in said
    assert run("run", tiny, "--flip", "--quiet") == 1
    assert "error: the teacher is right on " in capsys.readouterr().err
    with pytest.raises(ValueError, match="dkdd"):
        run("run", tiny, "--method=dkdd", "--traceback")
    monkeypatch.setenv("TEMPERING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="dkdd"):
        run("run", tiny, "--method=dkdd")


def test_faults_of_the_program_keep_their_traceback(tiny: Path) -> None:
    tiny.write_text("def main(*, x: int = 1) -> None:\n    raise RuntimeError('a bug')\n")
    with pytest.raises(RuntimeError, match="a bug"):
        run("run", tiny)


def test_check_looks_and_trains_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", tiny, "--method", "dtkd") == 0
    said = capsys.readouterr().out
    assert said.startswith("self-check ok: teacher frozen, in eval, deterministic, above chance, zero at agreement")
    assert run("check", tiny, "--flip") == 1
    assert "error: the teacher is right on " in capsys.readouterr().err
    tiny.write_text("def main(*, x: int = 1) -> None: ...\n")
    assert run("check", tiny) == 1
    assert f"main() of recipe {tiny} returned None; return an Experiment" in capsys.readouterr().err


def test_check_is_not_broken_by_a_recipe_that_catches_exceptions(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("    return Experiment(", "    try:\n      return Experiment(")
    tiny.write_text(text + "    except Exception:\n        return None\n")
    assert run("check", tiny) == 0
    assert capsys.readouterr().out.startswith("self-check ok: ")
    assert run("run", tiny, "--quiet") == 0 and "KD, seed 0: test " in capsys.readouterr().out


@pytest.mark.parametrize("annotation", [" -> kd.Run", ""])
def test_a_recipe_that_returns_a_run_runs_and_says_what_the_others_need(
    annotation: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_text(OLD.format(annotation=annotation))
    assert run("run", tiny, "--quiet") == 0 and "Supervised, seed 0: test " in capsys.readouterr().out
    Path("began").unlink()
    for command in (("check", tiny), ("audit", tmp_path / "x.safetensors", "--recipe", tiny)):
        (tmp_path / "x.safetensors").touch()
        assert run(*command) == 1
        said = capsys.readouterr().err
        assert f"main() of recipe {tiny} returned Run; return an Experiment" in said and "e.g." in said
        assert Path("began").exists() == (not annotation), "an annotated one is not even begun"


REFUSED = ("--views", "strong", "--method", "fitnet")  # two blocks of rows, and features of one


def test_check_refuses_what_the_run_refuses_whether_the_teacher_is_trained_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_packed(data)
    args = ("cifar100", "--data", data, "--teacher", "resnet8", "--student", "resnet8", "--epochs", 1, "--subset", 1000)
    args = (*args, "--test-subset", 100, "--threads", 1)

    def check(teachers: str, *flags: object, code: int) -> str:
        out = tmp_path / "runs" / "x"
        assert run("check", *args, *flags, "--out", out, "--teacher-dir", tmp_path / teachers) == code
        assert not (tmp_path / teachers).exists() or teachers == "there", "nothing is written"
        assert not out.exists()
        caught = capsys.readouterr()
        return caught.err if code else caught.out

    made = ("--quiet", "--no-selfcheck", "--subset", 100, "--teacher-subset", 1000)  # a teacher of noise knows nothing
    assert run("run", *args, *made, "--teacher-dir", tmp_path / "there", "--out", tmp_path / "a") == 0
    capsys.readouterr()
    wrong = check("new", *REFUSED, code=1)
    assert wrong.startswith("error: --views strong makes two blocks of rows, and features are tapped for one")
    assert wrong == check("there", *REFUSED, code=1)
    # what a cache cannot do is said before it is recorded, in the words of the run
    cached = ("--teacher-cache", 0)
    wrong = check("new", *cached, "--method", "fitnet", code=1)
    assert "features, but Cached has none" in wrong or "Give the live model: teachers.Live(model)" in wrong
    assert wrong == check("there", *cached, "--method", "fitnet", code=1)
    ok = check("new", *cached, "--method", "dkd", code=0)
    assert "not checked: above chance (the teacher is not trained yet)" in ok
    assert "training of the teacher resnet8" in ok.partition("; not checked")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_flag_of_the_recipes_is_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    said = ast.get_docstring(main) or ""
    assert recipe_file.flags(path) > recipe_file.TRAINING, "every recipe has every flag of training"
    for name in recipe_file.flags(path) - recipe_file.TRAINING:
        assert f"\n    {name}: " in said, f"--{name} is not explained"
    assert "Command: " in (ast.get_docstring(tree) or "")


def test_the_flags_of_training_are_explained_by_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert exits("run", "digits", "--help") == 0
    said = words(capsys.readouterr().out)
    tree = ast.parse(Path(sys.modules[TrainConfig.__module__].__file__ or "").read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainConfig").body
    for field in dataclasses.fields(TrainConfig):
        at = next(i for i, n in enumerate(body) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == field.name)
        help_text = ast.literal_eval(body[at + 1].value)  # pyright: ignore[reportAttributeAccessIssue]
        assert f"--{field.name.replace('_', '-')}" in said and help_text in said


def test_a_flag_of_training_changes_its_option_alone() -> None:
    pytest.importorskip("sklearn")
    made = recipes.describe("digits", {"epochs": 3, "max_grad_norm": 2.0, "method": "kd"})
    assert made.config == TrainConfig(epochs=3, max_grad_norm=2.0, log_every=10)
    assert recipe_file.describe(RECIPES[2], ["--compile", "--epochs", "3"], prog="x").config.compile is True
    given = ["--compile", "reduce-overhead", "--devices", "auto", "--steps=7"]
    config = recipe_file.describe(RECIPES[2], given, prog="x").config
    assert (config.compile, config.devices, config.steps) == ("reduce-overhead", "auto", 7)


def test_digits_from_the_teacher_to_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    args = ("run", "digits", "--epochs=1", "--teacher-epochs=1", "--subset=200", "--threads=1", "--quiet")
    assert run("check", *args[1:], "--out", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "not checked: above chance (the teacher is not trained yet)" in said
    assert "training of the teacher digits_large" in said and not (tmp_path / "teachers").exists()
    assert run(*args, "--out", tmp_path / "a", "--method", "dtkd-published") == 0
    assert "DTKD published, seed 0: validation " in capsys.readouterr().out
    (teacher,) = (p for p in (tmp_path / "teachers").iterdir() if p.is_dir())
    before = (teacher / "facts.json").stat().st_mtime_ns
    assert run(*args, "--out", tmp_path / "b", "--method=supervised", "--seed=1", "--label=alone") == 0
    assert run(*args, "--out", tmp_path / "c", "--temperature=static(2)") == 0
    assert (teacher / "facts.json").stat().st_mtime_ns == before, "the teacher is trained once"
    a, b, c = (json.loads((tmp_path / name / "facts.json").read_text()) for name in "abc")
    assert a["teacher"]["scores"]["test"]["accuracy"] > 0.2
    assert a["teacher"]["name"] == "digits_large" and a["teacher"]["identity"] == c["teacher"]["identity"]
    assert (a["data"]["name"], a["data"]["train"], a["data"]["classes"]) == ("digits", 200, 10)
    assert (a["student"]["name"], b["teacher"], b["label"], b["seed"]) == ("digits_small", None, "alone", 1)
    assert (c["label"], c["method"]["temperature"]["name"]) == ("dtkd @ static(2)", "Static")
    assert run("check", *args[1:], "--out", tmp_path / "a") == 0
    assert "self-check ok: teacher frozen" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "facts.json").read_text()) == a, "a check leaves the record alone"


@needs_shared
def test_cifar100_with_the_fields_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    data = SHARED / "data" / "cifar100"
    args = (
        *("run", "cifar100", "--data", data, "--teacher=resnet8", "--student=resnet8", "--subset=192"),
        *(
            "--test-subset=100",
            "--validation=64",
            "--teacher-epochs=1",
            "--threads=1",
            "--quiet",
            "--method=dkd",
            "--no-selfcheck",
        ),
    )
    assert run(*args, "--epochs=8", "--out", tmp_path / "a") == 0
    facts = json.loads((tmp_path / "a" / "facts.json").read_text())
    assert (facts["data"]["train"], facts["data"]["validation"], facts["data"]["test"]) == (128, 64, 100)
    assert facts["best_by"] == "validation/accuracy"
    group = facts["optimizer"][0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.05, 0.9, 5e-4, False)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "a" / "epochs.jsonl").read_text().splitlines()]
    wanted = [0.05] * 5 + [0.005] + [0.0005] + [0.00005]  # 150, 180 and 210 of 240 are 5, 6 and 7 of 8
    assert rates == pytest.approx(wanted)
    assert run(*args, "--epochs=8", "--out", tmp_path / "b", "--data=nowhere") == 1
    assert "no CIFAR-100 in nowhere: it is not there." in capsys.readouterr().err


@needs_shared
def test_a_teacher_can_be_given(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    common: dict[str, Any] = {"data": SHARED / "data" / "cifar100", "teacher": "resnet8", "student": "resnet8"}
    common |= {
        "subset": 128,
        "test_subset": 100,
        "epochs": 1,
        "threads": 1,
        "quiet": True,
        "teacher_epochs": 1,
        "selfcheck": False,
    }
    first = recipes.run("cifar100", {"method": "kd", "out": tmp_path / "a"} | common)
    weights = next((tmp_path / "teachers").glob("*/student.safetensors"))
    second = recipes.run("cifar100", {"method": "kd", "out": tmp_path / "b", "teacher_weights": weights} | common)
    assert first.facts["teacher"]["identity"] == second.facts["teacher"]["identity"]
    pairs = zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_slow_nets_get_the_fields_learning_rate() -> None:
    assert [cifar_lr(n) for n in ("resnet8x4", "MobileNetV2", "ShuffleV1", "wrn_40_2")] == [0.05, 0.01, 0.01, 0.05]
    factors = [cifar_decay(epoch / 240) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


# a model trained once


def test_what_is_trained_once_is_keyed_by_what_made_it(tmp_path: Path) -> None:
    begun: list[Path] = []

    def train(model: nn.Module, folder: Path, *, finish: bool = True) -> None:
        from safetensors.torch import save_file

        begun.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not finish:
            raise KeyboardInterrupt
        nn.init.constant_(model.weight, 3.0)  # pyright: ignore[reportArgumentType]
        save_file(model.state_dict(), folder / "student.safetensors")
        result = {"last": {"epoch": 1, "test": {"accuracy": 0.5}}}
        (folder / "facts.json").write_text(json.dumps({"status": "done", "result": result}))

    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(first, "net", tmp_path, lambda f: train(first, f, finish=False), key={"epochs": 1})
    assert train_or_load(first, "net", tmp_path, lambda f: train(first, f), key={"epochs": 1}) == {
        "test": {"accuracy": 0.5}
    }
    train_or_load(second, "net", tmp_path, lambda f: train(second, f), key={"epochs": 1})
    assert begun[0] == begun[1] and len(begun) == 2, "it goes on where it stopped, and is not trained again"
    assert torch.equal(first.weight, second.weight)
    train_or_load(second, "net", tmp_path, lambda f: train(second, f), key={"epochs": 2})
    assert len(set(begun)) == 2


# reports and lists


def test_report_makes_a_page_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path / "runs", seeds=2)
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "runs", "--out", page, "--control=KD", "--title=Of digits") == 0
    said = capsys.readouterr().out
    assert f"report: {page}" in said and "DTKD exact" in said
    assert "<title>Of digits" in page.read_text()
    assert run("report", tmp_path / "nothing") == 1
    assert f"{tmp_path / 'nothing'} does not exist." in capsys.readouterr().err


def test_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    said = capsys.readouterr().out
    for name in (*METHODS, *POLICIES, *PRESETS):
        assert f" {name.lower()} " in said
    assert "resnet8x4" in said and "imagenet" in said.partition("Recipes: ")[2]


def test_demo_shows_five_arms_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []
    labels = {"kd-matched": "KD, weight-matched", "dtkd": "DTKD exact", "dtkd-published": "DTKD published"}

    def main(*, method: str, seed: int, out: Path, threads: int) -> Any:
        ran.append((method, seed))
        label = labels.get(method, PRESETS[method].label)
        make_run(out, label, seed, order=list(MADE).index(label))
        facts = json.loads((out / "facts.json").read_text())
        result = facts["result"]
        return SimpleNamespace(
            run=lambda: SimpleNamespace(facts=facts, folder=out, last=result["last"], best=result["best"])
        )

    monkeypatch.setattr(recipe_file, "load", lambda _: main)
    assert run("demo", "--out", tmp_path, "--seeds=3") == 0
    said = capsys.readouterr().out
    assert len(ran) == 15
    assert f"report: {tmp_path / 'report.html'}" in said
    for label in MADE:
        assert label in said
    assert (tmp_path / "report.html").is_file()
    assert run("demo", "--out", tmp_path) == 0
    assert len(ran) == 15


def test_a_missing_package_says_what_to_type(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = tiny.with_name("text.txt")
    text.write_text("a fox. " * 2000)
    assert run("check", "language", "--text", text) == 1
    assert 'transformers is not installed: pip install "tempering[huggingface]"' in capsys.readouterr().err
    tiny.write_text(TINY.replace("    x = torch", "    import not_a_package_of_ours\n\n    x = torch"))
    assert run("check", tiny) == 1
    assert "No module named 'not_a_package_of_ours'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_outside_of_a_run_ends_the_command_in_words(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    monkeypatch.setitem(cli.COMMANDS, "list", lambda: os.kill(os.getpid(), number))
    assert cli.main(["list"]) == 130 and "interrupted; the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_signal_that_an_import_swallows_still_ends_the_command(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background of a shell
    swallow = """
    import os, signal
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
"""
    tiny.write_text(TINY.replace("    x = torch", f"{swallow}\n    x = torch"))
    assert run("run", tiny, "--quiet", "--out", tmp_path / "r") == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err and not any((tmp_path / "r").glob("*"))
    failing = swallow.replace("pass", 'raise ImportError("cannot load module more than once per process") from None')
    tiny.write_text(TINY.replace("    x = torch", f"{failing}\n    x = torch"))
    assert run("run", tiny, "--quiet", "--out", tmp_path / "r") == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    tiny.write_text(TINY)
    assert run("run", tiny, "--quiet", "--out", tmp_path / "r") == 0


def test_no_error_is_without_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TimeoutError

    monkeypatch.setitem(cli.COMMANDS, "list", fail)
    assert cli.main(["list"]) == 1 and "error: TimeoutError" in capsys.readouterr().err


def test_a_missing_file_is_named_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for words_given in (("--text", "nowhere.txt"), ("--text=nowhere.txt",)):
        assert run("check", "language", *words_given) == 1
        assert "error: No such file or directory: nowhere.txt, given as --text\n" in capsys.readouterr().err
