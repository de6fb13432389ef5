"""Every benchmark runs at its smallest size and writes what the page is made of; peers re-stated are held to ours."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tempering.methods import DTKD, KD
from tempering.objectives import jsd
from tempering.rows import Rows, total
from tempering.temperature import Sharpness, Static
from tests.conftest import random_rows
from tests.paths import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = ("loss", "fused_linear", "memory", "step", "overhead", "cache", "speculative", "augment", "startup", "growth")


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process for all scripts, each with arguments of its own: most of their time is importing torch."""
    out = tmp_path_factory.mktemp("speed")
    code = f"""
import runpy, sys
sys.path.insert(0, {str(FOLDER)!r})
for name in {SCRIPTS!r}:
    sys.argv = [name, "--tiny", "--rounds", "2", "--out", {str(out)!r}]
    runpy.run_path({str(FOLDER)!r} + "/" + name + ".py", run_name="__main__")
"""
    done = ran("-c", code)
    assert not done.returncode, done.stderr
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_writes_its_lines(results: Path, name: str) -> None:
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) >= 2 and lines[0]["speed"] == "1"
    for line in lines:
        assert float(line["ms"]) > 0.0 and float(line["low"]) <= float(line["speed"]) <= float(line["high"])
        assert line["torch"] == torch.__version__ and line["commit"] and "cores" in line["host"]


def test_the_page(results: Path, tmp_path: Path) -> None:
    (results / "step.csv").rename(tmp_path / "step.csv")
    done = ran(FOLDER / "page.py", "--results", tmp_path, "--out", tmp_path / "page.md")
    assert not done.returncode, done.stderr
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    (tmp_path / "step.csv").rename(results / "step.csv")
    plot = tmp_path / "figures" / "performance" / "step-0.svg"
    assert f"(figures/performance/{plot.name})" in text
    assert ElementTree.parse(plot).getroot().tag.endswith("svg") and "mdistiller, KD" in plot.read_text(
        encoding="utf-8"
    )
    assert "| mdistiller, KD |" in text and "re-stated" in text and "Not measured here yet: loss" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every line of the table has its columns"


def test_a_peak_is_asked_for_in_a_process_of_its_own() -> None:
    done = ran(FOLDER / "loss.py", "--tiny", "--peak", "N=8 C=50 fp32|TRL generalised JSD")
    assert not done.returncode and float(done.stdout) >= 0.0, done.stderr


def test_what_is_restated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' expressions have the values and, temperatures held constant, the gradients of our plain losses."""
    monkeypatch.syspath_prepend(FOLDER)
    import peers  # pyright: ignore[reportMissingImports]

    rows = random_rows(6, 9)
    rows = rows.with_(student=rows.student.abs(), teacher=rows.teacher.abs())
    followed = Sharpness(4.0, solve="published", attached=True)
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
