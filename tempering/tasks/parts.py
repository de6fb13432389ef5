"""Base of tasks whose rows are parts of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from tempering.data.batches import labeled_batch, with_teacher_outputs
from tempering.tasks.base import Task

Unlabeled = Literal["ignore", "teach"]


class PartsTask(Task):
    """Task whose rows are the labels, numbers or pixels of a sample, of batches as ``Classification`` has them.

    Args:
        unlabeled: parts without a label are left out ("ignore"), or learned from the teacher alone ("teach").
        features: features for feature methods, name -> (student's module, teacher's module), one per sample.

    Raises:
        ValueError: for another ``unlabeled``.
    """

    def __init__(self, unlabeled: Unlabeled, features: Mapping[str, tuple[str, str]] | None) -> None:
        if unlabeled not in get_args(Unlabeled):
            raise ValueError(f"{type(self).__name__} needs unlabeled 'ignore' or 'teach'; got {unlabeled!r}.")
        self.unlabeled, self.features = unlabeled, dict(features or {})

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        parts = labeled_batch(batch, type(self).__name__)
        return parts.inputs, with_teacher_outputs(parts.inputs, batch), parts.ids
