"""`tempering audit`: a run's models and data through its recipe, findings beside its records, and in the report."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.audits import Audit
from tempering.audits.privacy import Privacy
from tempering.cli import main as cli
from tempering.experiments.former_names import present_flags
from tempering.experiments.recipe import check_flags, find, flags
from tempering.reports.page import render
from tempering.reports.records import load_run, pack, read_cell, write_cell
from tests.paths import ROOT
from tests.records_made import make_set

RECIPE = '''
"""Striped images, and small nets."""
from functools import partial
from pathlib import Path
import torch
from torch import nn
from tempering.experiments.presets import method_of
from tempering.data.batches import Batches
from tempering.methods import Supervised
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))


def main(*, method: str = "dtkd", shift: int = 0, out: Path = Path("runs/striped"),
         config: TrainConfig = TrainConfig(epochs=2, selfcheck=False)) -> Experiment:
    """Distil.

    Args:
        method: a preset.
        shift: of the labels.
        out: the run's folder.
        config: options of training.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(60, 200, (150, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = (torch.arange(150) + shift) % 3
    for k in range(3):
        images[torch.arange(150) % 3 == k, :, k] += 40
    whole = Batches(images, labels, batch_size=25, mean=(0.5,), std=(0.25,), shuffle=True, crop=1)
    train, test = whole.split(60)
    method = method_of(method)

    def teach(teacher):
        return Experiment(student=teacher, train=train, test=test, method=Supervised(), config=config)

    teacher = TeacherRecipe(name="striped", build=partial(net, 16, 0), train=teach, folder=out.parent / "teachers")
    return Experiment(student=net(4, 1), teacher=teacher if method.needs_teacher else None, train=train, test=test,
                      method=method, config=config, out=out)
'''
QUICK = ("--samples=20", "--quiet")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a run of it."""
    root = tmp_path_factory.mktemp("audits")
    (root / "striped.py").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tempering", "run", str(root / "striped.py"), "--quiet"])
        assert run("run", root / "striped.py", "--quiet", "--out", root / "runs" / "a") == 0
    return root / "striped.py", root / "runs" / "a"


def run(*args: object) -> int:
    return cli.main([str(a) for a in args])


def audits(place: Path) -> dict[str, Any]:
    return json.loads(place.read_text())["audits"]


def test_a_run_is_audited_by_its_own_command(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert run("audit", folder, "--calibration", "--explanation", "--samples", "30") == 0
    said = capsys.readouterr().out
    assert "temperature" in said and "findings, and the meaning of each: " in said
    found = audits(folder / "audits.json")
    assert list(found) == ["calibration", "explanation"]
    assert "It was distilled with" in json.dumps(found["calibration"]) and found["calibration"]["commit"] is not None
    assert "host" not in found["calibration"]
    said = json.dumps(found["explanation"])
    assert "Sharpness(tau=4, solve=exact, reach=0.9, differentiable=False), used in training" in said
    assert (
        found["explanation"]["settings"]["policy"] == "Sharpness" and "_drawn" not in found["explanation"]["settings"]
    )
    if importlib.util.find_spec("jinja2") is not None:
        page = render([load_run(folder)])
        for title in ("Reliability before scaling", "After the fitted temperature", "Temperature by the student"):
            assert title in page
    assert before == {p: (folder / p).read_bytes() for p in before}, "records are left alone"


def test_the_policy_that_is_looked_at(made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = made
    outs = {}
    for name, method in (("constant", "kd"), ("learned", "kd(temperature=curriculum(form=instance))")):
        outs[name] = folder.parent / name
        with pytest.MonkeyPatch.context() as patch:
            command = ["run", str(recipe), "--quiet", f"--method={method}", f"--out={outs[name]}"]
            patch.setattr("sys.argv", ["tempering", *command])
            assert run(*command) == 0
        assert run("audit", outs[name], "--explanation", *QUICK) == 0
    said = {name: json.dumps(audits(out / "audits.json")["explanation"]) for name, out in outs.items()}
    assert "Sharpness(tau=4" in said["constant"] and "not used in training" in said["constant"]
    assert "Curriculum(" in said["learned"] and ", used in training" in said["learned"]
    # what it had learned went with its checkpoints
    shutil.rmtree(outs["learned"] / "checkpoints")
    assert run("audit", outs["learned"], "--explanation", "--overwrite", *QUICK) == 0
    assert "not used in training" in (outs["learned"] / "audits.json").read_text()


def test_an_interrupted_audit_begins_again_and_a_finished_one_is_kept(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = made
    (folder / "audits.json").unlink(missing_ok=True)
    whole, ran = Audit.__call__, []

    def stops(self: Audit, *args: Any) -> Any:
        ran.append(type(self).__name__)
        if isinstance(self, Privacy) and ran.count("Privacy") == 1:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Audit, "__call__", stops)
    both = ("audit", folder, "--calibration", "--privacy", *QUICK)
    assert run(*both) == 130 and "interrupted" in capsys.readouterr().err
    first = (folder / "audits.json").read_text()
    assert list(audits(folder / "audits.json")) == ["calibration"] and not list(folder.glob("*.partial"))
    assert run(*both) == 0
    assert ran == ["Calibration", "Privacy", "Privacy"]
    assert audits(folder / "audits.json")["calibration"] == json.loads(first)["audits"]["calibration"]
    assert run(*both) == 0 and len(ran) == 3  # nothing is left to do
    assert run(*both, "--seed=1") == 0 and len(ran) == 5
    assert run(*both, "--seed=1", "--overwrite") == 0 and len(ran) == 7
    # other data: what was found is void
    assert run("audit", folder, "--privacy", *QUICK, "--", "--shift", "1") == 0
    assert list(audits(folder / "audits.json")) == ["privacy"]


def test_everything_of_weights_and_of_checkpoints(made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = made
    alone = tmp_path / "student.safetensors"
    alone.write_bytes((folder / "student.safetensors").read_bytes())
    behind = ("--", "--method", "dtkd", "--out", folder)
    assert run("audit", alone, "--recipe", recipe, *QUICK, "--shadows=4", "--eps=0.05", *behind) == 0
    found = audits(tmp_path / "student.audits.json")
    assert sorted(found) == ["calibration", "explanation", "privacy", "robustness"]
    numbers = {f"{f['of']}/{f['name']}" for part in found.values() for f in part["findings"]}
    assert {"student/pgd", "teacher/pgd", "both/inherited", "student/lira_auc", "both/gradient_cosine"} <= numbers
    assert {"student/certified_0", "student/corrupted", "student/check_black_box", "teacher/temperature"} <= numbers
    (checkpoint, *_) = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    assert run("audit", checkpoint, "--calibration", *QUICK) == 0
    own = audits(checkpoint.with_name(f"{checkpoint.name}.audits.json"))["calibration"]
    same = found["calibration"]["findings"]
    drop = [{k: v for k, v in f.items() if k != "meaning"} for f in own["findings"]]
    assert drop == [{k: v for k, v in f.items() if k != "meaning"} for f in same]  # the last checkpoint is the end


def test_what_cannot_be_audited_says_what_to_type(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = made
    weights = folder / "student.safetensors"
    lost = tmp_path / "runs" / "b"
    lost.mkdir(parents=True)
    (lost / "facts.json").write_text("{}")
    cases = {
        "has no student.safetensors: it is not finished": (lost,),
        "Give a run's folder, a .safetensors file or a checkpoint's folder": (tmp_path / "none",),
        "neither a run (facts.json) nor a checkpoint (state.json)": (tmp_path,),
        "the run has no validation split; it has train, test": (folder, "--split=validation"),
        "--explanation compares a student with its teacher, and this run has none": (
            folder,
            "--explanation",
            "--",
            "--method=supervised",
        ),
        "would train its teacher first": (weights, "--recipe", recipe, "--", "--out", tmp_path / "elsewhere" / "c"),
    }
    for said, args in cases.items():
        assert run("audit", *args) == 1
        assert said in capsys.readouterr().err.replace("\n", " "), said
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert run("audit", copy) == 1 and "--recipe digits -- --method dtkd" in capsys.readouterr().err
    copy.write_bytes(b"\0" * 20)
    assert run("audit", copy, "--recipe", recipe, "--", "--out", folder) == 1
    assert "not a valid safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere" / "c").exists() and not torch.is_inference_mode_enabled()


def test_a_recorded_command_with_former_names_is_understood(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without a folder recipes/
    commands = {}
    for folder in sorted((ROOT / "benchmarks" / "results").rglob("records")):
        facts = read_cell(min(folder.glob("*.json"))).facts
        commands[folder.parent.name] = facts["command"]
        recipe = find(facts["command"][2])
        check_flags(recipe, present_flags(facts["command"][3:], flags(recipe)))
    assert {"recipes/swing.py", "recipes/language.py", "cifar100.py"} <= {command[2] for command in commands.values()}
    installed = "/opt/other/site-packages/tempering/recipes/digits.py"
    assert find(installed) == find("recipes/digits.py") == find("digits")
    with pytest.raises(FileNotFoundError, match="no recipe mine/digits"):
        find("mine/digits.py")
    words = ["--keep", "8", "--no-grade", "--temperature", "isolated(tau=4)", "--method=dkd(rest=2)", "--label=rest"]
    known = {"keep", "eval_generation", "temperature", "method", "label"}
    assert present_flags(words, known) == [
        *("--keep", "8", "--no-eval-generation", "--temperature", "ablated(tau=4)"),
        *("--method=dkd(non_target=2)", "--label=rest"),
    ]
    words = ["--method=interactive(held=5, course_lr=1, temperature=energy(sure=6))"]
    assert present_flags(words, known) == [
        "--method=interactive(holdout=5, virtual_lr=1, temperature=energy(low_energy=6))"
    ]
    words = ["--method=pkd(over=image)", "--temperature=scheduled(energy(sure=2), end=1, over=0.5)"]
    assert present_flags(words, known) == [
        "--method=pkd(standardize_over=image)",
        "--temperature=scheduled(energy(low_energy=2), end=1, run_fraction=0.5)",
    ]
    words = ['--method=sum(pkd(over="batch"), kd(temperature=curriculum(over=1, attached=True)))']
    assert present_flags(words, known) == [
        '--method=sum(pkd(standardize_over="batch"), kd(temperature=curriculum(run_fraction=1, differentiable=True)))'
    ]
    recipe, folder = made
    cases = {
        0: ["run", str(recipe), "--method=kd(temperature=standardised(4))", "--out", str(folder)],
        1: commands["detection-shapes"][1:],  # its recipe is found, its teacher is not here
    }
    for code, command in cases.items():
        shutil.copytree(folder, run_dir := tmp_path / str(code) / "run")
        (run_dir / "facts.json").write_text(json.dumps({"command": ["cli.py", *command]}))
        flags_here = ["--", "--out", folder] if code == 0 else []
        assert run("audit", run_dir, "--calibration", *QUICK, *flags_here) == code
    assert "the recipe detection.py would train its teacher first" in capsys.readouterr().err.replace("\n", " ")


def test_the_report_shows_findings_and_packs_them(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    folders = make_set(tmp_path, classes=10)
    runs = [load_run(f) for f in folders]
    assert 'id="audits"' not in render(runs)
    finding = {"name": "ece_tempered", "of": "student", "value": 0.0123, "low": 0.01, "high": 0.02, "n": 50}
    finding |= {"share": True, "meaning": "A <b>number</b>."}
    content = {"format": 1, "of": {}, "audits": {"calibration": {"findings": [finding, finding | {"value": None}]}}}
    (folders[0] / "audits.json").write_text(json.dumps(content))
    audited = load_run(folders[0])
    page = render([audited, *runs[1:]]).replace("\u00a0", " ")
    assert 'id="audits"' in page and "ece tempered" in page and "1.2 %" in page and "1.0 to 2.0 %" in page
    assert "A &lt;b&gt;number&lt;/b&gt;." in page
    cell = write_cell(tmp_path / "cell.json", pack(folders[0]))
    assert read_cell(cell).audits == content and "audits" not in pack(folders[1])
    content["audits"]["calibration"]["findings"][0] = {"name": "ece"}
    (folders[0] / "audits.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"audits.audits.calibration.findings\[0\].of must be a text"):
        load_run(folders[0])
