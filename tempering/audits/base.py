"""Base class of audits, which take a student, its teacher and labeled batches and return findings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.data.batches import labeled_batch
from tempering.rows import Rows, class_indices, class_labels, is_scored, upcast_to_float32
from tempering.utils.search_space import CheckedArguments
from tempering.utils.state import restored
from tempering.utils.tensors import to_device

Answer = Callable[[Tensor], Tensor]  # inputs (N, ...) to logits (N, C), in float32 at least


class RowTask(Protocol):
    """The members of a ``tasks.Task`` by which an audit of outputs turns batches into rows."""

    def prepare_model(self, model: nn.Module) -> None: ...

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]: ...

    def scored_rows(self, student: Any, teacher: Any, batch: Any) -> tuple[Rows, Tensor | None]: ...


@dataclass(frozen=True)
class Finding:
    """One result of an audit.

    Args:
        name: name of the metric, such as "ece" or "pgd".
        of: the model it belongs to: "student", "teacher", or "both" for a comparison of the two.
        value: the value; None if it could not be computed, with the reason in ``meaning``.
        meaning: one or two sentences for the reader on how to interpret the value.
        low, high: bounds of its 95 % interval; None if there is no interval.
        n: number of samples.
        share: whether the value is a fraction, shown in percent.

    Raises:
        ValueError: if a number is not finite.
    """

    name: str
    of: str
    value: float | None
    meaning: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    share: bool = False

    def __post_init__(self) -> None:
        wrong = {k: v for k in ("value", "low", "high") if (v := getattr(self, k)) is not None and not isfinite(v)}
        if wrong:
            raise ValueError(f"the finding {self.of}/{self.name} must be a finite number or None; got {wrong}.")

    def record(self) -> dict[str, Any]:
        """Return the entry of audits.json."""
        return asdict(self)


class Audit(CheckedArguments, ABC):
    """Evaluate a trained student, and its teacher if there is one.

    Neither model is changed: training modes and ``requires_grad`` are restored, also after an exception, and the global
    random state is not used.

    Batches are (inputs, labels, ...) of a classification task, such as a test split without augmentation; unlabeled
    rows are skipped. ``samples`` is the number of rows to use, counted from the first; None for all.
    """

    samples: int | None = None

    def __call__(self, student: nn.Module, teacher: Any, batches: Iterable[Any]) -> list[Finding]:
        """Return the findings. ``teacher`` is a module, a Teacher with a live model, or None.

        Raises:
            TypeError: if the student or the teacher is not a model.
            ValueError: if the batches are empty, a label fits no class, or logits are not finite.
        """
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{type(self).__name__} needs samples >= 1, or None for all; got {self.samples}.")
        models = {"student": _module(student, "student")}
        if teacher is not None:
            models["teacher"] = _module(teacher, "teacher")
        with ExitStack() as stack:
            for model in models.values():
                stack.enter_context(frozen_eval_mode(model))
            return self.examine(models, batches)

    @abstractmethod
    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        """Return the findings on "student" and, if present, "teacher", both in eval mode and frozen."""

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """Return JSON-serializable data for the report's figures; {} for none."""
        return {}


def _module(model: Any, side: str) -> nn.Module:
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if isinstance(module, nn.Module):
        return module
    raise TypeError(
        f"an audit runs the {side} on new inputs, so it must be a module or a teacher with a live one; got "
        f"{type(model).__name__}. A cache holds outputs for its own inputs only: pass the model itself."
    )


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with frozen weights, and restore both per module on exit."""
    with restored(model):
        model.eval().requires_grad_(False)
        yield


def as_function(model: nn.Module, side: str) -> Answer:
    """Return the model as a function: inputs (N, ...) on any device -> logits (N, C) in float32 at least.

    Gradients flow through it if they are enabled.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(inputs: Tensor) -> Tensor:
        output = model(inputs.to(device))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the {side} must return (N, C) logits for an audit; got {got} for {len(inputs)} inputs.")
        logits = upcast_to_float32(logits)
        if not torch.isfinite(logits.detach()).all():
            raise ValueError(f"the {side} returns logits that are not finite; an audit of it would be meaningless.")
        return logits

    return forward


def identified(batches: Iterable[Any], samples: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (inputs, labels, ids) of the labeled rows, batch by batch, up to ``samples`` rows.

    Ids are the third element of the batches, else the row numbers in the order of iteration.

    Raises:
        ValueError: if a batch has another form, or no row is labeled.
    """
    count = offset = 0
    for batch in batches:
        x, y, ids_of_batch, _ = labeled_batch(batch, "an audit")
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise ValueError(f"an audit needs batches (inputs, labels, ...) of tensors; got {type(batch).__name__}.")
        if len(x) != len(y) or y.ndim != 1 or y.is_floating_point():
            raise ValueError(
                f"an audit needs a class index (N,) for each of {len(x)} inputs; got {y.dtype} {tuple(y.shape)}."
            )
        if not isinstance(ids_of_batch, Tensor) or ids_of_batch.shape != y.shape or ids_of_batch.is_floating_point():
            ids_of_batch = torch.arange(offset, offset + len(y), device=y.device)
        offset += len(y)
        y = class_indices(y, "an audit")
        labeled_rows = y >= 0
        x, y, ids = (part[labeled_rows] for part in (x, y, ids_of_batch))
        if samples is not None:
            x, y, ids = (part[: samples - count] for part in (x, y, ids))
        count += len(y)
        if len(y):
            yield x, y, ids
        if samples is not None and count >= samples:
            break
    if not count:
        raise ValueError("there is nothing to audit: the batches have no labeled row. Is the split empty?")


def labeled(batches: Iterable[Any], samples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) as ``identified`` does, without the ids."""
    for x, y, _ in identified(batches, samples):
        yield x, y


def data(batches: Iterable[Any], samples: int | None) -> tuple[Tensor, Int[Tensor, " N"]]:
    """Return all inputs (N, ...) and labels (N,), concatenated on the CPU."""
    x, y = zip(*((x.cpu(), y.cpu()) for x, y in labeled(batches, samples)), strict=True)
    return torch.cat(x), torch.cat(y)


@torch.no_grad()
def collect_rows(
    models: Mapping[str, nn.Module], batches: Iterable[Any], task: RowTask, samples: int | None = None
) -> tuple[dict[str, Float[Tensor, "N C"]], Int[Tensor, " N"]]:
    """Return each model's logits, side -> (N, C) float64 on the CPU, and labels (N,), of a task's labeled rows.

    These are the rows that training learns from and evaluation scores: padding and masked tokens are left out.

    Raises:
        ValueError: if no row is labeled, the task's rows have no labels, or logits are NaN.
    """
    student, teacher = models["student"], models.get("teacher")
    for model in models.values():
        task.prepare_model(model)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    parts: dict[str, list[Tensor]] = {side: [] for side in models}
    labels, count = list[Tensor](), 0
    for batch in batches:
        batch = to_device(batch, device)
        student_inputs, teacher_inputs, _ = task.inputs(batch)
        output = student(student_inputs)
        rows, _ = task.scored_rows(output, None if teacher is None else teacher(teacher_inputs), batch)
        if rows.target is None:
            raise ValueError(f"an audit needs labels, and the rows of {type(task).__name__} have none.")
        kept = is_scored(rows.target, rows.weight)
        index = kept.nonzero().flatten()[: None if samples is None else samples - count]
        count += len(index)
        for side, z in zip(("student", "teacher"), (rows.student, rows.teacher), strict=True):
            if side in models:
                parts[side].append(z[index].cpu().double())
                if parts[side][-1].isnan().any():
                    raise ValueError(f"the {side} returns logits that are NaN; an audit of it would be meaningless.")
        labels.append(class_labels(rows.target)[index].cpu())
        if samples is not None and count >= samples:
            break
    if not count:
        raise ValueError("there is nothing to audit: the batches have no labeled row. Is the split empty?")
    return {side: torch.cat(z) for side, z in parts.items()}, torch.cat(labels)


@torch.no_grad()
def collect_logits_and_ids(
    models: Mapping[str, nn.Module], batches: Iterable[Any], samples: int | None = None
) -> tuple[dict[str, Float[Tensor, "N C"]], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return each model's logits, side -> (N, C) float64 on the CPU, with the labels (N,) and the ids (N,).

    Raises:
        ValueError: if the models have different numbers of classes, or a label fits none.
    """
    functions = {side: as_function(model, side) for side, model in models.items()}
    parts_by_side: dict[str, list[Tensor]] = {side: [] for side in models}
    labels, id_parts = [], []
    for x, y, ids in identified(batches, samples):
        labels.append(y.cpu())
        id_parts.append(ids.cpu())
        for side, answer in functions.items():
            parts_by_side[side].append(answer(x).cpu().double())
    logits, y = {side: torch.cat(parts) for side, parts in parts_by_side.items()}, torch.cat(labels)
    _check_widths({side: z.shape[1] for side, z in logits.items()}, y)
    return logits, y, torch.cat(id_parts)


def collect_logits(
    models: Mapping[str, nn.Module], batches: Iterable[Any], samples: int | None = None
) -> tuple[dict[str, Float[Tensor, "N C"]], Int[Tensor, " N"]]:
    """Return logits and labels as ``collect_logits_and_ids`` does, without the ids."""
    logits, y, _ = collect_logits_and_ids(models, batches, samples)
    return logits, y


def shuffled(logits: Mapping[str, Float[Tensor, "N C"]], seed: int) -> Int[Tensor, " N"]:
    """Return a random order of the rows, (N,), that depends on the seed and the rows, not on the order they came in."""
    keys = [z.nan_to_num(neginf=-1e4) @ torch.arange(1.0, z.shape[1] + 1).double().cos() for z in logits.values()]
    order = torch.stack(keys).sum(0).argsort(stable=True)
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]


def count_classes(models: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> int:
    """Return the number of classes, determined with one input.

    Raises:
        ValueError: as ``collect_logits`` does.
    """
    with torch.no_grad():
        widths = {side: as_function(model, side)(x[:1]).shape[1] for side, model in models.items()}
    return _check_widths(widths, y)


def _check_widths(widths: Mapping[str, int], y: Tensor) -> int:
    if len(set(widths.values())) > 1:
        counts = " and ".join(f"the {side} {n}" for side, n in widths.items())
        raise ValueError(f"student and teacher must have the same classes; {counts}.")
    classes = next(iter(widths.values()))
    if int(y.max()) >= classes:
        raise ValueError(f"there is a label {int(y.max())}, but the models have {classes} classes.")
    return classes


def check_positive(sizes: Mapping[str, float]) -> None:
    """Raise ValueError if a size is below 1, and name it."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
