"""The teacher-budget curve: its grids are flags that the recipe has; table and figure are made from records alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tempering.experiments import recipe as recipe_file
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.presets import presets_from
from tempering.reports.records import pack, write_cell
from tests.paths import ROOT
from tests.records_made import make_run

LABELS = {"supervised": "student alone", "kd": "KD", "kd-matched": "KD, weight-matched"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import budget  # pyright: ignore[reportMissingImports]

    return budget


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two grids of three presets and two seeds; one cell of the second is open."""
    for n, gain in ((500, 0.0), (2000, 0.1)):
        folder = tmp_path / "results" / f"n-{n}"
        presets = presets_from(",".join(LABELS))
        plan = compare_plan.plan_for(
            ROOT / "tempering" / "recipes" / "cifar100.py", presets, range(2), [f"--subset={n}"]
        )
        folder.mkdir(parents=True)
        compare_plan.write(folder, plan)
        for i, cell in enumerate(plan.cells):
            end = 0.2 + gain + 0.02 * list(LABELS.values()).index(cell.label) + 0.01 * cell.seed
            run = make_run(tmp_path / "runs" / f"{n}-{i}", cell.label, cell.seed, end=end, order=i, epochs=4)
            if (n, i) != (2000, 5):
                write_cell(compare_plan.record_of(folder, cell), pack(run))
    return tmp_path / "results"


def test_table_and_figure_are_made_from_the_records_byte_for_byte(budget: ModuleType, made: Path) -> None:
    assert budget.main(["--out", str(made)]) == 0
    first = [(made / name).read_bytes() for name in ("table.md", "curve.svg")]
    budget.write(made)
    assert [(made / name).read_bytes() for name in ("table.md", "curve.svg")] == first
    said = first[0].decode()
    assert "| student alone | 20.50 ± 0.71 | 30.50 ± 0.71 |" in said
    assert "| KD, weight-matched | 24.50 ± 0.71 | 34.00 |" in said
    assert "| student alone | -4.00 (no interval) | -4.00 (no interval) |" in said, "by pairs, of the one seed too"
    assert said.endswith("Open: KD, weight-matched, 2000 images, seed 1.\n")
    drawn = ElementTree.fromstring(first[1])
    assert len(drawn.findall(f".//{SVG}path[@class='line']")) == len(drawn.findall(f".//{SVG}path[@class='band']")) == 3
    assert [t.text for t in drawn.findall(f"{SVG}g/{SVG}text")] == list(LABELS.values())
    assert len(drawn.findall(f".//{SVG}circle")) == 6


def test_a_record_that_was_edited_is_refused(budget: ModuleType, made: Path) -> None:
    record = next((made / "n-500" / "records").glob("kd-s0*.json"))
    record.write_text(record.read_text().replace('"accuracy":0.2', '"accuracy":0.9'))
    with pytest.raises(ValueError, match="was edited"):
        budget.write(made)
    with pytest.raises(FileNotFoundError, match=r"holds no grid n-IMAGES\. Run some"):
        budget.write(made / "n-500")


def test_every_grid_asks_the_teacher_about_its_images_alone(budget: ModuleType, tmp_path: Path) -> None:
    args = budget.parsed(["--data", "DIR", "--images", "500,5000", "--out", str(tmp_path), "--", "--epochs=3"])
    assert [c[c.index("--") + 1 :].count("--epochs=3") for c in budget.commands(args)] == [1, 1]
    args = budget.parsed(["--data", "DIR", "--images", "500,5000", "--steps", "1600", "--out", str(tmp_path)])
    few, many = budget.commands(args)
    for command, n, epochs in ((few, 500, 200), (many, 5000, 20)):
        flags = command[command.index("--") + 1 :]
        recipe_file.check_flags(ROOT / "tempering" / "recipes" / "cifar100.py", flags)
        assert {f"--subset={n}", f"--epochs={epochs}", "--teacher-subset=50000", "--teacher-cache=0"} <= set(flags)
        assert command[0] == sys.executable and str(tmp_path / f"n-{n}") in command
    assert [x for x in few if x.startswith("--teacher-dir")] == [x for x in many if x.startswith("--teacher-dir")]


def test_what_is_committed_is_made_from_its_records(budget: ModuleType) -> None:
    if not budget.RESULTS.is_dir():
        pytest.skip("no curve is recorded yet")
    found, missing = budget.curves(budget.RESULTS)
    assert (budget.RESULTS / "table.md").read_text(encoding="utf-8") == budget.table(found, missing)
    assert (budget.RESULTS / "curve.svg").read_text(encoding="utf-8") == budget.figure(found)
