"""Distill a detector in one call: its family chooses the method, the weights and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tempering.data.batches import Splits
from tempering.data.detection import DetectionLoader
from tempering.methods.base import Method
from tempering.methods.combine import Sum
from tempering.methods.detection.fgd import FGD
from tempering.methods.detection.query_kd import QueryKD
from tempering.methods.features.base import FeatureMethod
from tempering.methods.logits.supervised import Supervised
from tempering.models.detector import Detector
from tempering.models.external_detectors import wrap
from tempering.models.fcos import FCOS
from tempering.tasks.base import Task
from tempering.tasks.detection import Detection
from tempering.teachers.base import Teacher
from tempering.training.checks import as_method
from tempering.training.config import Run
from tempering.training.distill import distill

SIZE, EPOCHS = 640, 12
WRITE = (
    "Write method= and, for a model that is no Detector, task=, such as distill_detector(student, teacher, data, "
    "method=methods.PKD(), task=MyTask()); or kd.distill(student, teacher, batches, method=..., task=...)."
)


class Family(NamedTuple):
    """The defaults for detectors of one kind; docs/detection.md says where each value comes from.

    Attributes:
        models: the detectors of this family, for messages.
        method: makes the method.
        max_grad_norm: of the gradient of a step.
    """

    models: str
    method: Callable[[], Method]
    max_grad_norm: float


FAMILIES = {
    "anchor-free": Family(
        "FCOS", partial(FGD, foreground=1.6e-3, background=8e-4, attention=8e-4, relation=8e-6), max_grad_norm=10.0
    ),
    "anchor-based": Family(
        "RetinaNet and SSD",
        partial(FGD, foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6),
        max_grad_norm=10.0,
    ),
    "two-stage": Family(
        "Faster, Mask and Keypoint R-CNN",
        partial(FGD, foreground=5e-5, background=2.5e-5, attention=5e-5, relation=5e-7),
        max_grad_norm=10.0,
    ),
    "queries": Family("DETR, Deformable DETR, RT-DETR and D-FINE", QueryKD, max_grad_norm=0.1),
}
ONE_STAGE = {"anchor-free", "anchor-based"}  # their necks have the same strides


def distill_detector(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    data: str | Path | Splits[Any] | Iterable[Any],
    *,
    method: Method | str | None = None,
    task: Task | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Distill a detector into a smaller one; method and weights are those of the student's family (``FAMILIES``).

    The families are FCOS; RetinaNet and SSD; Faster, Mask and Keypoint R-CNN; and DETR-like detectors, of torchvision,
    transformers and this library. The student is trained in place with its own losses beside the method's.

    Args:
        student: the detector to train.
        teacher: a trained detector of the same classes and family; FCOS and RetinaNet go together.
        data: a folder in COCO's format (``data.coco``); ``Splits``, as ``data.coco`` and ``data.synthetic_shapes``
            return; or training batches, as ``tasks.Detection`` takes them.
        method: default: that of the family.
        task: default: ``tasks.Detection()``, with rows of classes if the method uses them.
        epochs, steps: length of the run; default: 12 epochs.
        size: of the images of a folder, in pixels per side; default: 640, and for SSD the size that it is built for.
        batch_size: of a folder; default: 16.
        seed: of the order and augmentation of the images, and of the run.
        out: folder for records, checkpoints and weights; None writes nothing.
        overrides: further options of ``kd.distill``. Defaults that differ from its own: optimizer AdamW with weight
            decay 1e-4 and learning rate 1e-4 (2e-3 for this library's FCOS, which starts from random weights), schedule
            "cosine", warmup 0.05, and max_grad_norm 10 (0.1 for DETR-like detectors).

    Returns:
        The run. ``run.student`` is the student as a ``Detector``: it wraps the model that was given.

    Raises:
        TypeError: for a model that is no known detector, or of no family without ``method``; with the lines to write.
        ValueError: for other classes than the data's, families that do not go together, data without any box, or an
            option of a folder with other data.
    """
    student, source = _as_detector(student, task), _as_detector(teacher, task)
    if method is None:
        family = _family_of(student, source)
        loss = family.method()
        overrides.setdefault("max_grad_norm", family.max_grad_norm)
    else:
        loss = as_method(method)
    folder = {"size": size, "batch_size": batch_size}
    splits = _splits(data, student, folder, epochs=epochs or EPOCHS, seed=seed)
    for name in ("validation", "test"):
        overrides.setdefault(name, getattr(splits, name))
    _check_data(splits.train, {"student": student, "teacher": source})
    lr = 2e-3 if isinstance(student, FCOS) else 1e-4
    defaults: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=1e-4),
        "schedule": "cosine",
        "warmup": 0.05,
    }
    facts: dict[str, Any] = {"family": getattr(student, "family", None)}
    facts |= overrides.pop("facts", None) or {}
    return distill(
        student,
        source,
        splits.train,
        method=loss,
        task=task or Detection(class_rows=uses_class_rows(loss)),
        epochs=EPOCHS if epochs is None and steps is None else epochs,
        steps=steps,
        seed=seed,
        out=out,
        facts=facts,
        **defaults | overrides,
    )


def uses_class_rows(method: Method) -> bool:
    """Return whether a part of the method uses class logits, unlike feature methods and methods that own their step."""
    kinds = (Sum, FeatureMethod, Supervised)
    parts = [m for m in method.modules() if isinstance(m, Method) and not isinstance(m, kinds)]
    return bool(parts) and not method.owns_step


def _as_detector(model: Any, task: Task | None) -> Any:
    """Wrap a model of another library; a teacher object, and a model for a task of the caller's, are returned as is."""
    if isinstance(model, Teacher) or not isinstance(model, nn.Module):
        return model  # ``distill`` names what is no model
    try:
        return wrap(model)
    except TypeError as error:
        if task is not None:
            return model
        raise TypeError(f"{error} {WRITE}") from error


def _family_of(student: Any, teacher: Any) -> Family:
    """Return the student's family.

    Raises:
        TypeError: for a detector of no family.
        ValueError: for families whose necks or outputs do not correspond.
    """
    models = [getattr(model, "model", model) if isinstance(model, Teacher) else model for model in (student, teacher)]
    kinds = [getattr(model, "family", None) for model in models]
    for side, kind, model in zip(("student", "teacher"), kinds, models, strict=True):
        if kind not in FAMILIES and model is not None:
            known = "; ".join(family.models for family in FAMILIES.values())
            raise TypeError(
                f"the {side} {type(model).__name__} is of no family with a default method: {known}. Set family= of the "
                f"class to one of {', '.join(FAMILIES)}, or choose yourself. {WRITE}"
            )
    first, second = kinds
    if second is not None and first != second and not {first, second} <= ONE_STAGE:
        raise ValueError(
            f"the student is {first} ({FAMILIES[str(first)].models}) and the teacher {second} "
            f"({FAMILIES[str(second)].models}): their outputs do not correspond. Use a teacher of the student's "
            "family, or a method over necks whose strides are equal, such as method=methods.PKD()."
        )
    return FAMILIES[str(first)]


def _splits(data: Any, student: Any, folder: dict[str, int | None], *, epochs: int, seed: int) -> Splits[Any]:
    if isinstance(data, str | Path):
        from tempering.data.coco import coco

        needs = getattr(student, "needs", ())
        size = folder["size"] or getattr(student, "image_size", None) or SIZE
        return coco(data, size=size, batch_size=folder["batch_size"] or 16, epochs=epochs, seed=seed, parts=needs)
    if any(value is not None for value in folder.values()):
        raise ValueError(
            "size= and batch_size= are options of a folder in COCO's format; this data has its own. Set them there: "
            "data.coco(folder, size=640, batch_size=16)."
        )
    return data if isinstance(data, Splits) else Splits(data, None, None)  # pyright: ignore


def _check_data(train: Any, models: dict[str, Any]) -> None:
    """Check that models have the classes of the data, and that it has a box."""
    names = getattr(train, "class_names", None)
    for side, model in models.items():
        if names is not None and isinstance(model, Detector) and model.classes != len(names):
            raise ValueError(
                f"the {side} detects {model.classes} classes and the data has {len(names)}: {', '.join(names[:5])}. "
                f"Build it with {len(names)} classes; torchvision's R-CNNs and SSD count the background too: "
                f"num_classes={len(names) + 1}."
            )
    if isinstance(train, DetectionLoader) and not any(map(len, train.boxes)):
        dropped = f"; dropped were {train.dropped}" if train.dropped else ""
        raise ValueError(
            f"no image of the training split {train.name!r} has a box, so there is nothing to learn{dropped}. Is it "
            "the right annotation file?"
        )
