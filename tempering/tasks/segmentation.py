"""Semantic segmentation: one row per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tempering.data.batches import LabeledBatch, labeled_batch
from tempering.rows import IGNORE_INDEX, Rows, class_indices, is_labeled, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, TeacherForward, evaluating
from tempering.tasks.parts import PartsTask, Unlabeled
from tempering.utils.tensors import described, logits_of, on_host


class Segmentation(PartsTask):
    """Task with batches of (images, labels) or (images, labels, ids), labels (N, H, W), and models of dense logits.

    Models return (N, C, h, w): a tensor, a mapping with "out" as those of torchvision, or an object with ``.logits`` as
    SegFormer of transformers. Logits of another size than the labels are resized to it, bilinearly with
    align_corners=False, on both sides: teacher and student may have different strides. Auxiliary heads, such as "aux"
    of torchvision, are not trained.

    Rows are the pixels in the order of the labels, N * H * W of C classes, so every method over logits works; the loss
    is the mean over all pixels that count, as ``torch.nn.functional.cross_entropy`` with ignore_index. Features of the
    images, (N, ...), may be next to them for AT, FitNet, CWD and others, where an image counts by its pixels.

    Pixels of ``ignore_index``, -100 or -1 have no label. Scores: miou (mean over the classes that occur, of one
    confusion matrix over the split), accuracy of pixels, loss, and agreement with the teacher.

    Args:
        ignore_index: label of pixels without a label, besides -100 and -1.
        stride: compare only every ``stride``-th row and column of the pixels, from stride // 2 on; scores use all.
        unlabeled: pixels without a label are left out ("ignore"), or learned from the teacher alone ("teach").
        features: features for feature methods, name -> (student's module, teacher's module), one per image.

    Raises:
        ValueError: for invalid options.
    """

    predicts = "pixels"
    unit = "pixel"
    remember = False  # outputs are large

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        stride: int = 1,
        unlabeled: Unlabeled = "ignore",
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(unlabeled, features)
        if stride < 1:
            raise ValueError(f"Segmentation needs stride >= 1; got {stride!r}.")
        self.ignore_index, self.stride = ignore_index, stride

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        parts = labeled_batch(batch, "Segmentation")
        labels = self._labels(parts.labels)
        size = (parts.labels.shape[1], parts.labels.shape[2])
        s = dense_logits(student, size, "student")
        t = s.detach() if teacher is None else dense_logits(teacher, size, "teacher")
        if s.shape != t.shape or len(s) != len(labels):
            raise ValueError(
                f"the student has logits {tuple(s.shape)}, the teacher {tuple(t.shape)}, and there are {len(labels)} "
                "images. Give both heads the same classes in the same order."
            )
        weight = self._weight(parts, labels)
        s, t = (self._pixels(x).permute(0, 2, 3, 1).flatten(0, 2) for x in (s, t))
        return [Rows(s, t, labels.flatten(), None if weight is None else weight.flatten())]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = labeled_batch(batch, "Segmentation")
        labels = self._labels(parts.labels)
        weight = self._weight(parts, labels)
        return {"logits": float(labels.numel()) if weight is None else weight.sum()}

    def headline(self) -> tuple[str, bool]:
        return "miou", True

    def _pixels(self, x: Tensor) -> Tensor:
        """Return every ``stride``-th row and column of (..., H, W)."""
        k = self.stride
        return x if k == 1 else x[..., k // 2 :: k, k // 2 :: k]

    def _labels(self, labels: Tensor) -> Tensor:
        """Return the labels of the pixels that are rows, (N, h, w), in int64, -100 where there is none."""
        return self._pixels(checked_labels(labels, self.ignore_index))

    def _weight(self, parts: LabeledBatch, labels: Tensor) -> Tensor | None:
        """Return the weight of each pixel; None if all have weight 1."""
        weight = None if parts.weight is None else parts.weight[:, None, None].expand(labels.shape)
        if self.unlabeled == "teach":
            return weight
        known, given = is_labeled(labels), on_host(parts.labels)
        if given.device.type == "cpu":
            on_cpu = known if given is parts.labels else is_labeled(self._labels(given))
            if bool(on_cpu.all()):
                return weight
        return known.float() if weight is None else weight * known

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return miou and accuracy in [0, 1], loss in nats per pixel, and agreement if there is a teacher."""
        from torchmetrics.classification import MulticlassJaccardIndex

        metric: Any = None
        loss = same = count = 0.0
        with evaluating(student, batches) as on_device:
            for batch in on_device:
                student_in, teacher_in, ids = self.inputs(batch)
                labels = checked_labels(labeled_batch(batch).labels, self.ignore_index)
                size = (labels.shape[1], labels.shape[2])
                z = dense_logits(student(student_in), size, "student")
                known = is_labeled(labels)
                if metric is None:
                    metric = MulticlassJaccardIndex(z.shape[1], ignore_index=IGNORE_INDEX, validate_args=False)
                    metric = metric.to(z.device)
                labels = labels.masked_fill(~known, IGNORE_INDEX)
                metric.update(z.argmax(1), labels)
                loss += float(F.cross_entropy(z, labels, reduction="sum"))
                count += int(known.sum())
                if teacher is not None:
                    t = dense_logits(teacher(teacher_in, ids), size, "teacher")
                    same += int(((z.argmax(1) == t.argmax(1)) & known).sum())
        if metric is None:
            raise NothingToScoreError("there is nothing to score: the loader yields no batches. Is the split empty?")
        if not count:
            raise NothingToScoreError(f"there is nothing to score: all pixels are {self.ignore_index}, -100 or -1.")
        right = float(metric.confmat.diagonal().sum())
        out = {"miou": float(metric.compute()), "accuracy": right / count, "loss": loss / count}
        return out if teacher is None else out | {"agreement": same / count}


def checked_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Return labels (N, H, W) in int64, with -100 for ``ignore_index``.

    Raises:
        ValueError: for labels of another shape or type, or below 0 without being -100 or -1.
    """
    if labels.ndim != 3 or labels.is_floating_point():
        advice = " Write labels.squeeze(1) in the data set." if labels.ndim == 4 and labels.shape[1] == 1 else ""
        raise ValueError(
            f"Segmentation needs labels (N, H, W), class indices of pixels; got {labels.dtype} "
            f"{tuple(labels.shape)}.{advice} Of numbers, such as depth, use tasks.Regression()."
        )
    labels = labels.long()
    return class_indices(labels.masked_fill(labels == ignore_index, IGNORE_INDEX), "Segmentation")


def dense_logits(output: Any, size: tuple[int, int], side: str) -> Tensor:
    """Return the logits (N, C, H, W) of a model's output, resized to ``size``."""
    logits = output if isinstance(output, Tensor) else logits_of(output)
    if isinstance(logits, Tensor) and logits.ndim == 4 and logits.shape[1] > 1:
        return at_size(logits, size)
    one = isinstance(logits, Tensor) and logits.ndim == 4
    why = "one class, of which every divergence is 0: torch.cat((torch.zeros_like(z), z), 1) are two" if one else ""
    raise ValueError(f"the {side} must return (N, C, H, W) logits for segmentation; got {why or described(logits)}.")


def at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly, align_corners=False, in at least float32; return those of this size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(upcast_to_float32(maps), size, mode="bilinear", align_corners=False)
