"""Regression: one row per number, of a sample or of a pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.batches import LabeledBatch, labeled_batch
from tempering.rows import GAUSSIAN, IGNORE_INDEX, Rows, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, TeacherForward, evaluating
from tempering.tasks.parts import PartsTask, Unlabeled
from tempering.tasks.segmentation import at_size
from tempering.tasks.text_classification import unpack_inputs
from tempering.utils.tensors import described, logits_of


class Regression(PartsTask):
    """Task with numbers as labels, (N,), (N, D) or maps (N, H, W) such as depth, and models that return as many.

    Each number is a row of one column, in the order of the samples; its ``task_loss`` is the squared error, and its
    ``teacher_loss`` the teacher's. ``methods.RegressionKD`` compares them; ``Supervised`` and methods over features
    work too, and methods that read logits as classes are refused. The loss is the mean over all numbers with a label.

    Models return a tensor, or an object with ``.logits`` or ``.predicted_depth``. Maps of another size than the labels
    are resized to it, bilinearly with align_corners=False. NaN and ``ignore`` are no labels. Labels should have a
    scale near 1, to which weights, learning rates and bounds refer. Scores: rmse, mae, r2, loss, and rmse_teacher, the
    distance to the teacher.

    Args:
        uncertainty: models return a mean and a log variance per number, the halves of dimension 1 ((N, 2 D) or
            (N, 2, H, W)). The loss is the negative log likelihood of the Gaussian, without its constant, and the block
            is named "gaussian".
        ignore: a label that is no measurement, besides NaN, such as 0 of depth.
        unlabeled: numbers without a label are left out ("ignore"), or learned from the teacher alone ("teach").
        features: features for feature methods, name -> (student's module, teacher's module), one per sample.

    Raises:
        ValueError: for another ``unlabeled``.
    """

    predicts = "numbers"
    unit = "number"
    remember = False  # maps are large

    def __init__(
        self,
        *,
        uncertainty: bool = False,
        ignore: float | None = None,
        unlabeled: Unlabeled = "ignore",
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(unlabeled, features)
        self.uncertainty, self.ignore = uncertainty, ignore

    def prepare_model(self, model: nn.Module) -> None:
        unpack_inputs(model)

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts = labeled_batch(batch, "Regression")
        y, known = self._labels(parts)
        s = self.numbers(student, y, "student")
        t = s.detach() if teacher is None else self.numbers(teacher, y, "teacher")
        label, there = torch.where(known, y, 0.0).flatten().to(s.dtype), known.flatten()
        weight = self._weight(parts, known).flatten()
        ids = parts.ids if y.numel() == len(y) else None
        # outputs without a label may be NaN
        s_loss, t_loss = (
            torch.where(there, self._loss(torch.where(there.unsqueeze(1), side, 0.0), label), 0.0)
            for side in (s, t.to(s.dtype))
        )
        return [Rows(s, t, weight=weight, name=self._block, ids=ids, task_loss=s_loss, teacher_loss=t_loss)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = labeled_batch(batch, "Regression")
        return {self._block: self._weight(parts, self._labels(parts)[1]).sum()}

    @property
    def _block(self) -> str:
        return GAUSSIAN if self.uncertainty else "numbers"

    def headline(self) -> tuple[str, bool]:
        return "rmse", False

    def _labels(self, parts: LabeledBatch) -> tuple[Tensor, Tensor]:
        """Return the labels and which of them are measurements."""
        y = parts.labels
        if y.is_floating_point():
            known = ~torch.isnan(y)
        else:  # labels of None are all -100
            known, y = (y != IGNORE_INDEX).any().expand(y.shape), y.float()
        return y, known if self.ignore is None else known & (y != self.ignore)

    def _weight(self, parts: LabeledBatch, known: Tensor) -> Tensor:
        known = torch.ones_like(known) if self.unlabeled == "teach" else known
        if parts.weight is None:
            return known.float()
        return parts.weight.view(-1, *(1,) * (known.ndim - 1)) * known

    def _loss(self, numbers: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each row, (N,): the squared error, or the negative log likelihood of a Gaussian."""
        error = (numbers[:, 0] - label).square()
        return error if not self.uncertainty else (numbers[:, 1] + error * (-numbers[:, 1]).exp()) / 2.0

    def numbers(self, output: Any, labels: Tensor, side: str) -> Tensor:
        """Return a model's numbers as rows, (N, 1) or (N, 2), in the order of the labels, in at least float32."""
        out = getattr(output, "predicted_depth", output)
        out = out if isinstance(out, Tensor) else logits_of(out)
        if not isinstance(out, Tensor):
            raise ValueError(f"the {side} must return a tensor of numbers for Regression; got {described(out)}.")
        sizes = labels.squeeze(1).shape if labels.ndim == 4 else labels.shape
        if len(sizes) == 3 and out.ndim in (3, 4):
            out = at_size(out if out.ndim == 4 else out.unsqueeze(1), (sizes[1], sizes[2]))
        columns = 2 if self.uncertainty else 1
        if len(out) != len(labels) or out.numel() != columns * labels.numel() or (columns == 2 and out.ndim < 2):
            raise ValueError(
                f"Regression needs {'a mean and a log variance' if columns == 2 else 'one number'} per label; the "
                f"{side} returns {tuple(out.shape)}, and the labels are {tuple(labels.shape)}."
                f"{'' if columns == 2 else ' Of a mean and a log variance, use Regression(uncertainty=True).'}"
            )
        out = upcast_to_float32(out)
        return torch.stack([half.flatten() for half in out.chunk(columns, 1 if columns == 2 else 0)], -1)

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return rmse, mae and r2 of the means, the mean loss, and rmse_teacher, over all numbers with a label."""
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

        metrics: dict[str, Any] = {
            "rmse": MeanSquaredError(squared=False),
            "mae": MeanAbsoluteError(),
            "r2": R2Score(),
            "rmse_teacher": MeanSquaredError(squared=False),
        }
        loss, count = 0.0, 0
        with evaluating(student, batches) as on_device:
            for batch in on_device:
                student_in, teacher_in, ids = self.inputs(batch)
                output, answer = student(student_in), None if teacher is None else teacher(teacher_in, ids)
                (rows,) = self.rows(output, answer, batch)
                y, known = (part.flatten() for part in self._labels(labeled_batch(batch)))
                y = y[known].float().cpu()
                s, t = (side[known, 0].float().cpu() for side in (rows.student, rows.teacher))
                if not len(y):
                    continue
                for name, metric in metrics.items():
                    metric.update(s, t if name == "rmse_teacher" else y)
                assert rows.task_loss is not None
                loss, count = loss + float(rows.task_loss[known].double().sum()), count + len(y)
        if not count:
            raise NothingToScoreError("there is nothing to score: no number has a label, or there are no batches.")
        named = {n: m for n, m in metrics.items() if (n != "rmse_teacher" or teacher) and (n != "r2" or count > 1)}
        return {name: float(metric.compute()) for name, metric in named.items()} | {"loss": loss / count}
