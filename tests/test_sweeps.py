"""The tables over models of other libraries: a few rows of each, made again, and what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from docs.tools import detectors, timm_models
from docs.tools.tables import reason, table, write_between
from tempering.methods import AT
from tempering.models.external_detectors import torchvision
from tempering.rows import Rows
from tests.paths import ROOT


def lines(page: str, name: str) -> list[list[str]]:
    """The cells of a table in a page of the documentation."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    part = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:1] == "|"]


def test_every_detector_is_exact_or_refused() -> None:
    rows = lines("detection.md", "detectors")[2:]
    assert len(rows) > 20 and {row[1] for row in rows} == {"yes", "refused"}
    assert all(float(row[2]) < 1e-5 for row in rows if row[1] == "yes")


def test_every_family_of_timm_trains_or_is_refused_by_name() -> None:
    rows = lines("models.md", "timm")[2:]
    if not rows:
        pytest.skip("the table is not made: python -m docs.tools.timm_models .")
    assert len(rows) > 90
    for family, *_, kd, at, pkt in rows:
        if kd.startswith("not tried: too large"):
            continue
        assert kd == "trains", (family, kd)
        # what does not train is refused by name
        assert at == "trains" or re.match("AT compares maps|.*the module .* did not run", at), (family, at)
        assert "trains" in (at, pkt) or re.match(".*the module .* did not run|the features have", pkt), (family, pkt)
    assert sum("trains" in (at, pkt) for *_, at, pkt in rows) > 80


@pytest.mark.parametrize("kind", ["rt_detr", "yolos"])
def test_a_row_of_transformers_detectors(kind: str) -> None:
    _library("transformers")
    name, supported, value = detectors.transformers_row(kind)
    assert [name, supported] in [row[:2] for row in lines("detection.md", "detectors")]
    assert float(value) < 1e-5 if supported == "yes" else f"got {kind}" in value


def test_a_row_of_torchvision_detectors() -> None:
    _library("torchvision")
    assert detectors.torchvision_row("ssd300_vgg16")[1] == "refused"
    assert detectors.torchvision_row("fasterrcnn_resnet50_fpn")[2].endswith("is not supported")


@pytest.mark.parametrize("name, at", [("test_resnet", "trains"), ("test_vit", "AT compares maps")])
def test_a_row_of_timm(name: str, at: str) -> None:
    _library("timm")
    row = timm_models.row("test", name)
    assert row.kd == "trains" and row.at.startswith(at) and "trains" in (row.at, row.pkt)


def _library(name: str) -> None:
    try:
        torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    pytest.importorskip(name)


def test_tables_are_written_between_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    for _ in range(2):
        write_between(page, "x", table(["n", "v"], [("a|b", 1)]))
        assert page.read_text() == "a\n<!-- x -->\n\n| n | v |\n| --- | --- |\n| a/b | 1 |\n\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match=re.escape("has no lines <!-- y -->")):
        write_between(page, "y", "")


def test_errors_of_other_code_are_named_with_their_type() -> None:
    import torch

    def caught(call: Any) -> str:
        with pytest.raises(Exception) as error:
            call()
        return reason(error.value)

    z = torch.zeros(2, 3)
    assert caught(lambda: AT()(Rows(z, z))).startswith("AT compares features, and Rows")
    assert caught(lambda: torch.zeros(2) @ torch.zeros(3)).startswith("RuntimeError: ")
