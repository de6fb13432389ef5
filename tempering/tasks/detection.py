"""Detection: an anchor's classes are a row, a box's side is a row, an image is a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.models.boxes import centered, giou, iou
from tempering.models.detector import Detected, Detector, detections
from tempering.rows import IGNORE_INDEX, Rows, upcast_to_float32
from tempering.tasks.average_precision import average_precision
from tempering.tasks.base import Task
from tempering.utils.tensors import to_device

Teaches = Callable[[Any, Tensor | None], Any]
MATCH_IOU = 0.5  # IoU from which a box is the teacher's one
CONFIDENT = 0.3  # score of the boxes that are compared to the teacher's, and shown


class Detection(Task):
    """Batches are mappings of images, targets and ids, as ``data.coco`` makes them; models are ``Detector``s.

    Each batch of B images makes up to three blocks of rows, each of which weighs B:

    - "classes": the class logits of an image's ``keep`` anchors (or queries) of which the teacher is surest, on both
      sides at the same anchors; an anchor weighs 1 / keep. Rows have no labels. Queries are first matched one to one,
      at the least distance of classes and boxes.
    - "sides", where both models have bins: each side of the same anchors' boxes, weighted by how sure the teacher is
      of it among the image's. That takes the place of the positives, whose number is not known before the forward.
    - "images", the last one: a row an image, with the student's own losses as ``hard``. Its features are the neck's
      maps "p0", "p1", ..., shallow to deep, and "boxes": the true ones (B, M, 4) as xyxy in [0, 1], filled up with -1,
      and, but for queries, "scores": the teacher's best one of each anchor (B, A). Its logits are zeros of one class,
      at which divergences vanish.

    Without a teacher there is the last block alone.

    Args:
        classes: rows of the class block: "background" has a row an anchor, over the classes and a background of logit 0
            (heads of a softmax bring their own); "binary" has a row of two for each class of an anchor, and is for
            heads of sigmoids.
        class_rows: False makes "images" alone, for methods over features or which own their step, and for detectors
            whose anchors differ.
        keep: anchors of an image that are rows.
        pictures: images that the report shows.
        taps: more features of the last block, name -> (student's module, teacher's module).

    Raises:
        ValueError: for options that do not fit.
    """

    remember = False  # answers hold maps

    def __init__(
        self,
        *,
        classes: Literal["background", "binary"] = "background",
        class_rows: bool = True,
        keep: int = 100,
        pictures: int = 3,
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        if classes not in ("background", "binary"):
            raise ValueError(f"Detection needs classes 'background' or 'binary'; got {classes!r}.")
        if keep < 1 or pictures < 0:
            raise ValueError(f"Detection needs keep >= 1 and pictures >= 0; got keep={keep} and pictures={pictures}.")
        self.classes, self.class_rows, self.keep, self.pictures = classes, class_rows, keep, pictures
        self.features = dict(features or {})

    def prepare_model(self, model: nn.Module) -> None:
        if not isinstance(model, Detector):
            raise TypeError(
                f"Detection needs a Detector; got {type(model).__name__}. models.build('fcos_tiny', classes=...) is "
                "one, and models.detectors_elsewhere wraps those of torchvision and transformers."
            )

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        if not isinstance(batch, Mapping) or not {"images", "targets"} <= batch.keys():
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"Detection needs batches with images and targets; got {got}. data.coco makes them.")
        images, targets = batch["images"], batch["targets"]
        return {"images": images, "targets": targets}, {"images": images, "targets": None}, batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        s, t = _detected(student, "student"), None if teacher is None else _detected(teacher, "teacher")
        blocks = []
        if t is not None:
            _fit(s, t)
            if self.class_rows:
                own, theirs = self._places(s, t, batch["images"].shape[2:])
                blocks = [self._classes(s, t, own, theirs), *self._sides(s, t, own, theirs)]
        return [*blocks, _images(s, t, batch)]

    def row_weights(self, batch: Any) -> dict[str, float]:
        return dict.fromkeys(("classes", "sides", "images"), float(len(batch["images"])))

    def headline(self) -> tuple[str, bool]:
        return "map", True

    # the blocks

    @torch.no_grad()
    def _places(self, s: Detected, t: Detected, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which anchors of each image are rows, (B, k), of the student and of the teacher."""
        if s.queries != t.queries or (not s.queries and s.logits.shape[1] != t.logits.shape[1]):
            raise ValueError(
                f"the student has {_kind(s)} and the teacher {_kind(t)}, which do not correspond. Give both the same "
                "strides, or distil their features alone: Detection(class_rows=False)."
            )
        k = min(self.keep, s.logits.shape[1], t.logits.shape[1])
        theirs = t.foreground.amax(-1).topk(k).indices
        return (_matched(s, t, theirs, size) if s.queries else theirs), theirs

    def _classes(self, s: Detected, t: Detected, own: Tensor, theirs: Tensor) -> Rows:
        a, b = (_at(side.logits, place) for side, place in ((s, own), (t, theirs)))
        if self.classes == "binary" and not s.sigmoid:
            raise ValueError("classes='binary' is for heads of sigmoids, and these have a softmax. Use 'background'.")
        if self.classes == "binary":
            a, b = (torch.stack((x, torch.zeros_like(x)), -1) for x in (a, b))
        elif s.sigmoid:
            a, b = (torch.cat((x, torch.zeros_like(x[..., :1])), -1) for x in (a, b))
        weight = a.new_full(a.shape[:-1], 1.0 / max(1, a[0, ..., 0].numel())).flatten()
        return _block(a, b, weight, "classes")

    def _sides(self, s: Detected, t: Detected, own: Tensor, theirs: Tensor) -> list[Rows]:
        if s.bins is None or t.bins is None:
            return []
        if s.bins.shape[-1] != t.bins.shape[-1]:
            raise ValueError(
                f"the student's sides have {s.bins.shape[-1]} bins and the teacher's {t.bins.shape[-1]}. Give both as "
                "many."
            )
        sure = _at(t.foreground.amax(-1, keepdim=True), theirs).squeeze(-1).to(s.bins.dtype)
        weight = (sure / sure.sum(1, keepdim=True) / 4).unsqueeze(-1).expand(-1, -1, 4)
        pairs = ((s.bins, own), (t.bins, theirs))
        a, b = (_at(side.flatten(2), place).view(*place.shape, 4, -1) for side, place in pairs)
        return [_block(a, b, weight.flatten(), "sides")]

    # what is said of a student

    def score(self, student: nn.Module, batches: Iterable[Any], *, teacher: Teaches | None = None) -> dict[str, float]:
        """map, map50 and map75 (COCO's, over 100 boxes an image) in [0, 1], and loss, the mean of the images' ones."""
        seen = collect_detections(self, student, batches)
        out = average_precision(seen["student"], seen["truth"], seen["classes"])
        return {name: out[name] for name in ("map", "map50", "map75")} | {"loss": seen["loss"]}

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: Teaches | None = None,
        temperatures: Callable[[Rows], Any] | None = None,
    ) -> dict[str, Any]:
        """Average precision by class and side, agreement with the teacher, and a few images with all boxes."""
        from tempering.tasks.sample_images import picture

        seen = collect_detections(self, student, batches, teacher, pictures=self.pictures)
        names = getattr(batches, "class_names", None)
        sides = [side for side in ("student", "teacher") if seen[side]]
        found = {side: average_precision(seen[side], seen["truth"], seen["classes"]) for side in sides}
        out = {
            "class_names": None if names is None else list(names),
            "detection": {
                "map": {side: values["map"] for side, values in found.items()},
                "map_by_class": {side: values["by_class"] for side, values in found.items()},
                "found": (again := teacher_recall(seen["student"], seen["teacher"])),
                "sure": CONFIDENT,
                "pictures": [],
            },
        }
        if again is not None:
            out["scores"] = {"agreement": again}
        for i, image in enumerate(seen["images"]):
            shown = {side: confident_boxes(seen[side][i]) for side in sides} | {"truth": seen["truth"][i]}
            out["detection"]["pictures"].append(picture(image, shown))
        return out


@torch.no_grad()
def collect_detections(
    task: Task, student: nn.Module, batches: Iterable[Any], teacher: Teaches | None = None, *, pictures: int = 0
) -> dict[str, Any]:
    """What both find, and the truth, on the CPU: a list an image under "student", "teacher" and "truth".

    And "images", the first ``pictures`` that have boxes first in the loader's order, "classes", how many there are, and
    "loss". The student's mode is put back.

    Raises:
        ValueError: for batches that hold nothing.
    """
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    training, lost = student.training, 0.0
    out: dict[str, Any] = {"student": [], "teacher": [], "truth": [], "images": [], "classes": 0}
    student.eval()
    try:
        for batch in batches:
            batch = to_device(batch, device)
            student_in, teacher_in, ids = task.inputs(batch)
            size = tuple(batch["images"].shape[2:])
            said = _detected(student(student_in), "student")
            lost += float(sum(loss.double().sum() for loss in said.losses.values()))
            taught = None if teacher is None else _detected(teacher(teacher_in, ids), "teacher")
            out["classes"] = said.logits.shape[-1] - (not said.sigmoid)
            for name, answer in (("student", said), ("teacher", taught)):
                out[name] += [] if answer is None else to_device(detections(answer, size), "cpu")
            out["truth"] += to_device(list(batch["targets"]), "cpu")
            out["images"] += list(batch["images"][: max(0, pictures - len(out["images"]))].cpu())
    finally:
        student.train(training)
    if not out["truth"]:
        raise ValueError("there is nothing to score: the loader yields no batches. Is the split empty?")
    return out | {"loss": lost / len(out["truth"])}


def confident_boxes(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The boxes with a score of SURE or more."""
    kept = found["scores"] >= CONFIDENT
    return {name: value[kept] for name, value in found.items()}


def teacher_recall(student: Sequence[Mapping[str, Tensor]], teacher: Sequence[Mapping[str, Tensor]]) -> float | None:
    """The share of the teacher's sure boxes that a sure one of the student's class meets at an IoU of FOUND or more."""
    met = count = 0
    if not teacher:
        return None
    for mine, theirs in zip(map(confident_boxes, student), map(confident_boxes, teacher), strict=True):
        count += len(theirs["labels"])
        near = iou(theirs["boxes"][:, None], mine["boxes"][None]) >= MATCH_IOU
        met += int((near & (theirs["labels"][:, None] == mine["labels"][None])).any(1).sum())
    return met / count if count else None


def _detected(output: Any, side: str) -> Detected:
    if isinstance(output, Detected):
        return output
    raise ValueError(
        f"the {side} must answer Detected for detection; got {type(output).__name__}. Cached answers do not do: give "
        "the model itself, teachers.Live(model)."
    )


def _kind(said: Detected) -> str:
    return f"{said.logits.shape[1]} {'queries' if said.queries else 'anchors'}"


def _fit(s: Detected, t: Detected) -> None:
    """Refuse two models that do not speak of the same things."""
    if s.sigmoid != t.sigmoid:
        raise ValueError("one model's head is of sigmoids and the other's a softmax; give both the same kind.")
    if s.logits.shape[-1] != t.logits.shape[-1]:
        own, theirs = (side.logits.shape[-1] - (not side.sigmoid) for side in (s, t))
        raise ValueError(
            f"the student detects {own} classes and the teacher {theirs}. Give both heads the same classes in the same "
            f"order, such as models.build(name, classes={theirs})."
        )
    if len(s.levels) != len(t.levels):
        raise ValueError(
            f"the student's neck has {len(s.levels)} levels and the teacher's {len(t.levels)}. Give both the same "
            "strides."
        )


def _at(x: Tensor, place: Tensor) -> Tensor:
    """(B, A, n) at anchors (B, k), (B, k, n)."""
    return x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _block(student: Tensor, teacher: Tensor, weight: Tensor, name: str) -> Rows:
    """Rows without labels of two (..., C)."""
    target = torch.full(weight.shape, IGNORE_INDEX, device=weight.device)
    return Rows(student.flatten(0, -2), teacher.flatten(0, -2), target, weight, name=name)


def _images(s: Detected, t: Detected | None, batch: Any) -> Rows:
    """The last block; a gradient path leads to every loss, also where no image has a box."""
    logits = 0.0 * upcast_to_float32(s.logits).flatten(1).mean(1, keepdim=True)
    hard = torch.stack([upcast_to_float32(loss) for loss in s.losses.values()]).sum(0) if s.losses else None
    target = torch.full((len(logits),), IGNORE_INDEX, device=logits.device)
    features = {}
    if t is not None:
        features = {f"p{i}": pair for i, pair in enumerate(zip(s.levels, t.levels, strict=True))}
        features["boxes"] = (truth := _padded(batch), truth)
        if not t.queries:
            features["scores"] = (best := t.foreground.amax(-1).detach(), best)
    taught = torch.zeros_like(logits).detach()
    return Rows(logits, taught, target, features=features, name="images", ids=batch.get("ids"), task_loss=hard)


def _padded(batch: Any) -> Tensor:
    """The true boxes (B, M, 4) as xyxy in [0, 1] of the image, M >= 1; rows of -1 where an image has fewer."""
    height, width = batch["images"].shape[2:]
    every = [target["boxes"] for target in batch["targets"]]
    boxes = [own / own.new_tensor([width, height, width, height]) for own in every]
    most = max([1, *map(len, boxes)])
    return torch.stack([nn.functional.pad(own, (0, 0, 0, most - len(own)), value=-1.0) for own in boxes])


def _matched(s: Detected, t: Detected, theirs: Tensor, size: Sequence[int]) -> Tensor:
    """The student's query for each of the teacher's ``theirs`` (B, k), each once: the least total distance.

    Distance is L1 of the class probabilities, L1 of the boxes in shares of the image, and 1 - GIoU, weighted 2, 5 and
    2.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("queries are matched by scipy: pip install 'tempering[detection]'") from error
    places, scale = [], t.boxes.new_tensor([size[1], size[0]] * 2)
    for i, chosen in enumerate(theirs):
        p, q = (side.foreground[i] for side in (s, t))
        q, boxes = q[chosen], t.boxes[i][chosen]
        away = 2.0 * (q[:, None] - p[None]).abs().sum(-1)
        away += 5.0 * ((centered(boxes)[:, None] - centered(s.boxes[i])[None]).abs() / scale).sum(-1)
        away += 2.0 * (1.0 - giou(boxes[:, None], s.boxes[i][None]))
        _, columns = linear_sum_assignment(torch.nan_to_num(away, nan=1e6, posinf=1e6).cpu().numpy())
        places.append(torch.from_numpy(columns).to(theirs.device))
    return torch.stack(places)
