"""Classification: a row is an image (or whatever gets one label)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32
from tempering.tasks.base import Task
from tempering.utils.tensors import to_device

BINS = 15  # of the reliability diagram and of the calibration error, equal width
Teaches = Callable[[Any, Tensor | None], Any]


class Classification(Task):
    """Batches of (inputs, labels) or (inputs, labels, ids); models answer (N, C) logits.

    A label of -100 means unlabeled. Both models see the same inputs.

    Args:
        taps: features for methods that look inside, name -> (student's module, teacher's module), shallow to deep.
    """

    def __init__(self, *, features: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.features = dict(features or {})

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise ValueError(f"Classification needs batches of (inputs, labels) or (inputs, labels, ids); got {got}.")
        return batch[0], batch[0], batch[2] if len(batch) == 3 else None

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        student, teacher = _logits(student, "student"), None if teacher is None else _logits(teacher, "teacher")
        if teacher is None:
            teacher = student.detach()
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student answers {student.shape[-1]} classes and the teacher {teacher.shape[-1]}. Give both heads "
                f"the same classes in the same order, such as models.build(name, classes={teacher.shape[-1]})."
            )
        return [Rows(student, teacher, batch[1], ids=batch[2] if len(batch) == 3 else None)]

    def row_weights(self, batch: Any) -> dict[str, float]:
        return {"logits": float(len(batch[1]))}

    def score(self, student: nn.Module, batches: Iterable[Any], *, teacher: Teaches | None = None) -> dict[str, float]:
        """accuracy, top5 and ece in [0, 1], loss in nats, and agreement with the teacher where there is one."""
        return self.scores(collect_outputs(self, student, batches, teacher))

    def scores(self, answers: Outputs) -> dict[str, float]:
        """What ``score`` says of these answers."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        z, y = answers.student, answers.labels
        out = {
            "accuracy": float((z.argmax(-1) == y).double().mean()),
            "loss": float(nn.functional.cross_entropy(z, y, ignore_index=-100)),
            "ece": float(multiclass_calibration_error(z.softmax(-1), y, num_classes=z.shape[-1], n_bins=BINS)),
        }
        if z.shape[-1] > 5:
            out["top5"] = float((z.topk(5).indices == y[:, None]).any(-1).double().mean())
        if answers.teacher is not None:
            out["agreement"] = float((z.argmax(-1) == answers.teacher.argmax(-1)).double().mean())
        return out

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: Teaches | None = None,
        temperatures: Callable[[Rows], Any] | None = None,
    ) -> dict[str, Any]:
        answers = collect_outputs(self, student, batches, teacher)
        sides = {"student": answers.student} | ({} if answers.teacher is None else {"teacher": answers.teacher})
        y, classes = answers.labels, answers.student.shape[-1]
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
        if answers.teacher is not None:
            out["agreement"] = float((answers.student.argmax(-1) == answers.teacher.argmax(-1)).double().mean())
            out["confusions"] = _confusions(answers.student, answers.teacher, y, classes)
            if temperatures is not None:
                out["temperatures"] = {"by_difficulty": _by_difficulty(answers, temperatures)}
        return out


class Outputs(NamedTuple):
    """Everything both models said about a data set, on the CPU in float32: logits (N, C) and labels (N,)."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor


@torch.no_grad()
def collect_outputs(task: Task, student: nn.Module, batches: Iterable[Any], teacher: Teaches | None = None) -> Outputs:
    """Run both over the batches, the student in eval mode; its mode is put back.

    Raises:
        ValueError: for batches that hold nothing.
    """
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    training, parts = student.training, []
    student.eval()
    try:
        for batch in batches:
            batch = to_device(batch, device)
            student_in, teacher_in, ids = task.inputs(batch)
            said = upcast_to_float32(_logits(student(student_in), "student")).cpu()
            taught = None if teacher is None else upcast_to_float32(_logits(teacher(teacher_in, ids), "teacher")).cpu()
            parts.append((said, taught, batch[1].cpu()))
    finally:
        student.train(training)
    if not parts:
        raise ValueError("there is nothing to score: the loader yields no batches. Is the split empty?")
    said, taught, labels = zip(*parts, strict=True)
    return Outputs(torch.cat(said), None if taught[0] is None else torch.cat(taught), torch.cat(labels))


def reliability(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Confidence against accuracy in BINS bins of equal width: [{low, high, count, confidence, accuracy}]."""
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).double()
    place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    count = torch.bincount(place, minlength=BINS).double()
    per = count.clamp_min(1)
    mean_confidence = torch.bincount(place, confidence.double(), minlength=BINS) / per
    mean_right = torch.bincount(place, right, minlength=BINS) / per
    return [
        {
            "low": i / BINS,
            "high": (i + 1) / BINS,
            "count": int(count[i]),
            "confidence": float(mean_confidence[i]),
            "accuracy": float(mean_right[i]),
        }
        for i in range(BINS)
    ]


def _logits(output: Any, side: str) -> Tensor:
    """The (N, C) logits of a model's output; transformers' outputs carry them by name."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(f"the {side} must answer (N, C) logits for classification; got {got}.")


def _per_class(logits: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    right = torch.bincount(labels[logits.argmax(-1) == labels], minlength=classes)
    count = torch.bincount(labels[labels >= 0], minlength=classes)
    return [float(r) / int(n) if n else None for r, n in zip(right, count, strict=True)]


def _confusions(student: Tensor, teacher: Tensor, labels: Tensor, classes: int, most: int = 20) -> list[dict[str, int]]:
    """The (true, predicted) pairs off the diagonal on which student and teacher differ most, with both counts."""
    known = labels >= 0
    cells = [
        torch.bincount(labels[known] * classes + z.argmax(-1)[known], minlength=classes**2) for z in (student, teacher)
    ]
    gap = (cells[0] - cells[1]).abs()
    gap[torch.arange(classes) * (classes + 1)] = 0
    order = torch.sort(gap, descending=True, stable=True).indices[:most].tolist()
    return [
        {"true": i // classes, "predicted": i % classes, "student": int(cells[0][i]), "teacher": int(cells[1][i])}
        for i in order
        if gap[i] > 0
    ]


def _by_difficulty(answers: Outputs, temperatures: Callable[[Rows], Any], bins: int = 5) -> list[dict[str, float]]:
    """Mean temperatures in equal-sized bins of the teacher's log-odds of the label, hardest first."""
    assert answers.teacher is not None
    T = temperatures(Rows(answers.student, answers.teacher, answers.labels))
    n = len(answers.labels)
    sides = {"T_teacher": T.teacher.expand(n, 1).flatten(), "T_student": T.student.expand(n, 1).flatten()}
    logp = answers.teacher.log_softmax(-1).gather(1, answers.labels.clamp_min(0)[:, None]).flatten()
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
