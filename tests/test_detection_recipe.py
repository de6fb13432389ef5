"""The detection recipe from its arguments to the report's page, on shapes and on a folder in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tempering.models import build
from tempering.reports.compare import compare
from tempering.reports.page import render
from tempering.reports.records import load_run
from tempering.training.config import Run
from tests import recipes
from tests.test_detection_data import box, folder

pytest.importorskip("pycocotools")


def run(out: Path, method: str, **more: Any) -> Run:
    given: dict[str, Any] = {"student": "fcos_nano", "teacher": "fcos_tiny", "epochs": 1, "size": 32, "batch_size": 4}
    given |= {"subset": 8, "threads": 1, "quiet": True, "out": out}
    return recipes.run("detection", {"method": method} | given | more)


def test_from_arguments_to_the_page(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", "supervised")
    both = run(tmp_path / "both", "sum(fgd, dtkd(hard=0))", inherit_neck=True)
    assert set(alone.last["test"]) == {"map", "map50", "map75", "loss"}  # pyright: ignore
    assert all(name.startswith("laterals.") for name in both.facts["student"]["left"])
    assert both.facts["teacher"]["name"] == "fcos_tiny" and len(list((tmp_path / "teachers").glob("fcos_tiny-*/"))) == 1
    terms = json.loads((tmp_path / "both" / "steps.jsonl").read_text().splitlines()[-1])["terms"]
    assert {"fgd.hard", "dtkd.dynamic", "dtkd.soft"} <= set(terms) and "dtkd.hard" not in terms
    runs = [load_run(tmp_path / name) for name in ("alone", "both")]
    found = compare(runs)
    assert found.metric.name == "test/map" and found.metric.fraction
    page = render(runs)
    assert page.count("data:image/jpeg;base64,") == 6 and "img-src data:" in page
    assert 'id="boxes"' in page and "Average precision per class" in page and "rectangle" in page
    shown = [picture for name in ("alone", "both") for picture in pictures(tmp_path / name)]
    assert page.count('class="box truth"') == sum(len(picture["boxes"]["truth"]) for picture in shown)


def pictures(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "analysis.json").read_text())["detection"]["pictures"]


def test_a_folder_and_what_was_left_out(tmp_path: Path) -> None:
    boxes = [box(10, 20, 0, 20, 10), box(11, 2, 2, 15, 15, category_id=7), box(11, 5, 5, 0, 3), box(12, 4, 4, 30, 30)]
    data = folder(tmp_path / "data", boxes)
    done = run(tmp_path / "out", "supervised", data=data, subset=None, resize_mode="stretch", augment=True)
    assert done.facts["data"]["dropped"] == {"train": {"zero size": 1}, "validation": {}, "test": {"zero size": 1}}
    assert done.facts["data"]["classes"] == 2 and done.facts["data"]["augmentation"]["augment"]


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", [box(10, 20, 0, 20, 10)])
    save_file(build("fcos_tiny", classes=3).state_dict(), tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match=r"class_head.weight is \(3, 48, 3, 3\) and should be \(2, 48, 3, 3\)"):
        run(tmp_path / "out", "fgd", data=data, subset=None, teacher_weights=tmp_path / "teacher.safetensors")


def test_names_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resnet8 is not a detector"):
        run(tmp_path, "supervised", student="resnet8")
