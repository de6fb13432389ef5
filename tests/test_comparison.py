"""Comparisons: cells run once, resume, fail alone, and are shown from their records. Most cells here train nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.cli import main as cli
from tempering.experiments import recipe as recipe_file
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import runner as compare_runner
from tempering.experiments.compare import status as compare_status
from tempering.experiments.former_names import former_spec, present_spec
from tempering.experiments.presets import method_of, presets_from
from tempering.training.checkpoint import list_steps
from tests import recipes
from tests.paths import ROOT, SHARED, needs_shared

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="cells are locked by flock, which is POSIX"),
    pytest.mark.usefixtures("forked_jobs"),
]
Words = tuple[str, ...]

# a recipe that writes what a run writes and imports no torch, so that a cell takes a fraction of a second
FAKE = '''
"""A run that is none."""
import json, os, signal, sys, time
from pathlib import Path
from tempering.utils.files import write_atomic


def main(*, method: str, seed: int = 0, out: Path, label: str = "", temperature: str = "", epochs: int = 2,
         fail: str = "", crash: str = "", wait: str = "", quiet: bool = False) -> None:
    """Write records.

    Args:
        method: the preset.
        fail: the method that fails, as a run does.
        crash: the method that ends before there is a record.
        wait: the method that never ends.
    """
    assert os.environ["OMP_NUM_THREADS"] == "1"
    with open(out.parent / "begun.txt", "a") as begun:
        begun.write(out.name + "\\n")
    if method == crash:
        raise ValueError("this preset was asked to crash")
    out.mkdir(parents=True, exist_ok=True)
    facts = {"format": 1, "status": "running", "label": label, "seed": seed,
             "started": f"2026-03-01T10:00:0{seed}+00:00", "finished": None, "method": {"name": method}, "result": None,
             "settings": {"total_steps": 8 * epochs},
             "student": {"name": "small"}, "data": {"name": "none", "identity": "0"}, "host": {"name": "secret"},
             "command": sys.argv, "best_by": "test/accuracy", "teacher": None, "versions": {}, "optimizer": []}

    def write() -> None:
        write_atomic(out / "facts.json", json.dumps(facts))

    write()
    score = 0.5 + 0.01 * seed + 0.1 * len(method) / (1 + len(method))
    with open(out / "steps.jsonl", "w") as steps:
        for step in range(1, 5):
            steps.write(json.dumps({"step": step, "epoch": 1, "loss": 1.0 / step, "step_ms": 2.0, "terms": {}}) + "\\n")
    if method == wait:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            facts["status"] = "interrupted"
            write()
            raise
    line = {"epoch": epochs, "step": 8 * epochs, "seconds": 1.0, "loss": 0.1, "lr": 0.1, "test": {"accuracy": score}}
    (out / "epochs.jsonl").write_text(json.dumps(line) + "\\n")
    facts |= {"status": "done", "finished": f"2026-03-01T10:01:0{seed}+00:00"}
    if method == fail:
        facts |= {"status": "failed", "error": "FloatingPointError: the loss is nan at step 3"}
    else:
        last = {"epoch": epochs, "test": {"accuracy": score}}
        facts["result"] = {"last": last, "best": last, "step_ms": 2.0, "seconds": 1.0, "steps": 8 * epochs}
    write()
    if method == fail:
        sys.exit(1)
'''


def compare(recipe: Path, out: Path, *args: str, flags: tuple[str, ...] = ()) -> int:
    own = ("--methods=kd,dkd", "--seeds=2", "--no-controls", "--jobs=2", f"--out={out}", "--quiet", *args)
    return cli.main(["compare", str(recipe), *own, "--", *flags])


def begun(out: Path) -> list[str]:
    path = out / "work" / "begun.txt"
    return sorted(path.read_text().split()) if path.is_file() else []


def cell_of(out: Path, label: str, seed: int = 0) -> Path:
    plan = compare_plan.read(out)
    return compare_plan.record_of(out, next(c for c in plan.cells if (c.label, c.seed) == (label, seed)))


def test_a_grid_runs_and_its_records_are_small_and_clean(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    assert compare(fake, out) == 0
    assert len(begun(out)) == 4
    records = sorted((out / "records").iterdir())
    assert [r.name.rpartition("-")[0] for r in records] == ["dkd-s0", "dkd-s1", "kd-s0", "kd-s1"]
    for record in records:
        text = record.read_text()
        assert len(text) < 5000
        assert "secret" not in text and str(tmp_path) not in text
    assert (out / "work" / ".gitignore").read_text() == "*\n"
    table = (out / "table.md").read_text()
    assert "| KD | 2 | 57.17 ± 0.71 |" in table
    assert (out / "report.html").stat().st_size > 10_000


def test_a_grid_goes_seed_by_seed(fake: Path, tmp_path: Path) -> None:
    compare(fake, tmp_path, "--jobs=1")
    order = (tmp_path / "work" / "begun.txt").read_text().split()
    assert [name.rpartition("-")[0] for name in order] == ["kd-s0", "dkd-s0", "kd-s1", "dkd-s1"]


def test_a_finished_cell_never_runs_again_and_a_grid_can_grow(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    compare(fake, out, "--seeds=1")
    before = begun(out)
    compare(fake, out, "--seeds=1")
    assert begun(out) == before
    compare(fake, out, "--methods=kd", "--seeds=2")
    assert len(begun(out)) == len(before) + 1
    assert len(compare_plan.read(out).cells) == 3


def test_a_grid_that_is_started_again_keeps_its_teachers(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    compare(fake, out, "--seeds=1")
    weights = out / "work" / "teachers" / "resnet14-0123456789" / "student.safetensors"  # where recipes keep them
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"hours")
    (verdict := out / "work" / "verdicts" / "0.json").parent.mkdir(exist_ok=True)
    verdict.write_text("{}")
    compare(fake, out, "--seeds=2")
    assert weights.read_bytes() == b"hours" and not verdict.exists()


def test_a_run_that_ended_without_its_record_is_packed_and_not_run_again(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    compare(fake, out)
    record = cell_of(out, "KD")
    text = record.read_text()
    record.unlink()
    before = begun(out)
    assert compare(fake, out) == 0
    assert (record.read_text(), begun(out)) == (text, before)


def test_table_and_page_come_from_the_records_alone_byte_for_byte(fake: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    compare(fake, out)
    made = [(out / name).read_bytes() for name in ("table.md", "report.html")]
    for name in ("table.md", "report.html"):
        (out / name).unlink()
    subprocess.run(["rm", "-r", str(out / "work")], check=True)
    assert cli.main(["compare", "report", str(out)]) == 0
    assert [(out / name).read_bytes() for name in ("table.md", "report.html")] == made


def test_an_edited_record_is_refused(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    compare(fake, out)
    record = cell_of(out, "KD")
    record.write_text(record.read_text().replace('"accuracy":0.5', '"accuracy":0.9'))
    for command in ("report", "status"):
        assert cli.main(["compare", command, str(out)]) == 1
        assert f"{record} was edited: its content has sha256" in capsys.readouterr().err
    before = begun(out)
    assert compare(fake, out, "--seeds=3") == 1
    assert begun(out) == before, "nothing runs beside a record that cannot be trusted"


def test_a_failed_cell_is_shown_and_stops_no_other(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert compare(fake, out, "--methods=kd,dkd,nkd", "--seeds=1", flags=("--fail=kd", "--crash", "dkd")) == 1
    said = capsys.readouterr().out
    assert "KD, seed 0: failed: FloatingPointError: the loss is nan at step 3" in said
    assert "DKD, seed 0: failed: exit code 1: " in said and "log.txt" in said
    assert cell_of(out, "nkd").is_file() and not cell_of(out, "KD").is_file()
    assert "this preset was asked to crash" in (out / "work" / cell_of(out, "DKD").stem / "log.txt").read_text()
    table = (out / "table.md").read_text()
    assert "| KD | 0 of 1; failed: 0 |" in table
    assert "| DKD | 0 of 1; open: 0 |" in table
    cli.main(["compare", "status", str(out)])
    assert "3 runs: 1 done, 1 failed, 1 open" in capsys.readouterr().out

    plan = compare_plan.read(out)  # the same grid, mended
    mended = tmp_path / "mended" / "fake.py"
    mended.parent.mkdir()
    mended.write_text(FAKE.replace("if method == fail", "if False").replace("if method == crash", "if False"))
    again = compare_runner.ComparisonRunner(out, plan, mended, ["--fail=kd", "--crash=dkd"], jobs=2, quiet=True)
    assert again.run() == 0
    assert not list((out / "records").glob("*.failed.json"))


def test_open_cells_are_shown_as_open_and_status_says_so(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    compare(fake, out, "--seeds=1")
    presets = presets_from("kd,dkd,dtkd")
    plan = compare_plan.plan_for(fake, presets, range(2), [])
    compare_plan.write(out, plan)
    compare_status.render(out, plan)
    table = (out / "table.md").read_text()
    assert "# fake: 2 of 6 runs" in table
    assert "| KD | 1 of 2; open: 1 |" in table
    assert "| DTKD exact | 0 of 2; open: 0, 1 |" in table
    assert "DTKD exact" in (out / "report.html").read_text()
    cli.main(["compare", "status", str(out)])
    said = capsys.readouterr().out
    assert "6 runs: 2 done, 4 open; 1 at once: about 4 min left, until" in said
    assert "test 57.17" not in said.partition("DTKD exact")[2]


def test_what_runs_is_seen_from_outside_and_a_stop_reaches_it(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    args = ["compare", str(fake), "--methods=kd,dkd", "--seeds=1", "--no-controls", "--quiet", f"--out={out}"]
    args += ["--", "--wait=kd"]
    process = subprocess.Popen([sys.executable, "-m", "tempering", *args], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        _until(lambda: out.is_dir() and any((out / "work").glob("*/steps.jsonl")))
        cli.main(["compare", "status", str(out)])
        said = capsys.readouterr().out
        assert "2 runs: 1 running, 1 open" in said
        assert " 25 %" in said

        # a second comparison does not take the cell that the first one runs: it does the rest, then waits
        plan = compare_plan.read(out)
        second = compare_runner.ComparisonRunner(out, plan, fake, ["--wait=kd"], quiet=True)
        second._set_up()
        with compare_status.Display(out, plan, quiet=True) as second.display:
            _until(lambda: second._poll() and cell_of(out, "DKD").is_file())
            assert second._poll()
        assert second.running == []
        assert len(begun(out)) == 2
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130
    assert "stopped by SIGTERM; the same command resumes: 1 run left" in said
    place = out / "work" / cell_of(out, "KD").stem
    assert json.loads((place / "facts.json").read_text())["status"] == "interrupted"
    assert not compare_status.is_running(place)


LAUNCHER = """
import subprocess, sys
from pathlib import Path
from tempering.utils.files import inheritable_descriptors, try_lock
lock = try_lock(Path(sys.argv[1]))
child = subprocess.Popen(
    [sys.executable, "-c", "print('ready', flush=True); input()"], pass_fds=inheritable_descriptors(lock)
)
child.wait()
"""


def test_a_lock_outlives_its_comparison_with_the_cell(tmp_path: Path) -> None:
    """A comparison that is killed leaves its cells running; nobody may start them a second time."""
    place = tmp_path / "work" / "cell"
    path = compare_plan.lock_path(place)
    command = [sys.executable, "-c", LAUNCHER, str(path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.wait()
    assert compare_runner.try_lock(path) is None and compare_status.is_running(place)
    parent.stdin.write(b"\n")  # ends the child, which inherited the pipe
    parent.stdin.close()
    with parent.stdout:
        assert parent.stdout.read() == b""
    _until(lambda: not compare_status.is_running(place))
    lock = compare_runner.try_lock(path)
    assert lock is not None
    lock.release()


def test_what_is_left_is_told_from_what_was_seen() -> None:
    cell = compare_plan.Cell("a", "KD", "kd", None, 0)
    stand = compare_status.CellStatus
    assert compare_status.remaining([stand(cell, "open")], 1) is None
    assert compare_status.remaining([stand(cell, "done", 2, 8, 8, 100.0)], 1) == 0.0
    found = [stand(cell, "done", 2, 8, 8, 100.0), stand(cell, "running", 1, 6, 8, 120.0), stand(cell, "open")]
    assert compare_status.remaining(found, 1) == 30.0 + 110.0
    assert compare_status.remaining(found, 2) == 110.0, "not before the longest cell ends"


# what a cell is


def test_a_cell_is_made_by_what_it_trains_not_by_where(fake: Path, tmp_path: Path) -> None:
    def ids(*flags: str, recipe: Path = fake) -> list[str]:
        return [c.id for c in compare_plan.plan_for(recipe, presets_from("kd,dtkd"), range(2), flags).cells]

    (tmp_path / "a" / "data").mkdir(parents=True)
    (tmp_path / "b" / "data").mkdir(parents=True)
    first = ids("--epochs", "6", f"--data={tmp_path / 'a' / 'data'}", "--threads=1")
    assert len(set(first)) == 4
    assert first == ids(f"--data={tmp_path / 'b' / 'data'}", "--epochs=6", "--teacher-dir", str(tmp_path))
    assert first[0] != ids("--epochs=7", f"--data={tmp_path / 'a' / 'data'}")[0]
    assert first[0] != ids("--epochs=6", "--data=elsewhere")[0]
    hot = compare_plan.plan_for(fake, presets_from("kd", "static(2)"), range(1), []).cells[0]
    assert hot.id != compare_plan.plan_for(fake, presets_from("kd"), range(1), []).cells[0].id
    assert str(tmp_path) not in json.dumps(compare_plan.plan_for(fake, [], [], [f"--data={tmp_path}/x"]).flags)


@pytest.mark.parametrize(
    ("name", "recipe"), [("language-writers-gkd", "language"), ("swing-canaries", "swing"), ("glue-sst2", "glue")]
)
def test_a_renamed_flag_is_the_same_cell(name: str, recipe: str, tmp_path: Path) -> None:
    """Cells that were recorded under the former names of flags are found by the present ones."""
    folder = ROOT / "benchmarks" / "results" / name
    former = json.loads((folder / "plan.json").read_text())
    assert former["format"] == 1
    plan = compare_plan.read(folder)
    assert set(plan.flags) < recipe_file.flags(recipe_file.find(recipe)) and set(former["flags"]) - set(plan.flags)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in plan.flags.items()]
    cell = plan.cells[0]
    again = compare_plan.plan_for(Path(recipe), presets_from(cell.method, cell.temperature), [cell.seed], flags)
    assert (again.cells[0].id.rpartition("-")[2], again.flags) == (cell.id.rpartition("-")[2], plan.flags)
    compare_plan.write(tmp_path, plan)
    assert compare_plan.read(tmp_path) == plan


def test_recorded_cells_with_former_arguments_have_methods_and_keep_their_ids() -> None:
    """``attached``, for one: the method is made with the present words, and a new comparison has the same cells."""
    renamed = set[str]()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/plan.json")):
        former, plan = json.loads(path.read_text()), compare_plan.read(path.parent)
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in plan.flags.items()]
        for old, cell in zip(former["cells"], plan.cells, strict=True):
            if (old["method"], old["temperature"]) == (cell.method, cell.temperature):
                continue
            method_of(cell.method, cell.temperature)
            presets = presets_from(cell.method, cell.temperature)
            again = compare_plan.plan_for(Path(plan.recipe), presets, [cell.seed], flags).cells[0]
            assert again.id.rpartition("-")[2] == cell.id.rpartition("-")[2], (path, cell)
            renamed |= set(re.findall(r"\w+", old["method"])) - set(re.findall(r"\w+", cell.method))
    assert "attached" in renamed


@pytest.mark.parametrize(
    ("present", "former"),
    [
        ("pkd(standardize_over=image)", "pkd(over=image)"),
        ("kd(temperature=curriculum(run_fraction=0.5))", "kd(temperature=curriculum(over=0.5))"),
        ("sum(pkd(standardize_over='batch'), kd(temperature=scheduled(run_fraction=1)))", None),
    ],
)
def test_over_had_two_meanings(present: str, former: str | None) -> None:
    assert former_spec(present) == (former or former_spec(present)) != present
    assert present_spec(former_spec(present)) == present


def test_a_new_flag_with_the_former_name_of_another_is_itself(fake: Path, tmp_path: Path) -> None:
    plan = compare_plan.plan_for(fake, presets_from("kd"), range(1), ["--fit=2", "--resize-mode=stretch"])
    compare_plan.write(tmp_path, plan)
    assert compare_plan.read(tmp_path).flags == {"fit": "2", "resize_mode": "stretch"}


@pytest.mark.parametrize(
    ("args", "flags", "said"),
    [
        (("--seeds=0",), (), "a comparison needs a recipe, --methods and at least one seed"),
        (("--methods=kdd",), (), "no method is called 'kdd'. Did you mean 'kd'?"),
        (("--jobs=0",), (), "jobs and threads must be 1 or more; got 0 and 1."),
        ((), ("--seed=3",), "compare sets --seed itself"),
        ((), ("seed",), "'seed' after the -- is not a flag of the recipe. Write --name=value."),
        ((), ("--epochs=3",), "contains another comparison: its epochs was None, now it is '3'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: Words, flags: Words, said: str
) -> None:
    out = tmp_path / "grid"
    out.mkdir()
    compare_plan.write(out, compare_plan.plan_for(fake, [], [], []))
    assert compare(fake, out, *args, flags=flags) == 1
    assert said in capsys.readouterr().err
    assert not begun(out)


def test_a_recipe_that_cannot_be_a_cell_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.py"
    path.write_text("def main(*, method: str) -> None: ...\n")
    assert compare(path, tmp_path / "grid") == 1
    assert "main() takes no out, seed; a comparison needs these as its flags." in capsys.readouterr().err
    assert cli.main(["compare", "status", str(tmp_path / "grid")]) == 1
    assert "contains no comparison: there is no plan.json. Start one: tempering compare" in capsys.readouterr().err


# real cells

TINY = '''
"""Two small nets on made-up images."""
import os, signal
from pathlib import Path
import torch
from torch import nn
import tempering as kd
from tempering.experiments.presets import preset_from, method_of
from tempering.data import Batches


def images(n: int, salt: int, **how) -> Batches:
    """Dark, gray and bright ones."""
    x = torch.randint(0, 64, (n, 1, 6, 6), generator=torch.Generator().manual_seed(salt))
    y = torch.arange(n) % 3
    return Batches((x + 80 * y.view(-1, 1, 1, 1)).to(torch.uint8), y, batch_size=32, mean=(0.5,), std=(0.3,), **how)


def main(*, method: str = "dtkd", seed: int = 0, out: Path, label: str = "", die_at: int = -1, quiet: bool = False):
    """Distil.

    Args:
        die_at: the step at which the process is killed, once.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        teacher[1].weight.copy_(torch.tensor([[-4.0], [0.0], [4.0]]) / 36)
        teacher[1].bias.copy_(torch.tensor([0.0, 1.5, 0.0]))
    torch.manual_seed(seed)
    student = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 3)
    ).to(memory_format=torch.channels_last)

    def on_step(step: int, loss: torch.Tensor) -> None:
        if step == die_at and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train = images(256, 0, shuffle=True, crop=1, flip=True, seed=seed, channels_last=True)
    loss = method_of(method)
    return kd.distill(student, teacher if loss.needs_teacher else None, train, method=loss, epochs=2,
                      test=images(64, 1, channels_last=True), out=out, seed=seed, log_every=2, checkpoint_every=3,
                      quiet=quiet, on_step=on_step, facts={"label": label or preset_from(method).label})
'''


def test_a_cell_killed_in_mid_epoch_equals_the_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(TINY)
    out, args = tmp_path / "grid", ("--methods=dtkd", "--seeds=1", "--jobs=1")
    assert compare(recipe, out, *args, flags=("--die-at=12",)) == 1
    assert "ended by SIGKILL (out of memory?); the same command resumes it" in capsys.readouterr().out
    place = out / "work" / cell_of(out, "DTKD exact").stem
    assert max(list_steps(place / "checkpoints")) == 12, "8 steps an epoch: it died in the second"
    assert compare(recipe, out, *args, flags=("--die-at=12",)) == 0

    whole = tmp_path / "whole"
    recipe_file.load(recipe)(method="dtkd", out=whole, quiet=True)
    record = json.loads(cell_of(out, "DTKD exact").read_text())
    assert record["facts"]["resumed"] == [12]
    for name in ("student.safetensors", "best.safetensors"):
        assert (place / name).read_bytes() == (whole / name).read_bytes()
    lines = [json.loads(line) for line in (whole / "steps.jsonl").read_text().splitlines()]
    assert [s["loss"] for s in record["steps"]] == [s["loss"] for s in lines]
    assert not (place / "checkpoints").exists(), "a finished cell needs none"


def first_of(name: str, flags: dict[str, Any]) -> tuple[dict, tuple, Any]:
    """The student's initial weights, its first batch, and the teacher as built, of a recipe's run."""
    torch.rand(torch.randint(9, ()))  # what went before must not matter
    made = recipes.describe(name, flags)
    batches: Any = made.train
    batches.set_epoch(0)
    weights = {key: value.clone() for key, value in made.student.state_dict().items()}
    batch = next(iter(batches))
    return weights, batch, made.with_teacher("random").resolved_teacher


@pytest.mark.parametrize("name", ["digits", pytest.param("cifar100", marks=needs_shared)])
def test_paired_seeds_are_paired(name: str, tmp_path: Path) -> None:
    """Cells of one seed begin with the same weights and see the same batches, whatever their method."""
    flags: dict[str, Any] = {"out": tmp_path / "run"}
    if name == "cifar100":
        pytest.importorskip("PIL")
        flags |= {"data": SHARED / "data" / "cifar100", "subset": 100, "test_subset": 100}
        flags |= {"teacher": "resnet14", "student": "resnet8"}
    else:
        pytest.importorskip("sklearn")
    first, batch, teacher = first_of(name, flags | {"method": "dtkd", "seed": 1})
    for method in ("supervised", "kd", "dkd-rest-dynamic"):
        weights, other, taught = first_of(name, flags | {"method": method, "seed": 1})
        assert all(torch.equal(weights[key], first[key]) for key in first)
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
        assert (taught is None) == (method == "supervised"), "the student alone does not even make a teacher"
        if taught is not None:
            assert taught.identity == teacher.identity
    weights, other, _ = first_of(name, flags | {"method": "dtkd", "seed": 2})
    assert not all(torch.equal(weights[key], first[key]) for key in first)
    assert not torch.equal(other[2], batch[2])


def _until(true: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_damage_that_stops_a_cell_or_a_report_is_named(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    compare(fake, out, "--methods=kd,dkd", "--no-controls", "--seeds=1")
    plan = compare_plan.read(out)
    record, place = compare_plan.record_of(out, plan.cells[0]), compare_plan.work_of(out, plan.cells[0])
    record.unlink()
    capsys.readouterr()
    assert cli.main(["compare", "report", str(out)]) == 0
    assert f"{record} is missing, though its run is finished" in capsys.readouterr().out
    (place / "facts.json").write_text((place / "facts.json").read_text().replace(":", ";", 1))
    for command in (["report", str(out)], ["status", str(out)]):
        assert cli.main(["compare", *command]) == 1
        assert f"{place / 'facts.json'}, line 1, is not JSON" in capsys.readouterr().err
    (place / "log.txt").write_text("error: weights.safetensors is damaged\n(--traceback shows where)\n")
    assert "exit code 1: error: weights.safetensors is damaged (full" in compare_runner.failure_reason(place, {}, 1)
