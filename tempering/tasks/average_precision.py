"""COCO's average precision, computed by faster-coco-eval, or by pycocotools where that is not installed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tempering.tasks.base import NothingToScoreError


def average_precision(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], classes: int
) -> dict[str, Any]:
    """Return map (over IoU 0.5 to 0.95), map50 and map75 in [0, 1], and "by_class": map per class, None without a box.

    Args:
        found: per image boxes (D, 4) as xyxy, scores (D,) and labels (D,); the 100 best are evaluated.
        truth: per image boxes (M, 4) and labels (M,), and optionally "crowd" (M,): whether a box is a crowd.
        classes: number of classes.

    Raises:
        ImportError: without faster-coco-eval and pycocotools.
        NothingToScoreError: if no image has a box that is not a crowd.
    """
    coco, coco_eval = _library()
    if not any(len(t["labels"]) > int(t["crowd"].sum() if "crowd" in t else 0) for t in truth):
        raise NothingToScoreError(
            "average precision needs boxes, and no image of this split has one. Is it the right file?"
        )
    head = {
        "info": {},
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": c} for c in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        sides = []
        for detections in (truth, found):
            side = coco()
            side.dataset = head | {"annotations": _annotations(detections)}
            side.createIndex()
            sides.append(side)
        evaluator = coco_eval(*sides, iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    # (thresholds, recalls, classes), -1: no true box
    precision: np.ndarray = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]

    def mean(part: np.ndarray) -> float | None:
        defined = part[part > -1]
        return float(defined.mean()) if len(defined) else None

    return {
        "map": mean(precision),
        "map50": mean(precision[0]),
        "map75": mean(precision[5]),
        "by_class": [mean(precision[:, :, c]) for c in range(classes)],
    }


def _library() -> tuple[Any, Any]:
    """Return the classes of annotations and of their evaluation; those of both libraries give the same numbers."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # pyright: ignore[reportMissingImports]

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("mAP is computed by faster-coco-eval: pip install 'tempering[detection]'") from error
    return COCO, COCOeval


def _annotations(images: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for i, image in enumerate(images):
        count = len(image["labels"])
        scores = image["scores"].tolist() if "scores" in image else [1.0] * count
        crowds = image["crowd"].int().tolist() if "crowd" in image else [0] * count
        boxes, labels = image["boxes"].double().tolist(), image["labels"].tolist()
        for box, label, score, crowd in zip(boxes, labels, scores, crowds, strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            fields = {"bbox": [box[0], box[1], width, height], "area": width * height, "iscrowd": crowd, "score": score}
            out.append({"id": len(out) + 1, "image_id": i, "category_id": label, **fields})
    return out
