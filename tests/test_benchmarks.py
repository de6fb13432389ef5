"""Every benchmark runs at its smallest size and writes what the page is made of; peers re-stated are held to ours."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tempering.methods import DTKD, KD
from tempering.objectives import jsd
from tempering.rows import Rows, total
from tempering.temperature import Sharpness, Static
from tests.conftest import random_rows
from tests.forked import run_parts
from tests.paths import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = (
    "loss",
    "fused_linear",
    "chunked_losses",
    "memory",
    "step",
    "overhead",
    "cache",
    "speculative",
    "augment",
    "images",
    "startup",
    "growth",
    "roofline",
    "whole_steps",
)
SHORTER = {"whole_steps": ("--parts", "images", "--images", "none")}  # the trainers' own steps take seconds


def script(name: str, *arguments: object) -> str:
    """The code that runs one of the benchmarks' files with these arguments."""
    call = [name, *map(str, arguments)]
    return f"""
import runpy, sys
sys.argv = {call!r}
runpy.run_path({str(FOLDER / name)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, str]:
    """What is printed by all scripts, by a peak, and by the page of one script's lines."""
    parts = {
        "scripts": "".join(
            script(f"{name}.py", "--tiny", "--rounds", 2, "--out", folder, *SHORTER.get(name, ())) for name in SCRIPTS
        ),
        "device": script("device.py", "--device", "cpu", "--tiny", "--out", folder),
        "peak": script("loss.py", "--tiny", "--peak", "N=8 C=50 fp32|TRL generalised JSD"),
        "page": f"""
import shutil
from pathlib import Path
Path({str(folder / "one")!r}).mkdir()
shutil.copy({str(folder / "step.csv")!r}, {str(folder / "one")!r})
"""
        + script("page.py", "--results", folder / "one", "--out", folder / "one" / "page.md"),
    }
    slow = ["peers", "tempering.kernels.chunked", "tempering.methods", "trl.experimental.gkd"]
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = run_parts(parts, slow, PYTHONPATH=path)
    for name, (code, _, err) in ended.items():
        assert not code, (name, err[-3000:])
    return {name: out for name, (_, out, _) in ended.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_writes_its_lines(name: str, done: dict[str, str], folder: Path) -> None:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) >= 2 and lines[0]["speed"] == "1"
    for line in lines:
        assert float(line["ms"]) > 0.0 and float(line["low"]) <= float(line["speed"]) <= float(line["high"])
        assert line["torch"] == torch.__version__ and line["commit"] and "cores" in line["host"]


def test_the_record_of_a_device_has_every_stage(done: dict[str, str], folder: Path) -> None:
    """On the CPU, whose numbers are its own: what would be found on a device is not."""
    stages = json.loads((folder / "device-cpu.json").read_text(encoding="utf-8"))["stages"]
    wrong = {name: found for name, found in stages.items() if "error" in found or "skipped" in found}
    assert not wrong
    assert stages["numbers"]["cases"] == stages["numbers"]["equal"] == 12
    assert stages["waits"]["DTKD"] == {} and stages["resume"]["bit_equal"]
    (case,) = (found for name, found in stages["losses"].items() if name != "seconds")
    assert not case["failed"] and "dynamic term, exact, chunks" in case
    assert all(found["gradient_error"] < 1e-5 for found in case.values() if isinstance(found, dict) and found)


def test_the_page(done: dict[str, str], folder: Path) -> None:
    text = (folder / "one" / "page.md").read_text(encoding="utf-8")
    plot = folder / "one" / "figures" / "performance" / "step-0.svg"
    assert f"(figures/performance/{plot.name})" in text
    assert ElementTree.parse(plot).getroot().tag.endswith("svg") and "mdistiller, KD" in plot.read_text(
        encoding="utf-8"
    )
    assert "| mdistiller, KD |" in text and "re-stated" in text and "Not measured here yet: loss" in text
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) < 2, "every line of a table has its columns"


def test_a_peak_is_asked_for_in_a_process_of_its_own(done: dict[str, str]) -> None:
    assert float(done["peak"]) >= 0.0


def test_what_is_restated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' expressions have the values and, temperatures held constant, the gradients of our plain losses."""
    monkeypatch.syspath_prepend(FOLDER)
    import peers  # pyright: ignore[reportMissingImports]

    rows = random_rows(6, 9)
    rows = rows.replace(student=rows.student.abs(), teacher=rows.teacher.abs())
    followed = Sharpness(4.0, solve="published", differentiable=True)
    for theirs, ours in (
        (peers.kd_term, KD(soft=1.0, hard=0.0, temperature=Static(4.0))),
        (
            peers.dtkd_term,
            DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0, temperature=followed),
        ),
    ):
        slopes = []
        for plain in (True, False):
            v = rows.student.clone().requires_grad_()
            made = Rows(v, rows.teacher)
            loss = theirs(v, rows.teacher) if plain else total(ours(made), made)
            slopes.append((loss.detach(), *torch.autograd.grad(loss, v)))
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-11)
    value = peers.jsd(rows.student, rows.teacher)
    torch.testing.assert_close(value, jsd(rows, Static(1.0)(rows)).mean(), rtol=1e-9, atol=1e-11)


def test_goals_are_held_to_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import goals  # pyright: ignore[reportMissingImports]

    def line(variant: str, **own: str) -> tuple[tuple[str, str], dict[str, str]]:
        return ("c", variant), {"ms": "2", "speed": "1", "peak": "", **own}

    lines = dict([line("peer", peak="8"), line("ours", ms="5", speed="3", peak="1.5")])
    for measure, wanted, value in (
        ("times as fast", 3.0, 3.0),
        ("times the time", 0.34, 1 / 3),
        ("ms more", 3.0, 3.0),
        ("logits tensors", 1.5, 1.5),
        ("share of its peak", 0.19, 0.1875),
    ):
        goal = goals.Goal("w", "b", "c", "ours", "" if measure == "logits tensors" else "peer", measure, wanted)
        assert goals.reached(goal, lines) == (pytest.approx(value), True)
        worse = wanted * (1.1 if measure == "times as fast" else 0.9)
        assert goals.reached(goal._replace(wanted=worse), lines)[1] is False
        assert goals.reached(goal._replace(variant="nobody"), lines) is None
    text = "\n".join(goals.table({}))
    assert text.count("not measured") == len(goals.GOALS) and "Reasons" not in text


def test_every_goal_names_arms_that_were_measured() -> None:
    """On the committed results; a benchmark that was not run yet is left out."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "Not measured here yet" in page or "not measured" not in page


def test_a_checkout_of_a_peer_is_asked_for_its_own_distiller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import peers  # pyright: ignore[reportMissingImports]

    with pytest.raises(FileNotFoundError, match=r"has no mdistiller/distillers/KD\.py\. Give the root of a checkout"):
        peers.distiller("KD", tmp_path)
    folder = tmp_path / "mdistiller" / "distillers"
    folder.mkdir(parents=True)
    (folder / "_base.py").write_text("class Distiller:\n    said = 'base'\n", encoding="utf-8")
    (folder / "KD.py").write_text("from ._base import Distiller\nclass KD(Distiller):\n    pass\n", encoding="utf-8")
    assert peers.distiller("KD", tmp_path).said == "base"
    net = torch.nn.Linear(3, 2)
    whole = peers.distiller("KD", None)(peers.Answering(net), peers.Answering(torch.nn.Linear(3, 2)), peers.CONFIG)
    before, meters = net.weight.detach().clone(), peers.Meters()
    monkeypatch.setattr(peers.Meters, "update", lambda *_: None)  # two classes have no top five
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    peers.mdistiller_step(whole, torch.optim.SGD(net.parameters(), lr=0.1), meters, batch)
    assert not torch.equal(net.weight, before) and whole.teacher.net.weight.grad is None
