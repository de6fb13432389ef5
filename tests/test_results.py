"""What is committed under benchmarks/results: records are as their runs wrote them, tables are made from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import status as compare_status
from tests.paths import ROOT

GRIDS = sorted(path.parent for path in (ROOT / "benchmarks" / "results").rglob("plan.json"))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda path: path.name)
def test_the_table_is_made_from_the_records_byte_for_byte(grid: Path, tmp_path: Path) -> None:
    copy = tmp_path / grid.name
    shutil.copytree(grid, copy, ignore=shutil.ignore_patterns("work", "table.md", "report.html"))
    plan = compare_plan.read(copy)
    cells = {cell.id for cell in plan.cells}
    assert {path.stem.removesuffix(".failed") for path in (copy / "records").glob("*.json")} <= cells
    table, _ = compare_status.render(copy, plan)
    assert table.read_bytes() == (grid / "table.md").read_bytes(), (
        f"made again: tempering compare report {grid.relative_to(ROOT)}"
    )
