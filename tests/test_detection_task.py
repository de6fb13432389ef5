"""Detection as rows: its blocks, their masses, mAP, and whole runs that learn, resume and are shared out."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tempering.data.detection import DetectionLoader
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.methods import DTKD, KD, Sum, Supervised
from tempering.models.detector import Detected, inherit
from tempering.models.fcos import FCOS
from tempering.rows import Rows, total
from tempering.tasks.average_precision import average_precision
from tempering.tasks.detection import Detection, keep_pictures, teacher_recall
from tempering.teachers import Live
from tempering.training.distill import distill
from tempering.training.selfcheck import selfcheck
from tempering.training.trainer import Trainer
from tests.cases import each
from tests.detection_runs import ADAMW, KINDS, go, net, one_student
from tests.runs import identical, left, stop_at

pytest.importorskip("pycocotools")


def batch(n: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Shapes of 64 x 64, the last image without boxes."""
    made = synthetic_shapes(size=64, train=n, test=1, batch_size=n, flip=False).train
    made.boxes[-1], made.labels[-1] = made.boxes[-1][:0], made.labels[-1][:0]
    out = next(iter(made.clean()))
    targets = [{"boxes": t["boxes"].to(dtype), "labels": t["labels"]} for t in out["targets"]]
    return out | {"images": out["images"].to(dtype), "targets": targets}


def part(whole: dict[str, Any], cut: slice) -> dict[str, Any]:
    return {name: value[cut] for name, value in whole.items()}


def answers(task: Detection, student: Any, teacher: Any, given: dict[str, Any]) -> list[Rows]:
    own, theirs, ids = task.inputs(given)
    return task.rows(student(own), None if teacher is None else Live(teacher)(theirs, ids), given)


@pytest.mark.parametrize(("kind", "classes", "rows"), [("background", 4, 30), ("binary", 2, 90)])
def test_blocks_and_their_masses(kind: Any, classes: int, rows: int) -> None:
    task, given = Detection(classes=kind, keep=30), batch()
    blocks = answers(task, net(bins=9), net(1.0, bins=9, seed=2), given)
    assert [(b.name, tuple(b.student.shape)) for b in blocks] == [
        ("classes", (4 * rows, classes)),
        ("sides", (4 * 30 * 4, 9)),
        ("images", (4, 1)),
    ]
    promised = task.row_weights(given)
    for block in blocks:
        assert (
            float(block.total_weight) == pytest.approx(promised[block.name], rel=1e-6) and promised[block.name] == 4.0
        )
        assert block.target is not None and (block.target == -100).all() and block.student.requires_grad
    for block in blocks[:2]:
        assert block.weight is not None
        torch.testing.assert_close(block.weight.view(4, -1).sum(1), torch.ones(4))
    last = blocks[-1]
    assert set(last.features) == {"p0", "p1", "p2", "boxes", "scores"} and last.task_loss is not None
    assert last.ids is not None and torch.equal(last.ids, given["ids"])
    boxes, same = last.features["boxes"]
    assert boxes is same and boxes.shape[::2] == (4, 4) and (boxes[3] == -1).all()
    for own, target in zip(boxes, given["targets"], strict=True):
        count = len(target["labels"])
        torch.testing.assert_close(own[:count] * 64, target["boxes"])
        assert (own[count:] == -1).all()


def test_rows_are_the_anchors_of_which_the_teacher_is_surest() -> None:
    task, given, student, teacher = Detection(keep=5), batch(), net(), net(seed=2)
    (classes, _) = answers(task, student, teacher, given)
    with torch.no_grad():
        said, taught = student({"images": given["images"]}), teacher.eval()({"images": given["images"]})
    best = taught.logits.sigmoid().amax(-1).topk(5).indices
    for side, z in ((classes.student, said.logits), (classes.teacher, taught.logits)):
        for i in range(4):
            torch.testing.assert_close(side.view(4, 5, 4)[i, :, :3], z[i, best[i]])
        assert (side.view(4, 5, 4)[..., 3] == 0).all()


def test_without_a_teacher_images_are_all() -> None:
    for blocks in (
        answers(Detection(), net(), None, batch()),
        answers(Detection(class_rows=False), net(), net(), batch()),
    ):
        assert [b.name for b in blocks] == ["images"]
    alone = answers(Detection(), net(), None, batch())[0]
    assert not alone.features and alone.task_loss is not None and alone.task_loss[3] > 0


METHODS = {
    "alone": Supervised,
    "kd": lambda: KD(hard=1.0),
    "dtkd": lambda: Sum(Supervised(), DTKD(hard=0.0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_do_not_depend_on_the_split(name: str) -> None:
    task, given, method = Detection(keep=30), batch(dtype=torch.float64), METHODS[name]()
    teacher = net(seed=2, bins=9).double()

    def loss_and_slope(*cuts: slice) -> tuple[float, Tensor]:
        student, value = net(bins=9, norm="group").double(), 0.0
        mass = task.row_weights(given)
        for cut in cuts:
            blocks = answers(task, student, teacher, part(given, cut))
            loss = torch.stack([total(method(b, 1.0), b, normalizer=mass[b.name]) for b in blocks]).sum()
            loss.backward()
            value += float(loss.detach())
        return value, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    whole, slope = loss_and_slope(slice(None))
    parts, again = loss_and_slope(slice(0, 1), slice(1, None))
    assert parts == pytest.approx(whole, abs=1e-12) and slope.abs().max() > 0.01
    torch.testing.assert_close(again, slope, rtol=0, atol=1e-12)


class Fixed(torch.nn.Module):
    """Answers what it is told."""

    def __init__(self, said: Detected) -> None:
        super().__init__()
        self.said = said

    def forward(self, inputs: Any) -> Detected:
        return self.said


def test_queries_are_matched_one_to_one() -> None:
    """A student whose queries are the teacher's in another order agrees with it exactly."""
    given = batch()
    logits, corner = torch.randn(4, 12, 3), torch.rand(4, 12, 2) * 30
    boxes = torch.cat((corner, corner + 4 + 20 * torch.rand(4, 12, 2)), -1)
    taught = Detected([], logits, boxes, None, {}, True, queries=True)
    order = torch.stack([torch.randperm(12) for _ in range(4)])
    shuffled = [x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in (logits, boxes)]
    said = taught._replace(logits=shuffled[0].requires_grad_(), boxes=shuffled[1])
    classes = Detection(keep=9).rows(said, taught, given)[0]
    assert len(classes) == 4 * 9
    torch.testing.assert_close(classes.student, classes.teacher)
    more = taught._replace(logits=torch.cat((logits, logits - 9), 1), boxes=torch.cat((boxes, boxes + 1), 1))
    classes = Detection(keep=100).rows(said, more, given)[0]
    assert len(classes) == 4 * 12, "as many as the smaller side has"
    torch.testing.assert_close(classes.student, classes.teacher)


def test_models_that_do_not_fit_are_refused() -> None:
    given = batch()
    said = net()(Detection().inputs(given)[0])
    changes = {
        r"detects 3 classes and the teacher 2. Give both heads the same classes": {"logits": said.logits[..., :2]},
        r"the student has 84 anchors and the teacher 83 anchors": {"logits": said.logits[:, 1:]},
        r"the student has 84 anchors and the teacher 84 queries": {"queries": True},
        r"one model's head has sigmoids": {"sigmoid": False},
        r"neck has 3 levels and the teacher's 2": {"levels": said.levels[1:]},
        r"sides have 9 bins and the teacher's 5": {"bins": torch.zeros(4, 84, 4, 5)},
    }
    wide = said._replace(bins=torch.zeros(4, 84, 4, 9))
    for message, change in changes.items():
        teacher = Detected(*(x.detach() if isinstance(x, Tensor) else x for x in said._replace(**change)))
        with pytest.raises(ValueError, match=message):
            Detection().rows(wide, teacher, given)
    soft = said._replace(sigmoid=False, logits=said.logits.detach())
    with pytest.raises(ValueError, match="classes='binary' is for sigmoid heads"):
        Detection(classes="binary").rows(soft, soft, given)
    with pytest.raises(TypeError, match="Detection needs a Detector; got Linear"):
        Detection().prepare_model(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="needs batches with images and targets; got tuple"):
        Detection().inputs((1, 2))
    with pytest.raises(ValueError, match="must return Detected for detection; got Tensor"):
        Detection().rows(said, torch.zeros(4, 3), given)
    with pytest.raises(ValueError, match="keep=0"):
        Detection(keep=0)


def test_the_selfcheck_takes_it() -> None:
    student, teacher, given = net(bins=9), Live(net(seed=2, bins=9)), batch()
    for method in (Supervised(), KD(), Sum(KD(hard=1.0), DTKD(hard=0.0))):
        checked = selfcheck(student, teacher, given, method=method, task=Detection())
        assert checked.checks["same when split"] == checked.checks["finite gradients"] == "ok"


# scores


def test_precision_of_known_answers() -> None:
    """Two of three boxes found exactly, one at IoU 0.6 and a false one of a lower score."""
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([0, 1])}]
    truth.append({"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([0])})
    first = {"boxes": truth[0]["boxes"], "labels": truth[0]["labels"], "scores": torch.tensor([0.9, 0.8])}
    second = {"boxes": torch.tensor([[0.0, 0, 10, 6], [50, 50, 60, 60]]), "labels": torch.tensor([0, 1])}
    found = [first, second | {"scores": torch.tensor([0.7, 0.6])}]
    said = average_precision(found, truth, 3)
    assert (
        said["map50"] == pytest.approx(1.0)
        and said["by_class"][1] == pytest.approx(1.0)
        and said["by_class"][2] is None
    )
    # class 0: whole to IoU 0.6, then recall 1/2, which covers 51 of 101 points
    part = 51 / 101
    assert said["by_class"][0] == pytest.approx((3 + 7 * part) / 10) or said["by_class"][0] == pytest.approx(
        (2 + 8 * part) / 10
    )
    assert said["map75"] == pytest.approx((1 + part) / 2)
    nothing = [{k: v[:0] for k, v in one.items()} for one in found]
    assert average_precision(nothing, truth, 3)["map"] == 0.0
    with pytest.raises(ValueError, match="no image of this split has one"):
        average_precision(nothing, nothing, 3)


def test_found_again() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [1, 1, 2, 2]])
    teacher = {"boxes": boxes, "labels": torch.tensor([0, 1, 1]), "scores": torch.tensor([0.9, 0.5, 0.1])}
    student = {"boxes": boxes[:2] + 1, "labels": torch.tensor([0, 0]), "scores": torch.tensor([0.6, 0.6])}
    assert teacher_recall([student], [teacher]) == 0.5 and teacher_recall([teacher], [teacher]) == 1.0
    assert teacher_recall([student], []) is None


def test_an_empty_loader_and_one_without_boxes() -> None:
    with pytest.raises(ValueError, match="there is nothing to score"):
        Detection().score(net(), [])
    given = batch(1)
    with pytest.raises(ValueError, match="no image of this split has one"):
        Detection().score(net(), [given])


# whole runs


def test_a_split_without_boxes_and_images_of_several_sizes_are_refused_before_training() -> None:
    images, none = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), [torch.zeros(0, 4)] * 4
    labels = [torch.zeros(0, dtype=torch.long)] * 4
    how: dict[str, Any] = {"method": Supervised(), "task": Detection(), "epochs": 1, "quiet": True}
    steps: list[int] = []
    how["on_step"] = lambda step, loss: steps.append(step)
    one = [torch.tensor([[4.0, 4.0, 30.0, 30.0]])]
    train = DetectionLoader(images, one * 4, [torch.zeros(1, dtype=torch.long)] * 4, batch_size=2, class_names="abc")
    empty = DetectionLoader(images, none, labels, batch_size=2, class_names="abc")
    crowd = [{"boxes": one[0], "labels": torch.zeros(1, dtype=torch.long), "crowd": torch.tensor([True])}] * 4
    crowded = DetectionLoader(images, none, labels, batch_size=2, class_names="abc", scored=crowd)
    for split in (empty, crowded):
        with pytest.raises(ValueError, match="the validation split: average precision needs boxes, and no image"):
            distill(net(), None, train, validation=split, **how)
    batch = next(iter(train))
    batch["images"] = [batch["images"][0], batch["images"][1, :, :32]]
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\) in one tensor.*got list of 2 and 2 targets.*Pad or"):
        distill(net(), None, [batch], **how)
    assert not steps
    later = DetectionLoader(
        images, none[:3] + one, [*labels[:3], torch.zeros(1, dtype=torch.long)], batch_size=2, class_names="abc"
    )
    distill(net(), None, train, validation=later, **how)


def test_it_learns(tmp_path: Path) -> None:
    """A fifth of the recipe's run on smaller images: from nothing to a mAP50 that no guess has."""
    torch.manual_seed(0)
    student = FCOS(3, width=0.5, neck=32)
    data = synthetic_shapes(size=64, train=96, test=32, batch_size=8)
    run = distill(
        student,
        None,
        data.train,
        method=Supervised(),
        task=Detection(),
        optimizer=partial(torch.optim.AdamW, lr=4e-3),
        schedule=lambda p: min(1.0, p / 0.05 + 0.02) * (1.0 - p),
        epochs=14,
        max_grad_norm=10.0,
        test=data.test,
        evaluate_every=14,
        out=tmp_path,
        quiet=True,
    )
    scores, before = run.epochs[-1]["test"], Detection().score(FCOS(3, width=0.5, neck=32), data.test)
    assert scores["map50"] > 0.15 > 0.02 > before["map50"] and run.facts["best_by"] == "test/map"
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["class_names"] == ["rectangle", "ellipse", "triangle"] and found["detection"]["found"] is None
    assert found["detection"]["map"]["student"] == pytest.approx(scores["map"])
    assert len(found["detection"]["pictures"]) == 3 and set(found["detection"]["pictures"][0]["boxes"]) == {
        "student",
        "truth",
    }


def test_a_distilled_run_says_what_it_found_of_the_teacher(tmp_path: Path) -> None:
    data = synthetic_shapes(size=32, train=8, test=4, batch_size=4)
    teacher = net(seed=2)
    run = distill(
        net(), teacher, data.train, method=KD(hard=1.0), task=Detection(pictures=2), epochs=1, test=data.test,
        out=tmp_path, quiet=True, optimizer=ADAMW,
    )  # fmt: skip
    found = json.loads((tmp_path / "analysis.json").read_text())["detection"]
    assert set(found["map"]) == {"student", "teacher"} and set(found["pictures"][0]["boxes"]) == {
        "student",
        "teacher",
        "truth",
    }
    assert run.facts["status"] == "done"
    line = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[-1])
    assert set(line["terms"]) == {"soft", "hard"} and line["terms"]["hard"] > 0.5 and line["terms"]["soft"] > 0
    assert line["T_teacher"]["mean"] == pytest.approx(4.0)


def test_the_teacher_s_maps_are_not_kept() -> None:
    data = synthetic_shapes(size=32, train=8, test=4, batch_size=4)
    assert not Detection.remember
    asked: list[int] = []

    class Counted(Live):
        def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
            asked.append(len(inputs["images"]))
            return super().__call__(inputs, ids)

    trainers: list[Trainer] = []
    original = Trainer.run

    def run(self: Trainer, facts: dict[str, Any]) -> Any:
        trainers.append(self)
        return original(self, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        distill(net(), Counted(net(seed=2)), data.train, method=KD(), task=Detection(), epochs=1, test=data.test,
                quiet=True, optimizer=ADAMW, selfcheck=False)  # fmt: skip
    assert asked[-1] == 4 and not trainers[0].evaluator.teachers["test"].outputs


def test_stopped_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", on_step=stop_at(3))
    go(tmp_path / "stopped")
    whole, stopped = left(tmp_path / "whole"), left(tmp_path / "stopped")
    assert whole["state"]["at"]["step"] == 6 and identical(whole, stopped)


@each("kind", KINDS)
def test_the_parts_of_a_step_are_one(kind: str, tmp_path: Path) -> None:
    """Two processes are in tests/test_distributed.py."""
    go(tmp_path / "whole", kind, precision="64-true")
    go(tmp_path / "parts", kind, precision="64-true", batch_size=1, accumulate=4)
    one_student(tmp_path / "whole", tmp_path / "parts")


def test_inherit_before_a_run_names_what_is_left() -> None:
    left_out = inherit(net(), net(2.0, seed=4))
    assert left_out and all(name.startswith("laterals.") for name in left_out)


def test_scenes_are_what_the_engine_shares_out() -> None:
    made = synthetic_shapes(size=32, train=8, test=4, batch_size=4).train
    assert (
        isinstance(made, DetectionLoader) and made.identity == synthetic_shapes(size=32, train=8, test=4).train.identity
    )


def test_pictures_are_of_the_images_whose_boxes_differ_most() -> None:
    def found(*labels: int) -> dict[str, Tensor]:
        boxes = torch.tensor([[10.0 * k, 0.0, 10.0 * k + 8, 8.0] for k in range(len(labels))]).reshape(-1, 4)
        return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.long), "scores": torch.ones(len(labels))}

    student = [found(1, 2), found(1), found(), found(1, 2, 3), found(5)]
    teacher = [found(1, 2), found(2), found(1), found(3, 1, 2), found(5)]
    out: dict[str, Any] = {"student": student, "teacher": teacher, "truth": [], "images": {}}
    for batch in (range(3), range(3, 5)):
        out["truth"] += [found() for _ in batch]
        keep_pictures(out, torch.stack([torch.full((3, 2, 2), float(i)) for i in batch]), 3)
    assert {i: float(image.mean()) for i, image in out["images"].items()} == {3: 3.0, 1: 1.0, 2: 2.0}


BROKEN = {
    r"needs tensors, boxes \(M, 4\) .*got {'boxes': \(1, 4\), 'labels': \(2,\)}": {"labels": torch.tensor([0, 1])},
    r"got {'boxes': \(4,\), 'labels': \(1,\)}": {"boxes": torch.tensor([4.0, 4, 30, 30])},
    r"got {'boxes': 'list', 'labels': \(1,\)}": {"boxes": [[4.0, 4, 30, 30]]},
    r"got {'boxes': \(0,\), 'labels': \(0,\)}.*torch\.zeros\(0, 4\)": {
        "boxes": torch.zeros(0),
        "labels": torch.zeros(0),
    },
    r"got \[30\.0, 30\.0, 10\.0, 10\.0\]\. Boxes as \(x, y, width": {"boxes": torch.tensor([[30.0, 30, 10, 10]])},
    r"boxes are finite .*got \[nan, 1": {"boxes": torch.tensor([[torch.nan, 1, 5, 5]])},
    r"boxes are finite .*inf\]": {"boxes": torch.tensor([[1, 1, 5, torch.inf]])},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_targets_are_named(message: str) -> None:
    given = batch(2)
    good = {"boxes": torch.tensor([[4, 4, 30, 30]]), "labels": torch.tensor([1])}
    given["targets"] = [good, good | BROKEN[message]]
    with pytest.raises(ValueError, match=message):
        net()(Detection().inputs(given)[0])


def test_boxes_that_cannot_be_in_pixels_are_warned_of() -> None:
    """Integers, and boxes without area or partly outside, train."""
    given, student = batch(2), net()
    labels = torch.tensor([1])
    for box, message in {
        (100, 100, 130, 130): "boxes outside of their image of 64 x 64",
        (0.1, 0.1, 0.5, 0.5): "boxes smaller than a pixel of their image",
    }.items():
        given["targets"] = [{"boxes": torch.tensor([box]), "labels": labels}] * 2
        with pytest.warns(UserWarning, match=message):
            student(Detection().inputs(given)[0])
    for box in ((4, 4, 4, 30), (-9, -9, 30, 90)):
        given["targets"] = [{"boxes": torch.tensor([box]), "labels": labels}] * 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = student(Detection().inputs(given)[0]).losses
        torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_batch_without_images_has_no_rows() -> None:
    task, given = Detection(keep=5), batch(2)
    none = {"images": given["images"][:0], "targets": []}
    student, teacher = net(bins=5, norm="group"), net(seed=2, bins=5, norm="group")
    blocks = answers(task, student, teacher, none)
    assert [len(rows) for rows in blocks] == [0, 0, 0] and blocks[1].student.shape == (0, 5)
