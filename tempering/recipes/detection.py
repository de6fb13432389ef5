"""Distill a small detector from a wider one, on a folder in COCO's format or on synthetic shapes.

Command:  tempering run detection --method fgd                       (shapes, no download)
          tempering run detection --data DIR --method "sum(fgd, dtkd(hard=0))"
Table:    tempering compare detection --methods supervised,fgd,mgd --seeds 3 --out OUT -- --data DIR
Recorded: benchmarks/results/detection-bccd/README.md has the command of its table; `make gpu-detection` runs a larger
          one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering.data import Splits
from tempering.data.coco import coco
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models.detector import Detector, inherit
from tempering.models.external_detectors import detector
from tempering.tasks.detection import Detection
from tempering.teachers import Teacher
from tempering.training.config import TrainConfig
from tempering.training.detector import uses_class_rows
from tempering.training.experiment import Experiment, TeacherRecipe

COLUMNS = ["test/map", "test/map50", "test/map75"]  # of the table
WARMUP = 0.05  # fraction of the run
MAX_GRAD_NORM = 10.0


def schedule(progress: float) -> float:
    """Return the factor on the learning rate: linear warm-up, then cosine decay to 0."""
    return min(1.0, progress / WARMUP + 0.02) * 0.5 * (1.0 + math.cos(math.pi * progress))


def main(
    *,
    data: Path | None = None,
    method: str = "fgd",
    temperature: str | None = None,
    teacher: str = "fcos_wide",
    student: str = "fcos_tiny",
    inherit_neck: bool = False,
    class_rows: Literal["background", "binary"] = "background",
    anchors_per_image: int = 64,
    size: int | None = None,
    resize_mode: Literal["letterbox", "stretch"] = "letterbox",
    augment: bool = False,
    label: str | None = None,
    batch_size: int = 8,
    lr: float = 2e-3,
    subset: int | None = None,
    teacher_weights: Path | None = None,
    teacher_epochs: int | None = None,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=24, max_grad_norm=MAX_GRAD_NORM, evaluate_every=4),
) -> Experiment:
    """Distill a detector; the teacher is trained first, once, if there are no weights of it.

    Args:
        data: a folder in COCO's format, annotations_SPLIT.json with images/ or COCO's own layout; default: shapes.
        method: a preset or a method, such as supervised, fgd, mgd, pkd, dtkd, or "sum(fgd, dtkd(hard=0))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        teacher: the teacher's network, such as fcos_large, torchvision:fcos_resnet50_fpn or transformers:d_fine.
        student: the student's network, such as fcos_tiny, fcos_nano, fcos_tiny_bins (with bins, for LD).
        inherit_neck: start with the teacher's neck and head, if the method has a teacher.
        class_rows: rows of class logits: background, one per anchor; binary, one per anchor and class.
        anchors_per_image: number of anchors per image whose logits are rows: those of the teacher's highest confidence.
        size: pixels per side, a multiple of 32; default: 96 for shapes and 192 for a folder.
        resize_mode: letterbox keeps an image's proportions; stretch does not.
        augment: change training images by the size of their objects, as Inconsistent KD does, for two thirds of the
            run; only for a folder.
        label: name of this run in tables; default: that of the method.
        batch_size: images per step.
        lr: peak learning rate, of both.
        subset: train on this many images, the teacher too; default: all.
        teacher_weights: a trained teacher, .safetensors or .pth; default: it is trained here.
        teacher_epochs: epochs of the teacher's training; default: the student's.
        out: the run's folder; default: runs/detection/TEACHER-STUDENT/METHOD-SEED.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/detection", f"{teacher}-{student}", f"{slug(preset.name)}-{config.seed}")
    read = partial(_read, data, size=size, resize_mode=resize_mode, subset=subset, batch_size=batch_size)
    splits = read(seed=config.seed, epochs=config.epochs or 1, augment=augment)
    build = partial(_build, classes=splits.train.classes)
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=1e-4)
    network, length = build(student, seed=config.seed), teacher_epochs or config.epochs

    def train_teacher(model: nn.Module) -> Experiment:
        """Train with the same recipe and seed 0, without augmentation."""
        teacher_splits = read(seed=0, epochs=1)
        return Experiment(
            student=model,
            **teacher_splits._asdict(),
            method=Supervised(),
            task=Detection(),
            optimizer=optimizer,
            schedule=schedule,
            config=replace(config.for_teacher(length), max_grad_norm=MAX_GRAD_NORM),
            facts={"data": _facts(teacher_splits)},
        )

    key = {"data": splits.train.identity, "epochs": length, "batch_size": batch_size, "lr": lr, "seed": 0}
    teacher_recipe = TeacherRecipe(
        name=teacher,
        build=partial(build, teacher, seed=0),
        train=train_teacher,
        folder=out.parent / "teachers",
        key=key | {"precision": config.precision},
        weights=teacher_weights,
    )
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **splits._asdict(),
        method=loss,
        task=Detection(classes=class_rows, class_rows=uses_class_rows(loss), keep=anchors_per_image),
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        out=out,
        facts={
            "label": label or preset.label,
            "student": {"name": student},
            "data": _facts(splits),
            "columns": COLUMNS,
        },
        bind_teacher=_inherit if inherit_neck else None,
    )


def _inherit(experiment: Experiment, teacher: Teacher) -> Experiment:
    """Copy the teacher's neck and head to the student; record the names of weights whose shapes differ."""
    assert isinstance(experiment.student, Detector) and isinstance(teacher.model, Detector)
    skipped = inherit(experiment.student, teacher.model)
    return replace(experiment, facts={**experiment.facts, "student": {**experiment.facts["student"], "left": skipped}})


def _read(
    data: Path | None,
    *,
    size: int | None,
    resize_mode: Literal["letterbox", "stretch"],
    subset: int | None,
    batch_size: int,
    seed: int,
    epochs: int,
    augment: bool = False,
) -> Splits:
    if data is None:
        splits = synthetic_shapes(size=size or 96, batch_size=batch_size, seed=seed, epochs=epochs)
        return splits if subset is None else splits._replace(train=splits.train.subset(subset))
    augmentations = []
    if augment:
        from tempering.data.inconsistent import SampleSpecific

        augmentations = [SampleSpecific()]
    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "augment": augmentations, "subset": subset}
    return coco(data, size=size or 192, fit=resize_mode, batch_size=batch_size, **options)


def _facts(splits: Splits) -> dict[str, Any]:
    """Return the facts of the data for records, with counts of dropped boxes."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return splits.facts() | {"dropped": {name: getattr(part, "dropped", {}) for name, part in parts.items()}}


def _build(name: str, *, classes: int, seed: int) -> Detector:
    """Build the network with initial weights from the seed, equal for every method."""
    torch.manual_seed(seed)
    return detector(name, classes=classes)
