"""Weigh the teachers of an ensemble by their scores on a validation split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

from tempering.tasks.base import Task, with_columns
from tempering.tasks.classification import Classification
from tempering.tasks.row_scores import RowScores
from tempering.teachers.cache.recorder import device_of
from tempering.teachers.combined import Teachers
from tempering.teachers.ensemble import Ensemble
from tempering.utils.tensors import to_device


@torch.no_grad()
def validation_weights(
    teachers: Teachers,
    batches: Iterable[Any],
    *,
    task: Task | None = None,
    by: Literal["accuracy", "loss"] = "accuracy",
) -> list[float]:
    """Return a weight per teacher, in their order, for ``teachers.Ensemble(teachers, weights=...)``; their sum is 1.

    Args:
        teachers: as those of the ensemble; their outputs are (..., C) logits.
        batches: a validation split with labels, read once per teacher.
        task: turns outputs into rows; None is Classification().
        by: "accuracy": a weight is proportional to the accuracy over labeled rows, in [0, 1]. "loss": to exp(-loss),
            the geometric mean of the label's probability.

    Raises:
        ValueError: for an unknown ``by``, a split without labels, or a teacher without outputs for it, naming it.
    """
    if by not in ("accuracy", "loss"):
        raise ValueError(f"validation_weights needs by='accuracy' or 'loss'; got {by!r}.")
    ensemble, values = Ensemble(teachers), list[float]()
    for name in ensemble.parts:
        teacher = ensemble.alone(name).for_batches(batches)
        if teacher is None:
            raise ValueError(f"{ensemble.incompatibility(batches)} A validation split needs live teachers.")
        teacher.bind_data(batches)
        own, scores = with_columns(Classification() if task is None else task, teacher), RowScores()
        for model in teacher.models:
            own.prepare_model(model)
        device = device_of(teacher)
        for batch in batches:
            batch = to_device(batch, device)
            _, inputs, ids = own.inputs(batch)
            scores.add(own.rows(teacher(inputs, ids), None, batch)[-1], None)
        means = scores.means(has_teacher=False, unit=own.unit)
        values.append(means["accuracy"] if by == "accuracy" else math.exp(-means["loss"]))
    if not sum(values) > 0:
        raise ValueError(f"no teacher has a {by} above 0 on this split: are its labels those of the teachers?")
    return [value / sum(values) for value in values]
