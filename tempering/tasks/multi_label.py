"""Labels that a sample has or not, one logit each: several labels, one (binary), or ordered classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.batches import LabeledBatch, labeled_batch
from tempering.rows import IGNORE_INDEX, Rows, binary_logits, is_labeled, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, TeacherForward, evaluating
from tempering.tasks.parts import PartsTask, Unlabeled
from tempering.tasks.text_classification import unpack_inputs
from tempering.utils.tensors import described, logits_of


class MultiLabel(PartsTask):
    """Task with labels (N, C) in {0, 1} and models that return (N, C) logits, one per label.

    Each (sample, label) is a row of two classes, ``rows.binary_logits(z)``, in the order of the samples. So KD is the
    KL of Bernoulli distributions at its temperature times T^2, the hard term is the binary cross entropy, and the loss
    is their mean over all pairs that count: that of Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023,
    arXiv:2308.06453, equation 4 (a sum there).

    -1, -100 and, among floating point labels, NaN mark pairs without a label. Labels between 0 and 1 are soft. Batches
    are those of ``Classification``. Scores: map (mean of the average precision over the labels that occur), f1 (mean
    over labels, at probability 0.5), loss, and agreement with the teacher, at 0.5.

    Of two classes a policy sees one number, |z|. Temperatures that give both sides the same sharpness, such as those of
    DTKD, give them the same probabilities wherever both have the same sign, so a divergence at them is 0 there. Methods
    for which nothing else is left, those that compare rows with each other, and those that run the step are refused.

    Args:
        unlabeled: pairs without a label are left out ("ignore"), or learned from the teacher alone ("teach").
        features: features for feature methods, name -> (student's module, teacher's module), one per sample.

    Raises:
        ValueError: for another ``unlabeled``.
    """

    predicts = "labels"
    unit = "label"

    def __init__(
        self,
        *,
        unlabeled: Unlabeled = "ignore",
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(unlabeled, features)

    def prepare_model(self, model: nn.Module) -> None:
        unpack_inputs(model)

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts = labeled_batch(batch, type(self).__name__)
        z = self.logits(student, "student")
        t = z.detach() if teacher is None else self.logits(teacher, "teacher")
        y = self.targets(parts.labels, z)
        if z.shape != t.shape or z.shape != y.shape:
            raise ValueError(
                f"{type(self).__name__} needs logits and labels of one shape (N, C); got the student's "
                f"{tuple(z.shape)}, the teacher's {tuple(t.shape)} and labels {tuple(y.shape)}. Give both heads the "
                "labels of the data in the same order; of class indices (N,), use tasks.Classification()."
            )
        ids = parts.ids if y.shape[1] == 1 else None  # methods with state per id have one row per sample
        weight = self._weight(parts, y)
        weight = None if weight is None else weight.flatten()
        s, t = (binary_logits(x.flatten()) for x in (z, t))
        return [Rows(s, t, _as_target(y.flatten(), z), weight, ids=ids)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = labeled_batch(batch, type(self).__name__)
        y = self.targets(parts.labels)
        weight = self._weight(parts, y)
        return {"logits": float(y.numel()) if weight is None else weight.sum()}

    def headline(self) -> tuple[str, bool]:
        return "map", True

    def logits(self, output: Any, side: str) -> Tensor:
        """Return a model's logits, (N, C)."""
        logits = output if isinstance(output, Tensor) else logits_of(output)
        if isinstance(logits, Tensor) and logits.ndim == 2:
            return logits
        raise ValueError(f"the {side} must return (N, C) logits for {type(self).__name__}; got {described(logits)}.")

    def targets(self, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return the labels of all pairs, (N, C); ``logits`` (N, C) are known in training, not before the forward."""
        return labels

    def _weight(self, parts: LabeledBatch, y: Tensor) -> Tensor | None:
        """Return the weight of each pair, (N, C); None if all have weight 1."""
        weight = None if parts.weight is None else parts.weight.unsqueeze(1).expand(y.shape)
        if self.unlabeled == "teach":
            return weight
        known = _known(y)
        return known.float() if weight is None else weight * known

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return the scores of all pairs with a label; soft labels are scored as 1 from 0.5 on."""
        z, t, y = collect_pairs(self, student, batches, teacher)
        known = y != IGNORE_INDEX
        out = self.scores(z, y)
        out["loss"] = float(nn.functional.binary_cross_entropy_with_logits(z[known], y[known].to(z.dtype)))
        if t is not None:
            out["agreement"] = float(((z > 0) == (t > 0))[known].double().mean())
        return out

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the scores of logits (N, C) and labels (N, C) of 0, 1 and -100, both on the CPU."""
        from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

        occurs, p = (labels == 1).any(0), logits.sigmoid()
        if not bool(occurs.any()):
            raise NothingToScoreError("there is nothing to score: no sample has any of the labels.")
        precision = multilabel_average_precision(
            p[:, occurs], labels[:, occurs], num_labels=int(occurs.sum()), ignore_index=IGNORE_INDEX
        )
        f1 = multilabel_f1_score(p, labels, num_labels=len(occurs), ignore_index=IGNORE_INDEX)
        return {"map": float(precision), "f1": float(f1)}


class Binary(MultiLabel):
    """Task with labels (N,) or (N, 1) in {0, 1} and models of one logit, (N,) or (N, 1).

    Rows, losses and soft labels are those of ``MultiLabel``, one row per sample. For models of two logits use
    ``Classification``. Scores: accuracy and f1 at probability 0.5, auroc, loss, and agreement with the teacher.
    """

    predicts = "binary"
    unit = "row"

    def logits(self, output: Any, side: str) -> Tensor:
        logits = output if isinstance(output, Tensor) else logits_of(output)
        if isinstance(logits, Tensor) and (logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1)):
            return logits.reshape(-1, 1)
        raise ValueError(
            f"the {side} must return one logit per sample, (N,) or (N, 1), for Binary; got {described(logits)}. Of two "
            "logits, use tasks.Classification(); of several labels, tasks.MultiLabel()."
        )

    def targets(self, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        return labels.unsqueeze(1) if labels.ndim == 1 else labels

    def headline(self) -> tuple[str, bool]:
        return "accuracy", True

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_f1_score

        p, y = logits.sigmoid().flatten(), labels.flatten()
        metrics = {"accuracy": binary_accuracy, "f1": binary_f1_score, "auroc": binary_auroc}
        return {name: float(metric(p, y, ignore_index=IGNORE_INDEX)) for name, metric in metrics.items()}


class Ordinal(MultiLabel):
    """Task with ordered classes, labels (N,) from 0 to C, and models of C logits (N, C): "is it above class k?".

    Rows, losses and scores are those of ``MultiLabel``; the predicted class is the number of logits above 0, and its
    scores are accuracy and mae, the mean distance to the label in classes.

    Args:
        thresholds: number of logits, one less than the classes.

    Reference: Cao et al., "Rank consistent ordinal regression for neural networks", 2020, arXiv:1901.07884.
    """

    def __init__(
        self,
        thresholds: int,
        *,
        unlabeled: Unlabeled = "ignore",
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(unlabeled=unlabeled, features=features)
        if thresholds < 1:
            raise ValueError(f"Ordinal needs thresholds >= 1, the number of classes - 1; got {thresholds!r}.")
        self.thresholds = thresholds

    def targets(self, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"Ordinal needs class indices (N,) as labels; got {labels.dtype} {tuple(labels.shape)}. Of numbers, "
                "use tasks.Regression()."
            )
        if labels.device.type == "cpu" and len(labels) and int(labels.max()) > self.thresholds:
            raise ValueError(
                f"Ordinal(thresholds={self.thresholds}) has classes 0 to {self.thresholds}; got {int(labels.max())}."
            )
        above = labels.unsqueeze(1) > torch.arange(self.thresholds, device=labels.device)
        return above.long().masked_fill(~is_labeled(labels).unsqueeze(1), IGNORE_INDEX)

    def headline(self) -> tuple[str, bool]:
        return "mae", False

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        known = labels[:, 0] != IGNORE_INDEX
        gap = ((logits > 0).sum(1) - labels.sum(1))[known].abs().double()
        return {"accuracy": float((gap == 0).double().mean()), "mae": float(gap.mean())}


def collect_pairs(
    task: MultiLabel, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run both models; return their logits (N, C) and labels (N, C) of 0, 1 and -100, on the CPU, in float32 at least.

    Raises:
        NothingToScoreError: if there are no batches, or no label.
    """
    parts: list[tuple[Tensor, Tensor | None, Tensor]] = []
    with evaluating(student, batches) as on_device:
        for batch in on_device:
            student_in, teacher_in, ids = task.inputs(batch)
            z = upcast_to_float32(task.logits(student(student_in), "student")).cpu()
            t = None if teacher is None else upcast_to_float32(task.logits(teacher(teacher_in, ids), "teacher")).cpu()
            y = task.targets(labeled_batch(batch).labels, z).cpu()
            parts.append((z, t, torch.where(_known(y), (y >= 0.5).long(), IGNORE_INDEX)))
    if not parts:
        raise NothingToScoreError("there is nothing to score: the loader yields no batches. Is the split empty?")
    z, t, y = zip(*parts, strict=True)
    if not bool((torch.cat(y) != IGNORE_INDEX).any()):
        raise NothingToScoreError("there is nothing to score: no label is known (-1, -100 and NaN are not).")
    return torch.cat(z), None if t[0] is None else torch.cat(t), torch.cat(y)


def _known(y: Tensor) -> Tensor:
    """Return which labels are known: not -1, -100 or NaN."""
    return ~(torch.isnan(y) | (y == -1) | (y == IGNORE_INDEX)) if y.is_floating_point() else is_labeled(y)


def _as_target(y: Tensor, logits: Tensor) -> Tensor:
    """Return the target of rows of two classes: class indices (N,), or of floating point labels soft ones (N, 2).

    Raises:
        ValueError: (checked on the CPU only) for labels that are not in [0, 1].
    """
    known = _known(y)
    if y.device.type == "cpu" and bool((known & ((y < 0) | (y > 1))).any()):
        raise ValueError(
            f"labels must be 0 or 1, soft ones between them, and -1, -100 or NaN where unknown; got {y[known].min()} "
            f"to {y[known].max()}. Class indices? Use tasks.Classification()."
        )
    if not y.is_floating_point():
        return y.long()
    return torch.stack((1 - y, y), -1).masked_fill(~known.unsqueeze(-1), 0.0).to(upcast_to_float32(logits).dtype)
