"""COCO's average precision, counted by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def average_precision(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], classes: int
) -> dict[str, Any]:
    """map (over IoU 0.5 to 0.95), map50, map75 in [0, 1], and "by_class": map of each class, None where it has no box.

    Args:
        found: of each image boxes (D, 4) as xyxy, scores (D,) and labels (D,); the best 100 count.
        truth: of each image boxes (M, 4) and labels (M,).
        classes: how many there are.

    Raises:
        ImportError: without pycocotools.
        ValueError: where no image has a box.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("mAP is counted by pycocotools: pip install 'tempering[detection]'") from error
    if not any(len(t["labels"]) for t in truth):
        raise ValueError("average precision needs boxes, and no image of this split has one. Is it the right file?")
    head = {
        "info": {},
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": c} for c in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        sides = []
        for said in (truth, found):
            side = COCO()
            side.dataset = head | {"annotations": _annotations(said)}  # pyright: ignore[reportAttributeAccessIssue]
            side.createIndex()
            sides.append(side)
        counted = COCOeval(*sides, iouType="bbox")
        counted.evaluate()
        counted.accumulate()
    precision: np.ndarray = counted.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), -1: no truth

    def mean(part: np.ndarray) -> float | None:
        known = part[part > -1]
        return float(known.mean()) if len(known) else None

    return {
        "map": mean(precision),
        "map50": mean(precision[0]),
        "map75": mean(precision[5]),
        "by_class": [mean(precision[:, :, c]) for c in range(classes)],
    }


def _annotations(images: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for i, said in enumerate(images):
        scores = said["scores"].tolist() if "scores" in said else [1.0] * len(said["labels"])
        for box, label, score in zip(said["boxes"].double().tolist(), said["labels"].tolist(), scores, strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            own = {"bbox": [box[0], box[1], width, height], "area": width * height, "iscrowd": 0, "score": score}
            out.append({"id": len(out) + 1, "image_id": i, "category_id": label, **own})
    return out
