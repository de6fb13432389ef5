"""Change the training batches of a run: class weights, MixUp and CutMix with soft labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tempering.data.batches import LABELS, WEIGHTS, LabeledBatch, labeled_batch
from tempering.rows import class_labels, is_labeled, is_soft
from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.tasks.two_view import CutMix, MixUp
from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import CachedTeacher
from tempering.training.config import TrainConfig


class BatchChanges:
    """Weigh the samples of a batch by class, and mix its images and labels.

    Every draw is a function of (seed, rank, epoch, batch) alone, so a resumed run mixes the same images. A batch is
    mixed by MixUp or by CutMix; with both, each has probability 1/2. Mixed samples have no ids.

    Args:
        config: ``mixup`` and ``cutmix`` (alpha, 0 for none), ``class_weights`` and ``seed``.
        classes: number of classes.
        rank: of this process.
        labels: (N,) of the training set, for balanced class weights; None if they are not known.

    Raises:
        ValueError: for class weights of another number of classes, or balanced ones without labels.
    """

    def __init__(self, config: TrainConfig, classes: int, *, rank: int = 0, labels: Tensor | None = None) -> None:
        self.seed, self.rank, self.classes = config.seed, rank, classes
        self.mixes = [mix(alpha) for mix, alpha in ((MixUp, config.mixup), (CutMix, config.cutmix)) if alpha]
        given = config.class_weights
        self.class_weights = None if given is None else _class_weights(given, classes, labels)

    def __call__(self, batch: Any, epoch: int, number: int) -> LabeledBatch | dict[str, Any]:
        """Return the batch of this number in the epoch, changed."""
        parts = labeled_batch(batch)
        if self.class_weights is not None:
            weight = self.class_weights.to(parts.labels.device)[class_labels(parts.labels).clamp_min(0).long()]
            weight = torch.where(is_labeled(class_labels(parts.labels)), weight, 1.0)
            parts = parts._replace(weight=weight if parts.weight is None else weight * parts.weight)
            if not self.mixes and isinstance(batch, Mapping):  # which may have columns for the teacher
                return {**batch, WEIGHTS[0]: parts.weight}
        return self._mixed(parts, epoch, number) if self.mixes else parts

    def _mixed(self, parts: LabeledBatch, epoch: int, number: int) -> LabeledBatch:
        x = parts.inputs
        fewest = 3 if any(isinstance(mix, CutMix) for mix in self.mixes) else 2
        if not isinstance(x, Tensor) or x.ndim < fewest or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                "mixup= and cutmix= (--mixup, --cutmix) mix one tensor of floats, CutMix images (N, C, H, W); got "
                f"{got}."
            )
        key = f"{self.seed}/{self.rank}/{epoch}/{number}/mix"
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little"))  # pyright: ignore[reportUnknownMemberType]
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            mixed, partner, share = mix.mix(x)
        labels = soft_labels(parts.labels, self.classes, x.dtype)
        weight = parts.weight
        return LabeledBatch(
            mixed,
            torch.lerp(labels[partner], labels, share),
            None,
            None if weight is None else torch.lerp(weight[partner], weight, share),
        )


def batch_changes(
    config: TrainConfig, task: Task, teacher: Teacher | None, loader: Any, *, classes: int, rank: int
) -> BatchChanges:
    """Create the changes that the config asks for.

    Raises:
        ValueError: for a task or a teacher that they do not suit.
    """
    names = ", ".join(f"{name}=" for name in ("mixup", "cutmix", "class_weights") if getattr(config, name))
    if not isinstance(task, Classification):
        raise ValueError(
            f"{names} change batches of inputs and labels, those of tasks.Classification; got {type(task).__name__}. "
            "Change the batches in the loader or in the task."
        )
    if teacher is not None and (config.mixup or config.cutmix):
        for part in teacher.leaves:
            if isinstance(part, CachedTeacher) or part.reads_outputs:
                raise ValueError(
                    f"{names} mix images, and {type(part).__name__} has the teacher's outputs for the images as they "
                    "are. Give the model itself: teachers.Live(model)."
                )
        if teacher.columns:
            raise ValueError(
                f"{names} mix images of two samples, and {type(teacher).__name__} reads the column "
                f"{teacher.columns[0]!r} of one sample. Leave {names} out."
            )
    return BatchChanges(config, classes, rank=rank, labels=dataset_labels(loader))


def soft_labels(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels as (N, C) probabilities; rows without a label are 0.

    Raises:
        ValueError: for a label that is no class (checked on the CPU only).
    """
    if is_soft(labels):
        return labels.to(dtype)
    known = is_labeled(labels)
    if labels.device.type == "cpu" and bool((labels >= classes).any()):  # without waiting for a device
        raise ValueError(f"label {int(labels.max())} is out of range for {classes} classes (the first is 0).")
    index = labels.long().masked_fill(~known, 0).unsqueeze(1)
    zeros = torch.zeros(len(labels), classes, dtype=dtype, device=labels.device)
    return zeros.scatter_(1, index, known.unsqueeze(1).to(dtype))


def dataset_labels(loader: Any) -> Tensor | None:
    """Return the labels of a loader's data set, where it has them without loading the samples."""
    dataset = getattr(loader, "dataset", loader)
    indices = getattr(dataset, "indices", getattr(dataset, "index", None))  # of a torch Subset, a TextPairLoader
    dataset = getattr(dataset, "dataset", dataset) if indices is not None else dataset
    found = getattr(dataset, "labels", getattr(dataset, "targets", None))
    tensors = getattr(dataset, "tensors", ())
    if found is None and len(tensors) > 1:
        found = tensors[1]
    column = next((name for name in LABELS if name in (getattr(dataset, "column_names", None) or ())), None)
    if found is None and column is not None and hasattr(dataset, "select_columns"):  # of datasets
        found = dataset.with_format("numpy").select_columns(column)[:][column]
    try:
        labels = None if found is None else torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):  # texts, or boxes of unequal numbers
        labels = None
    if labels is None:
        return None
    return labels if indices is None else labels[torch.as_tensor(indices)]


def _class_weights(given: Sequence[float] | str, classes: int, labels: Tensor | None) -> Tensor:
    if not isinstance(given, str):
        if len(given) != classes:
            raise ValueError(f"class_weights= needs a weight per class, {classes}; got {len(given)}.")
        return torch.tensor(given, dtype=torch.float32)
    if labels is None:
        raise ValueError(
            "class_weights='balanced' counts the labels of the training set, and the loader has neither labels nor a "
            "dataset with labels or targets. Give the weights, one per class: class_weights=(1.0, 0.5, ...)."
        )
    counts = torch.bincount(labels[is_labeled(labels)].long(), minlength=classes).float()
    return torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp_min(1)), 1.0)
