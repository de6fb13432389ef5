"""A small detector distilled from a wider one, on any folder in COCO's format or on shapes drawn from a seed.

Command:  tempering run recipes/detection.py --method fgd                       (shapes, no download)
          tempering run recipes/detection.py --data DIR --method "sum(fgd, dtkd(hard=0))"
Table:    tempering compare recipes/detection.py --methods supervised,fgd,mgd --seeds 3 --out OUT -- --data DIR
Recorded: benchmarks/results/detection-bccd/README.md has the command of its table; make gpu-detection, a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering import Run, distill
from tempering.data import Splits
from tempering.data.coco import coco
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.base import Method
from tempering.methods.combine import Sum
from tempering.methods.features.base import FeatureMethod
from tempering.methods.logits.supervised import Supervised
from tempering.models import load
from tempering.models.detector import Detector, inherit
from tempering.models.external_detectors import detector
from tempering.tasks.detection import Detection
from tempering.teachers import Live
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

COLUMNS = ["test/map", "test/map50", "test/map75"]  # of the table
WARMUP = 0.05  # share of the run in which the learning rate rises


def schedule(progress: float) -> float:
    """A short rise, then half a cosine down to nothing."""
    return min(1.0, progress / WARMUP + 0.02) * 0.5 * (1.0 + math.cos(math.pi * progress))


def main(
    *,
    data: Path | None = None,
    method: str = "fgd",
    temperature: str | None = None,
    teacher: str = "fcos_wide",
    student: str = "fcos_tiny",
    inherit_neck: bool = False,
    rows: Literal["background", "binary"] = "background",
    keep: int = 64,
    size: int | None = None,
    fit: Literal["letterbox", "stretch"] = "letterbox",
    augment: bool = False,
    label: str | None = None,
    epochs: int = 24,
    batch_size: int = 8,
    lr: float = 2e-3,
    subset: int | None = None,
    seed: int = 0,
    teacher_weights: Path | None = None,
    teacher_epochs: int | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    threads: int | None = None,
    evaluate_every: int = 4,
    checkpoint_every: int | None = None,
    selfcheck: bool = True,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a detector; the teacher is trained first, once, where there are no weights of it.

    Args:
        data: a folder in COCO's format, annotations_SPLIT.json with images/ or COCO's own layout; by itself shapes.
        method: an arm or a method, such as supervised, fgd, mgd, pkd, dtkd, or "sum(fgd, dtkd(hard=0))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        teacher: net of the teacher, such as fcos_large, torchvision:fcos_resnet50_fpn or transformers:d_fine.
        student: net of the student, such as fcos_tiny, fcos_nano, fcos_tiny_bins (with bins, for LD).
        inherit_neck: begin with the teacher's neck and head, where a method has a teacher.
        rows: of the class logits: background, a row an anchor; binary, a row for each class of an anchor.
        keep: anchors of an image, those the teacher is surest of, whose logits are rows.
        size: pixels a side, a multiple of 32; by itself 96 for shapes and 192 for a folder.
        fit: letterbox keeps an image's proportions; stretch does not.
        augment: change training images by the size of their objects, as Inconsistent KD does, for two thirds of the
            run; of a folder's alone.
        label: what tables call this run; by itself it follows from the method.
        epochs: how long; the schedule is in shares of it.
        batch_size: images a step.
        lr: learning rate at its height, of both.
        subset: train on this many images, the teacher too; by itself all.
        seed: of the student's first weights, of the order and of the augmentation.
        teacher_weights: a safetensors file of a trained teacher; by itself it is trained here.
        teacher_epochs: how long the teacher is trained; by itself as long as the student.
        precision: of the training.
        accelerator: auto, cpu, cuda or mps.
        devices: how many.
        strategy: auto, ddp or fsdp, for more than one device.
        threads: of torch; by itself as many as there are cores.
        evaluate_every: epochs between evaluations.
        checkpoint_every: steps between checkpoints; by itself one an epoch.
        selfcheck: look at the first batch before an hour is spent.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/detection/TEACHER-STUDENT/METHOD-SEED.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/detection", f"{teacher}-{student}", f"{slug(arm.name)}-{seed}")
    read = partial(_read, data, size=size, fit=fit, subset=subset, batch_size=batch_size)
    splits = read(seed=seed, epochs=epochs, augment=augment)
    train = partial(
        distill,
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=1e-4),
        schedule=schedule,
        clip=10.0,
        precision=precision,
        accelerator=accelerator,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        selfcheck=selfcheck,
        resume=resume,
        quiet=quiet,
    )
    learner, taught, said = _new(student, splits, seed=seed), None, None
    about: dict[str, Any] = {"name": student}
    if loss.needs_teacher:
        net, length = _new(teacher, splits, seed=0), teacher_epochs or epochs
        said = {"name": teacher, "parameters": sum(p.numel() for p in net.parameters())}
        if teacher_weights is not None:
            load(net, teacher_weights)
        else:
            teach = partial(_teach, net, teacher, read, partial(train, epochs=length))
            key = {"data": splits.train.identity, "epochs": length, "batch_size": batch_size, "lr": lr, "seed": 0}
            key |= {"precision": precision}
            said["scores"] = trained(net, teacher, out.parent / "teachers", teach, key=key)
        if inherit_neck:
            about["left"] = inherit(learner, net)
        taught = Live(net)
    return train(
        learner,
        taught,
        splits.train,
        method=loss,
        task=Detection(classes=rows, class_rows=_asks_rows(loss), keep=keep),
        epochs=epochs,
        validation=splits.validation,
        test=splits.test,
        devices=devices,
        strategy=strategy,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={
            "label": label or arm.label,
            "student": about,
            "teacher": said,
            "data": _facts(splits),
            "columns": COLUMNS,
        },
    )


def _read(
    data: Path | None,
    *,
    size: int | None,
    fit: Literal["letterbox", "stretch"],
    subset: int | None,
    batch_size: int,
    seed: int,
    epochs: int,
    augment: bool = False,
) -> Splits:
    if data is None:
        made = synthetic_shapes(size=size or 96, batch_size=batch_size, seed=seed, epochs=epochs)
        return made if subset is None else made._replace(train=made.train.subset(subset))
    changes = []
    if augment:
        from tempering.data.inconsistent import SampleSpecific

        changes = [SampleSpecific()]
    own: dict[str, Any] = {"seed": seed, "epochs": epochs, "augment": changes, "subset": subset}
    return coco(data, size=size or 192, fit=fit, batch_size=batch_size, **own)


def _teach(net: nn.Module, name: str, read: Callable[..., Splits], train: Callable[..., Run], folder: Path) -> None:
    """The teacher's own training: the same recipe, seed 0, images as they are."""
    own = read(seed=0, epochs=1)
    train(
        net,
        None,
        own.train,
        method=Supervised(),
        task=Detection(),
        validation=own.validation,
        test=own.test,
        out=None if CHECK_ONLY.get() else folder,
        facts={"label": f"teacher {name}", "student": {"name": name}, "data": _facts(own)},
    )


def _facts(splits: Splits) -> dict[str, Any]:
    """What a record says of the data, with the boxes that were left out."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return splits.facts() | {"dropped": {name: getattr(part, "dropped", {}) for name, part in parts.items()}}


def _asks_rows(loss: Method) -> bool:
    """Whether some part of the method looks at class logits: not the step of one, nor features, nor labels alone."""
    parts = [m for m in loss.modules() if isinstance(m, Method) and not isinstance(m, Sum | FeatureMethod | Supervised)]
    return bool(parts) and not loss.owns_step


def _new(name: str, splits: Splits, *, seed: int) -> Detector:
    """The net with the first weights of that seed, the same in every arm."""
    torch.manual_seed(seed)
    return detector(name, classes=splits.train.classes)
