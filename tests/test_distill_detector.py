"""A detector in one call: the defaults of each family, its data, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempering as kd
from docs.tools import detectors as detectors_tool
from tempering.data.detection import DetectionLoader
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.experiments import published
from tempering.methods import FGD, PKD, QueryKD, Supervised
from tempering.models.detector import Detector
from tempering.models.external_detectors import TransformersDetector
from tempering.training.config import Run
from tempering.training.detector import FAMILIES, distill_detector
from tests.cases import each
from tests.detection_runs import net
from tests.test_detection_data import box, folder

HOW: dict[str, Any] = {"steps": 1, "quiet": True, "selfcheck": False}


def shapes() -> Any:
    return synthetic_shapes(size=32, train=4, test=2, batch_size=4)


def moved(student: nn.Module, run: Any) -> Run:
    """Run, and check that every trained weight of the student that was given has moved."""
    before = {name: x.clone() for name, x in student.named_parameters()}
    done = run()
    still = [n for n, x in student.named_parameters() if torch.equal(x, before[n])]
    assert len(still) < len(before) / 2, still
    return done


def test_weights_are_the_published_ones() -> None:
    for family, pair in zip(("anchor-based", "anchor-free", "two-stage"), published.DETECTORS, strict=True):
        assert FAMILIES[family].method().hyperparameters() == published.fgd(*pair).hyperparameters()
    assert isinstance(FAMILIES["queries"].method(), QueryKD)


def test_the_library_s_own_from_a_data_object(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    student = net()
    run = moved(
        student, lambda: kd.distill_detector(student, net(1.0, seed=2), shapes(), out=tmp_path, **HOW | {"steps": 2})
    )
    assert run.student is student and 0 <= run.last["test"]["map"] <= 1
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["family"] == "anchor-free" and facts["method"]["name"] == "FGD"
    assert facts["method"]["foreground"] == 1.6e-3


def test_a_folder_and_an_explicit_method(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    data = folder(tmp_path / "data", [box(10, 20, 0, 20, 10), box(11, 2, 2, 15, 15, category_id=7)])
    student, teacher = (kd.models.build("fcos_nano", classes=2) for _ in "st")
    run = distill_detector(student, teacher, data, size=32, batch_size=3, method=PKD(), out=tmp_path / "out", **HOW)
    assert run.facts["method"]["name"] == "PKD" and "terms" in (tmp_path / "out" / "steps.jsonl").read_text()


@each("kind", ["d_fine", "rt_detr"])
def test_queries_of_transformers(kind: str, tmp_path: Path) -> None:
    """The models themselves are given, and keep their own loss; every term of the matched queries reaches a weight."""
    pytest.importorskip("transformers")
    student, teacher = detectors_tool.tiny(kind), detectors_tool.tiny(kind)
    own = student.loss_function
    data = synthetic_shapes(size=64, train=2, test=1, batch_size=2).train
    run = distill_detector(student, teacher, [next(iter(data))], out=tmp_path, **HOW)
    assert run.student.model is student and student.loss_function is own and run.facts["family"] == "queries"
    line = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[-1])
    assert set(line["terms"]) == {"classes", "l1", "giou", "hard"} and all(v >= 0 for v in line["terms"].values())


def test_equal_models_agree_on_their_queries() -> None:
    """As features of the task: a copy of the teacher has no distance to it, whatever the order of its queries."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = TransformersDetector(detectors_tool.tiny("rt_detr")).eval()
    batch = next(iter(synthetic_shapes(size=64, train=2, test=1, batch_size=2).train))
    task = kd.tasks.Detection(class_rows=False)
    with torch.no_grad():
        rows = task.rows(model(task.inputs(batch)[0]), model({"images": batch["images"]}), batch)[-1]
    assert rows.features["query_sigmoid"][0].shape == (2, 2, 20, 3) and "scores" not in rows.features
    terms = QueryKD()(rows, 1.0)
    assert all(float(terms[name].abs().max()) < 1e-5 for name in QueryKD.weighs) and terms["hard"].gt(0).all()


# refused


class Own(Detector):
    """A detector of the user's, of no family."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def levels_of(self, images: Any) -> Any:
        return self.inner.levels_of(images)

    def detect(self, images: Any, targets: Any) -> Any:
        return self.inner.detect(images, targets)


def test_a_model_of_no_family_is_told_what_to_write() -> None:
    with pytest.raises(
        TypeError, match=r"Linear is no detector .* subclass of Detector .* whose losses .* task=MyTask"
    ):
        distill_detector(nn.Linear(1, 1), net(), shapes())
    with pytest.raises(TypeError, match=r"the student Own is of no family .* Write method= .*kd\.distill\(student"):
        distill_detector(Own(), net(), shapes())
    with pytest.raises(ValueError, match="FGD needs a teacher, and teacher is None"):
        distill_detector(net(), None, shapes())  # pyright: ignore
    run = distill_detector(Own(), net(seed=2), shapes().train, method=FGD(), **HOW)
    assert run.facts["family"] is None
    assert isinstance(distill_detector(net(), None, [*shapes().train], method=Supervised(), **HOW), Run)  # pyright: ignore


def test_families_that_do_not_go_together() -> None:
    class Based(Own):
        family = "anchor-based"

    class Queries(Own):
        family = "queries"

    with pytest.raises(ValueError, match=r"the student is anchor-free \(FCOS\) and the teacher queries .* method=meth"):
        distill_detector(net(), Queries(), shapes())
    assert distill_detector(net(), Based(), shapes().train, **HOW).facts["method"]["foreground"] == 1.6e-3


def test_data_that_does_not_fit() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    one = [torch.tensor([[40.0, 40.0, 50.0, 50.0]])] * 2  # outside
    empty = DetectionLoader(images, one, [torch.zeros(1, dtype=torch.long)] * 2, batch_size=2, class_names="abc")
    with pytest.raises(ValueError, match=r"no image of the training split 'data' has a box.*'outside the image': 2"):
        distill_detector(net(), net(), empty)
    two = DetectionLoader(images, [x - 30 for x in one], [torch.ones(1).long()] * 2, batch_size=2, class_names="ab")
    with pytest.raises(ValueError, match=r"the student detects 3 classes and the data has 2: a, b. .* num_classes=3"):
        distill_detector(net(), net(), two)
    wrong = next(iter(shapes().train)) | {"targets": [{"boxes": one[0] - 30, "labels": torch.tensor([7])}] * 4}
    with pytest.raises(ValueError, match="this detector has 3 classes, counted from 0, and there are labels from 7"):
        distill_detector(net(), net(seed=2), [wrong], steps=1, quiet=True)
    with pytest.raises(ValueError, match="size= and batch_size= are options of a folder"):
        distill_detector(net(), net(), shapes(), size=32)
