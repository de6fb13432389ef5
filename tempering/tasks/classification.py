"""Classification: one row per image, or other sample with one label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.data.batches import LabeledBatch, labeled_batch, with_teacher_outputs
from tempering.rows import SEVERAL_LABELS, Rows, class_indices, class_labels, is_labeled, upcast_to_float32
from tempering.tasks.base import NothingToScoreError, PolicyForward, Task, TeacherForward, evaluating
from tempering.utils.device import synchronize
from tempering.utils.tensors import described, logits_of, map_tensors, on_host

BINS = 15  # bins of the reliability diagram and of the calibration error, of equal width
ONE_CLASS = (
    "Of one logit per sample, use tasks.Binary(), or return torch.cat((torch.zeros_like(z), z), 1) where the other "
    "model has two classes; of numbers, tasks.Regression()."
)


class Classification(Task):
    """Task with batches of (inputs, labels) or (inputs, labels, ids) and models that return (N, C) logits.

    Batches may also be mappings or named tuples, and have weights (N,) of the samples or paths: see
    ``data.batches.labeled_batch``. Outputs may be objects or mappings with "logits", as those of transformers.

    Labels are of any integer type; -100 and -1 mean unlabeled. Such a sample is learned from the teacher alone and is
    left out of every score. Both models see the same inputs.

    Args:
        features: features for feature methods, name -> (student's module, teacher's module), shallow to deep.
    """

    def __init__(self, *, features: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.features = dict(features or {})

    def prepare_model(self, model: nn.Module) -> None:
        """Reject models of transformers whose outputs are no classes.

        Raises:
            TypeError: for a model of several labels per sample, or of regression.
        """
        check_has_classes(model)

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        plain = type(batch) is tuple and len(batch) == 3 and getattr(batch[2], "dtype", None) is torch.int64
        if plain:
            return batch[0], batch[0], batch[2]
        parts = labeled_batch(batch, type(self).__name__)
        return parts.inputs, with_teacher_outputs(parts.inputs, batch), parts.ids

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        student, teacher = _logits(student, "student"), None if teacher is None else _logits(teacher, "teacher")
        if teacher is None:
            teacher = student.detach()
        if len(student) != len(teacher):
            raise ValueError(
                f"the student has logits of {len(student)} samples and the teacher of {len(teacher)}. Does the data "
                'set\'s "teacher_outputs", or the model, have one row per sample?'
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}. Give both heads "
                f"the same classes in the same order, such as models.build(name, classes={teacher.shape[-1]})."
            )
        plain = type(batch) is tuple and len(batch) == 3 and getattr(batch[2], "dtype", None) is torch.int64
        parts = LabeledBatch(*batch) if plain else labeled_batch(batch)  # without a call per step for the usual form
        return [Rows(student, teacher, parts.labels, parts.weight, ids=parts.ids)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        parts = labeled_batch(batch)
        return {"logits": float(len(parts.labels)) if parts.weight is None else parts.weight.sum()}

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return accuracy, top5 and ece in [0, 1], loss in nats, and agreement if there is a teacher."""
        return self.scores(collect_outputs(self, student, batches, teacher))

    def scores(self, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics of ``score`` from outputs."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        z, y = outputs.student, outputs.labels
        out = {
            "accuracy": float((z.argmax(-1) == y).double().mean()),
            "loss": float(nn.functional.cross_entropy(z, y)),
            "ece": float(multiclass_calibration_error(z.softmax(-1), y, num_classes=z.shape[-1], n_bins=BINS)),
        }
        if z.shape[-1] > 5:
            out["top5"] = float((z.topk(5).indices == y[:, None]).any(-1).double().mean())
        if outputs.teacher is not None:
            out["agreement"] = float((z.argmax(-1) == outputs.teacher.argmax(-1)).double().mean())
        return out

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: TeacherForward | None = None,
        temperatures: PolicyForward | None = None,
    ) -> dict[str, Any]:
        outputs = collect_outputs(self, student, batches, teacher)
        sides = {"student": outputs.student} | ({} if outputs.teacher is None else {"teacher": outputs.teacher})
        y, classes = outputs.labels, outputs.student.shape[-1]
        out: dict[str, Any] = {
            "classes": classes,
            "class_names": list(names) if (names := getattr(batches, "class_names", None)) else None,
            "accuracy": {side: float((z.argmax(-1) == y).double().mean()) for side, z in sides.items()},
            "reliability": {side: reliability(z, y) for side, z in sides.items()},
            "per_class": {side: _per_class(z, y, classes) for side, z in sides.items()},
        }
        out["ece"] = {
            side: sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(y)
            for side, bins in out["reliability"].items()
        }
        out["agreement"], out["confusions"], out["temperatures"] = None, [], None
        if outputs.teacher is not None:
            out["agreement"] = float((outputs.student.argmax(-1) == outputs.teacher.argmax(-1)).double().mean())
            out["confusions"] = _confusions(outputs.student, outputs.teacher, y, classes)
            if temperatures is not None:
                out["temperatures"] = {"by_difficulty": _by_difficulty(outputs, temperatures)}
        scores = self.final_scores(student, batches)
        return out | {"scores": scores} if scores else out

    def examples(
        self, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward, most: int
    ) -> list[dict[str, Any]]:
        from tempering.tasks.examples import class_examples

        return class_examples(self, student, batches, teacher, most)

    def score_teacher(self, teacher: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return {}  # the analysis has the teacher's accuracy

    def final_scores(self, student: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Return the scores that are too expensive for each epoch: metric -> value; {} for none."""
        return {}


class Outputs(NamedTuple):
    """Both models' outputs on the labeled samples, on the CPU in float32: logits (N, C) and labels (N,), int64."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor


def collect_outputs(
    task: Task, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward | None = None
) -> Outputs:
    """Run both models on the batches, the student in eval mode; restore its mode.

    Raises:
        NothingToScoreError: if there are no batches, or none has a label.
        ValueError: for a label that is no class.
    """
    parts, device = [], torch.device("cpu")
    with evaluating(student, batches) as on_device:
        for batch in on_device:
            student_in, teacher_in, ids = task.inputs(batch)
            z = upcast_to_float32(_logits(student(student_in), "student"))
            t = None if teacher is None else upcast_to_float32(_logits(teacher(teacher_in, ids), "teacher"))
            outputs = (z, t, on_host(labeled_batch(batch).labels))
            parts.append(map_tensors(outputs, lambda x: x.to("cpu", non_blocking=True)))
            device = z.device
    if not parts:
        raise NothingToScoreError("there is nothing to score: the loader yields no batches. Is the split empty?")
    synchronize(device)  # once: the copies of the batches do not wait
    z, t, labels = zip(*parts, strict=True)
    y = class_indices(class_labels(torch.cat(labels)), type(task).__name__)
    kept = is_labeled(y)
    outputs = Outputs(torch.cat(z)[kept], None if t[0] is None else torch.cat(t)[kept], y[kept])
    if not len(outputs.labels):
        raise NothingToScoreError("there is nothing to score: no sample has a label (-100 and -1 mean unlabeled).")
    if int(outputs.labels.max()) >= outputs.student.shape[1]:
        raise ValueError(
            f"label {int(outputs.labels.max())} is out of range for {outputs.student.shape[1]} classes (labels count "
            "from 0). Is the student's head too small, or do labels start at 1?"
        )
    return outputs


def check_has_classes(model: nn.Module) -> None:
    """Check that the outputs of a model of transformers are classes, of which a sample has one.

    Raises:
        TypeError: for several labels per sample, or regression, by the model's config.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise TypeError(
                f"{type(module).__name__} has problem_type={problem!r}, so its outputs are not classes of which one is "
                f"right, and a softmax over them has no meaning. {SEVERAL_LABELS}"
            )
        one = type(module).__name__.endswith("Classification") and getattr(config, "num_labels", 2) == 1
        if problem == "regression" or one:
            raise TypeError(f"{type(module).__name__} has one output, and no classes. {ONE_CLASS}")


def reliability(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Return confidence and accuracy in BINS bins of equal width: [{low, high, count, confidence, accuracy}]."""
    confidence, predicted = logits.softmax(-1).max(-1)
    correct = (predicted == labels).double()
    index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    count = torch.bincount(index, minlength=BINS).double()
    divisor = count.clamp_min(1)
    mean_confidence = torch.bincount(index, confidence.double(), minlength=BINS) / divisor
    mean_correct = torch.bincount(index, correct, minlength=BINS) / divisor
    return [
        {
            "low": i / BINS,
            "high": (i + 1) / BINS,
            "count": int(count[i]),
            "confidence": float(mean_confidence[i]),
            "accuracy": float(mean_correct[i]),
        }
        for i in range(BINS)
    ]


def _logits(output: Any, side: str) -> Tensor:
    """Return the (N, C) logits of a model's output, a tensor or an object with ``.logits``."""
    logits = output if isinstance(output, Tensor) else logits_of(output)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        if logits.shape[1] < 2:
            raise ValueError(
                f"the {side}'s logits {tuple(logits.shape)} have one class, of which every divergence is 0. {ONE_CLASS}"
            )
        return logits
    raise ValueError(f"the {side} must return (N, C) logits for classification; got {described(logits)}.")


def _per_class(logits: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    correct = torch.bincount(labels[logits.argmax(-1) == labels], minlength=classes)
    count = torch.bincount(labels[labels >= 0], minlength=classes)
    return [float(r) / int(n) if n else None for r, n in zip(correct, count, strict=True)]


def _confusions(
    student: Tensor, teacher: Tensor, labels: Tensor, classes: int, limit: int = 20
) -> list[dict[str, int]]:
    """Return the off-diagonal (true, predicted) pairs whose counts differ most, with both counts."""
    labeled = labels >= 0
    pairs = [labels[labeled] * classes + z.argmax(-1)[labeled] for z in (student, teacher)]
    # of the pairs that occur: there are classes^2
    found, index = torch.unique(torch.cat(pairs), return_inverse=True)
    cells = [torch.bincount(part, minlength=len(found)) for part in index.split(len(pairs[0]))] if len(found) else []
    true, predicted = found // classes, found % classes
    gap = (cells[0] - cells[1]).abs().where(true != predicted, 0) if cells else found
    order = torch.sort(gap, descending=True, stable=True).indices[:limit].tolist()
    return [
        {
            "true": int(true[i]),
            "predicted": int(predicted[i]),
            "student": int(cells[0][i]),
            "teacher": int(cells[1][i]),
        }
        for i in order
        if gap[i] > 0
    ]


def _by_difficulty(outputs: Outputs, temperatures: PolicyForward, bins: int = 5) -> list[dict[str, float]]:
    """Return mean temperatures in equal-sized bins of the teacher's log-odds of the label, hardest first."""
    assert outputs.teacher is not None
    T = temperatures(Rows(outputs.student, outputs.teacher, outputs.labels))
    n = len(outputs.labels)
    sides = {"T_teacher": T.teacher.expand(n, 1).flatten(), "T_student": T.student.expand(n, 1).flatten()}
    logp = outputs.teacher.log_softmax(-1).gather(1, outputs.labels.clamp_min(0)[:, None]).flatten()
    margin = logp - torch.log(-torch.expm1(logp).clamp(max=-1e-30))
    order = torch.argsort(margin, stable=True)
    return [
        {
            "bin": i,
            "count": len(part),
            "teacher_margin": float(margin[part].mean()),
            **{side: float(values[part].double().mean()) for side, values in sides.items()},
        }
        for i, part in enumerate(order.tensor_split(bins))
        if len(part)
    ]
