"""Object detection: one row per anchor's classes, per box side, and per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.models.boxes import centered, iou, match_costs, match_one_to_one
from tempering.models.detector import Detected, Detector, detections
from tempering.rows import IGNORE_INDEX, Rows, upcast_to_float32
from tempering.tasks.average_precision import average_precision
from tempering.tasks.base import NothingToScoreError, Task, TeacherForward, evaluating
from tempering.utils.tensors import numbers_on, to_device

MATCH_IOU = 0.5  # smallest IoU at which a box matches the teacher's
CONFIDENT = 0.3  # smallest score of the boxes that are compared to the teacher's, and shown


class Detection(Task):
    """Task with batches of images, targets and ids, as ``data.coco`` makes them; models are ``Detector``s.

    Each batch of B images has up to three blocks of rows, each of total weight B:

    - "classes": the class logits of the ``keep`` anchors (or queries) per image with the teacher's largest scores, on
      both sides at the same anchors; an anchor has weight 1 / keep. Rows have no labels. Queries are first matched one
      to one by the smallest distance of classes and boxes.
    - "sides", if both models have bins: each side of the same anchors' boxes, weighted by the anchor's share of the
      teacher's scores in the image. This replaces the positives, whose number is not known before the forward.
    - "images", the last one: one row per image, with the student's own losses as ``task_loss``. Its features are the
      neck's maps "p0", "p1", ..., shallow to deep, and "boxes": the true boxes (B, M, 4) as xyxy in [0, 1], padded with
      -1, and, except for queries, "scores": the teacher's largest score of each anchor (B, A). Those of queries, of the
      last L decoder layers, are "query_sigmoid" or, with a softmax, "query_softmax": their logits (B, L, Q, K), and
      "query_boxes" (B, L, Q, 4) as center, width and height in [0, 1]. Its logits are zeros of one class, at which
      divergences vanish.

    Detectors with two stages have rows of the anchors of their first stage, of one logit: whether there is an object.

    Without a teacher there is only the last block.

    Args:
        classes: rows of the class block: "background" has a row per anchor, over the classes and a background of logit
            0 (softmax heads have their own); "binary" has a row of two for each class of an anchor, for sigmoid heads.
        class_rows: False makes only "images", for feature methods, methods that own their step, and detectors with
            different anchors.
        keep: anchors per image that are rows.
        pictures: number of images in the report.
        features: further features of the last block, name -> (student's module, teacher's module).

    Raises:
        ValueError: for invalid options.
    """

    remember = False  # outputs contain feature maps

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
                "one, and models.external_detectors.wrap(model) makes one of a detector of torchvision or transformers."
            )

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        if not isinstance(batch, Mapping) or not {"images", "targets"} <= batch.keys():
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"Detection needs batches with images and targets; got {got}. data.coco makes them.")
        images, targets = batch["images"], batch["targets"]
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(targets):
            got = tuple(images.shape) if isinstance(images, Tensor) else f"{type(images).__name__} of {len(images)}"
            raise ValueError(
                f"Detection needs images (B, 3, H, W) in one tensor, with a target each; got {got} and {len(targets)} "
                "targets. Images of different sizes? Pad or resize them to one: data.coco(folder, size=...) does."
            )
        return {"images": images, "targets": targets}, {"images": images, "targets": None}, batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        s, t = _detected(student, "student"), None if teacher is None else _detected(teacher, "teacher")
        blocks = []
        if t is not None:
            _check_comparable(s, t)
            if self.class_rows:
                s_index, t_index = self._anchors(s, t, batch["images"].shape[2:])
                blocks = [self._class_rows(s, t, s_index, t_index), *self._side_rows(s, t, s_index, t_index)]
        return [*blocks, _image_rows(s, t, batch)]

    def row_weights(self, batch: Any) -> dict[str, float]:
        return dict.fromkeys(("classes", "sides", "images"), float(len(batch["images"])))

    def headline(self) -> tuple[str, bool]:
        return "map", True

    # blocks of rows

    @torch.no_grad()
    def _anchors(self, s: Detected, t: Detected, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the anchors of each image that are rows, (B, k), of the student and of the teacher."""
        if s.queries != t.queries or (not s.queries and s.logits.shape[1] != t.logits.shape[1]):
            raise ValueError(
                f"the student has {_kind(s)} and the teacher {_kind(t)}, which do not correspond. Give both the same "
                "strides, or distill features only: Detection(class_rows=False)."
            )
        k = min(self.keep, s.logits.shape[1], t.logits.shape[1])
        index = t.foreground.amax(-1).topk(k).indices
        return (_match_queries(s, t, index, size) if s.queries else index), index

    def _class_rows(self, s: Detected, t: Detected, s_index: Tensor, t_index: Tensor) -> Rows:
        a, b = (_gather(side.logits, index) for side, index in ((s, s_index), (t, t_index)))
        if self.classes == "binary" and not s.sigmoid:
            raise ValueError("classes='binary' is for sigmoid heads, and these have a softmax. Use 'background'.")
        if self.classes == "binary":
            a, b = (torch.stack((x, torch.zeros_like(x)), -1) for x in (a, b))
        elif s.sigmoid:
            a, b = (torch.cat((x, torch.zeros_like(x[..., :1])), -1) for x in (a, b))
        weight = a.new_full(a.shape[:-1], 1.0 / max(1, a.shape[1:-1].numel())).flatten()
        return _block(a, b, weight, "classes")

    def _side_rows(self, s: Detected, t: Detected, s_index: Tensor, t_index: Tensor) -> list[Rows]:
        if s.bins is None or t.bins is None:
            return []
        if s.bins.shape[-1] != t.bins.shape[-1]:
            raise ValueError(
                f"the student's sides have {s.bins.shape[-1]} bins and the teacher's {t.bins.shape[-1]}. Give both the "
                "same number."
            )
        score = _gather(t.foreground.amax(-1, keepdim=True), t_index).squeeze(-1).to(s.bins.dtype)
        weight = (score / score.sum(1, keepdim=True) / 4).nan_to_num(0.0).unsqueeze(-1).expand(-1, -1, 4)
        pairs = ((s.bins, s_index), (t.bins, t_index))
        a, b = (_gather(bins.flatten(2), index).view(*index.shape, *bins.shape[2:]) for bins, index in pairs)
        return [_block(a, b, weight.flatten(), "sides")]

    # scores

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return COCO's map, map50 and map75 (100 boxes per image) in [0, 1], and the mean loss per image."""
        outputs = collect_detections(self, student, batches)
        out = average_precision(outputs["student"], scored_boxes(outputs["truth"]), outputs["classes"])
        return {name: out[name] for name in ("map", "map50", "map75")} | {"loss": outputs["loss"]}

    def score_teacher(self, teacher: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return {}  # the analysis has the teacher's average precision

    def analyze(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return average precision per class and side, agreement with the teacher, and some images with all boxes."""
        from tempering.tasks.sample_images import picture

        outputs = collect_detections(self, student, batches, teacher, pictures=self.pictures)
        names = getattr(batches, "class_names", None)
        sides = [side for side in ("student", "teacher") if outputs[side]]
        truth = scored_boxes(outputs["truth"])
        precision = {side: average_precision(outputs[side], truth, outputs["classes"]) for side in sides}
        out = {
            "class_names": None if names is None else list(names),
            "detection": {
                "map": {side: values["map"] for side, values in precision.items()},
                "map_by_class": {side: values["by_class"] for side, values in precision.items()},
                "found": (agreement := teacher_recall(outputs["student"], outputs["teacher"])),
                "sure": CONFIDENT,
                "pictures": [],
            },
        }
        if agreement is not None:
            out["scores"] = {"agreement": agreement}
        for i, image in sorted(outputs["images"].items(), key=lambda item: (-_differing(outputs, item[0]), item[0])):
            shown = {side: confident_boxes(outputs[side][i]) for side in sides} | {"truth": outputs["truth"][i]}
            out["detection"]["pictures"].append(picture(image, shown))
        return out


def collect_detections(
    task: Task, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward | None = None, *, pictures: int = 0
) -> dict[str, Any]:
    """Collect the detections of both models and the true boxes on the CPU, and restore the student's mode.

    Returns:
        Lists with one entry per image, "student", "teacher" and "truth"; "images", number -> image, of the ``pictures``
        whose boxes differ most between student and teacher, or else truth; "classes", the number of classes; and
        "loss", the mean per image.

    Raises:
        NothingToScoreError: if there are no batches.
    """
    total_loss = 0.0
    out: dict[str, Any] = {"student": [], "teacher": [], "truth": [], "images": {}, "classes": 0}
    with evaluating(student, batches) as on_device:
        for batch in on_device:
            student_in, teacher_in, ids = task.inputs(batch)
            size = tuple(batch["images"].shape[2:])
            s = _detected(student(student_in), "student")
            total_loss += float(sum(loss.double().sum() for loss in s.losses.values()))
            t = None if teacher is None else _detected(teacher(teacher_in, ids), "teacher")
            out["classes"] = s.logits.shape[-1] - (not s.sigmoid)
            if s.found is not None:  # logits are those of proposals
                out["classes"] = student.classes
            for name, output in (("student", s), ("teacher", t)):
                found = [] if output is None else detections(output, size)
                out[name] += [to_device({n: one[n] for n in ("boxes", "scores", "labels")}, "cpu") for one in found]
            out["truth"] += to_device(list(batch["targets"]), "cpu")
            if pictures:
                keep_pictures(out, batch["images"], pictures)
    if not out["truth"]:
        raise NothingToScoreError("there is nothing to score: the loader yields no batches. Is the split empty?")
    return out | {"loss": total_loss / len(out["truth"])}


def keep_pictures(out: dict[str, Any], images: Tensor, most: int) -> None:
    """Add the images of a batch to "images", and keep the ``most`` whose boxes differ most; the first of equal ones."""
    start = len(out["truth"]) - len(images)
    numbers = [*out["images"], *range(start, len(out["truth"]))]
    kept = sorted(numbers, key=lambda i: (-_differing(out, i), i))[:most]
    out["images"] = {i: out["images"][i] if i < start else images[i - start].cpu() for i in kept}


def _differing(out: Mapping[str, Any], i: int) -> int:
    """Return how many confident boxes of image ``i`` only one of student and teacher (or the true ones) has."""
    student = confident_boxes(out["student"][i])
    other = confident_boxes(out["teacher"][i]) if out["teacher"] else out["truth"][i]
    same = student["labels"][:, None] == other["labels"][None]
    same = same & (iou(student["boxes"][:, None], other["boxes"][None]) >= MATCH_IOU)
    return int((~same.any(1)).sum() + (~same.any(0)).sum())


def scored_boxes(targets: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Tensor]]:
    """Return the true boxes that detections are scored with: a target's "scored", else its own boxes."""
    return [target.get("scored", target) for target in targets]


def confident_boxes(boxes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the boxes with a score of at least CONFIDENT."""
    kept = boxes["scores"] >= CONFIDENT
    return {name: value[kept] for name, value in boxes.items()}


def teacher_recall(student: Sequence[Mapping[str, Tensor]], teacher: Sequence[Mapping[str, Tensor]]) -> float | None:
    """Return the share of the teacher's confident boxes that the student matches: equal class, IoU >= MATCH_IOU."""
    matched = count = 0
    if not teacher:
        return None
    for s, t in zip(map(confident_boxes, student), map(confident_boxes, teacher), strict=True):
        count += len(t["labels"])
        overlaps = iou(t["boxes"][:, None], s["boxes"][None]) >= MATCH_IOU
        matched += int((overlaps & (t["labels"][:, None] == s["labels"][None])).any(1).sum())
    return matched / count if count else None


def _detected(output: Any, side: str) -> Detected:
    if isinstance(output, Detected):
        return output
    raise ValueError(
        f"the {side} must return Detected for detection; got {type(output).__name__}. Cached outputs are not "
        "supported: give the model itself, teachers.Live(model)."
    )


def _kind(output: Detected) -> str:
    return f"{output.logits.shape[1]} {'queries' if output.queries else 'anchors'}"


def _check_comparable(s: Detected, t: Detected) -> None:
    """Check that both outputs have the same kind of head, classes and number of levels."""
    if s.sigmoid != t.sigmoid:
        raise ValueError("one model's head has sigmoids and the other's a softmax; give both the same kind.")
    if s.logits.shape[-1] != t.logits.shape[-1]:
        s_classes, t_classes = (side.logits.shape[-1] - (not side.sigmoid) for side in (s, t))
        raise ValueError(
            f"the student detects {s_classes} classes and the teacher {t_classes}. Give both heads the same classes in "
            f"the same order, such as models.build(name, classes={t_classes})."
        )
    if len(s.levels) != len(t.levels):
        raise ValueError(
            f"the student's neck has {len(s.levels)} levels and the teacher's {len(t.levels)}. Give both the same "
            "strides."
        )


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the values of (B, A, n) at anchors (B, k): (B, k, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _block(student: Tensor, teacher: Tensor, weight: Tensor, name: str) -> Rows:
    """Return rows without labels of two (..., C) tensors."""
    target = torch.full(weight.shape, IGNORE_INDEX, device=weight.device)
    return Rows(student.flatten(0, -2), teacher.flatten(0, -2), target, weight, name=name)


def _image_rows(s: Detected, t: Detected | None, batch: Any) -> Rows:
    """Return the last block; its losses have a gradient path even if no image has a box."""
    logits = 0.0 * upcast_to_float32(s.logits).flatten(1).mean(1, keepdim=True)
    task_loss = torch.stack([upcast_to_float32(loss) for loss in s.losses.values()]).sum(0) if s.losses else None
    target = torch.full((len(logits),), IGNORE_INDEX, device=logits.device)
    features = {}
    if t is not None:
        features = {f"p{i}": pair for i, pair in enumerate(zip(s.levels, t.levels, strict=True))}
        features["boxes"] = (truth := _padded_boxes(batch), truth)
        if t.queries and s.queries:
            features |= _query_features(s, t, batch["images"].shape[2:])
        elif not t.queries:
            features["scores"] = (best := t.foreground.amax(-1).detach(), best)
    zeros = torch.zeros_like(logits).detach()
    return Rows(logits, zeros, target, features=features, name="images", ids=batch.get("ids"), task_loss=task_loss)


def _query_features(s: Detected, t: Detected, size: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the logits (B, L, Q, K) and boxes (B, L, Q, 4), relative to the image, of both sides' decoder layers."""
    scale = numbers_on([size[1], size[0]] * 2, t.boxes)
    layers = [side.layers or (side.logits.unsqueeze(1), side.boxes.unsqueeze(1)) for side in (s, t)]
    logits, boxes = zip(*layers, strict=True)
    relative = tuple(centered(x) / scale for x in boxes)
    return {"query_sigmoid" if s.sigmoid else "query_softmax": logits, "query_boxes": relative}  # pyright: ignore


def _padded_boxes(batch: Any) -> Tensor:
    """Return the true boxes (B, M, 4) as xyxy in [0, 1] of the image, M >= 1, padded with -1."""
    height, width = batch["images"].shape[2:]
    absolute = [target["boxes"] for target in batch["targets"]]
    boxes = [x / numbers_on([width, height, width, height], x) for x in absolute]
    if not boxes:
        return batch["images"].new_zeros(0, 1, 4)
    largest = max([1, *map(len, boxes)])
    return torch.stack([nn.functional.pad(x, (0, 0, 0, largest - len(x)), value=-1.0) for x in boxes])


def _match_queries(s: Detected, t: Detected, t_index: Tensor, size: Sequence[int]) -> Tensor:
    """Match the student's queries one to one to the teacher's ``t_index`` (B, k), by ``match_costs``."""
    scale = numbers_on([size[1], size[0]] * 2, t.boxes)
    boxes, theirs = (centered(side.boxes) / scale for side in (s, t))
    return match_one_to_one(match_costs(_gather(t.foreground, t_index), _gather(theirs, t_index), s.foreground, boxes))
