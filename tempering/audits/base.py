"""What an audit is: a student, its teacher and labeled batches in, findings out, and no model changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.rows import upcast_to_float32

Answer = Callable[[Tensor], Tensor]  # inputs (N, ...) to logits (N, C), in float32 at least


@dataclass(frozen=True)
class Finding:
    """One number that an audit found.

    Args:
        name: of the number, such as "ece" or "pgd".
        of: whose it is: "student", "teacher", or "both" for what is between them.
        value: the number; None where it could not be had, and ``meaning`` says why.
        meaning: a sentence or two for a reader: what the number says, and what it does not.
        low, high: its 95 % interval; None where there is none.
        n: samples it rests on.
        share: whether it is a share, written in percent.

    Raises:
        ValueError: for a number that is not finite.
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
        """As it stands in audits.json."""
        return asdict(self)


class Audit(ABC):
    """Looks at a trained student, beside its teacher where there is one. It changes neither: modes and the weights'
    ``requires_grad`` are put back, also where it is interrupted, and no global random number is drawn.

    Batches are (inputs, labels, ...) of a classification task, such as a test split without augmentation; unlabeled
    rows are left out. ``samples`` is how many rows are looked at, the first ones; None for all.
    """

    samples: int | None = None

    def __call__(self, student: nn.Module, teacher: Any, batches: Iterable[Any]) -> list[Finding]:
        """The findings. ``teacher`` is a module, a Teacher with a live one, or None.

        Raises:
            TypeError: for something that is no model.
            ValueError: for batches that hold nothing, labels that fit no class, or logits that are not finite.
        """
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{type(self).__name__} needs samples >= 1, or None for all; got {self.samples}.")
        models = {"student": _module(student, "student")}
        if teacher is not None:
            models["teacher"] = _module(teacher, "teacher")
        with ExitStack() as rest:
            for model in models.values():
                rest.enter_context(at_rest(model))
            return self.examine(models, batches)

    @abstractmethod
    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        """The findings on "student" and, where there is one, "teacher", both in eval mode and frozen."""

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """What the report draws beside the findings, plain enough for JSON; {} for nothing."""
        return {}


def _module(model: Any, side: str) -> nn.Module:
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if isinstance(found, nn.Module):
        return found
    raise TypeError(
        f"an audit asks the {side} anew, so it must be a module or a teacher with a live one; got "
        f"{type(model).__name__}. A cache knows the answers to its own inputs alone: give the model itself."
    )


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with weights that want no gradient; put back as it was, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    wants = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in wants:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, wanted in wants:
            p.requires_grad_(wanted)


def as_function(model: nn.Module, side: str) -> Answer:
    """The model as inputs (N, ...) on any device -> logits (N, C), widened, with a gradient path where one is on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def answer(inputs: Tensor) -> Tensor:
        said = model(inputs.to(device))
        logits = getattr(said, "logits", said)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the {side} must answer (N, C) logits for an audit; got {got} for {len(inputs)} inputs.")
        logits = upcast_to_float32(logits)
        if not torch.isfinite(logits.detach()).all():
            raise ValueError(f"the {side} answers numbers that are not finite; an audit of it would mean nothing.")
        return logits

    return answer


def identified(batches: Iterable[Any], samples: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, labels, ids) of the labeled rows, batch by batch, the first ``samples`` of them.

    Ids are the batches' third part, else the rows' numbers in the order in which they come.

    Raises:
        ValueError: for batches of another form, or where there is no labeled row at all.
    """
    seen = walked = 0
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(b, Tensor) for b in batch[:2]):
            raise ValueError(f"an audit needs batches (inputs, labels, ...) of tensors; got {type(batch).__name__}.")
        x, y = batch[0], batch[1]
        if len(x) != len(y) or y.ndim != 1 or y.is_floating_point():
            raise ValueError(
                f"an audit needs a class index (N,) for each of {len(x)} inputs; got {y.dtype} {tuple(y.shape)}."
            )
        given = batch[2] if len(batch) > 2 else None
        if not isinstance(given, Tensor) or given.shape != y.shape or given.is_floating_point():
            given = torch.arange(walked, walked + len(y), device=y.device)
        walked += len(y)
        kept = y >= 0
        x, y, ids = (part[kept] if samples is None else part[kept][: samples - seen] for part in (x, y, given))
        seen += len(y)
        if len(y):
            yield x, y, ids
        if samples is not None and seen >= samples:
            break
    if not seen:
        raise ValueError("there is nothing to audit: the batches hold no labeled row. Is the split empty?")


def labeled(batches: Iterable[Any], samples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The same without ids."""
    for x, y, _ in identified(batches, samples):
        yield x, y


def data(batches: Iterable[Any], samples: int | None) -> tuple[Tensor, Int[Tensor, " N"]]:
    """All inputs and labels at once, (N, ...) and (N,), on the CPU."""
    x, y = zip(*((x.cpu(), y.cpu()) for x, y in labeled(batches, samples)), strict=True)
    return torch.cat(x), torch.cat(y)


@torch.no_grad()
def answered(
    models: Mapping[str, nn.Module], batches: Iterable[Any], samples: int | None = None
) -> tuple[dict[str, Float[Tensor, "N C"]], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """What each model says, side -> (N, C) float64 on the CPU, the labels (N,) and the ids (N,).

    Raises:
        ValueError: where the two have other numbers of classes, or a label fits none.
    """
    asked = {side: as_function(model, side) for side, model in models.items()}
    said: dict[str, list[Tensor]] = {side: [] for side in models}
    labels, known = [], []
    for x, y, ids in identified(batches, samples):
        labels.append(y.cpu())
        known.append(ids.cpu())
        for side, answer in asked.items():
            said[side].append(answer(x).cpu().double())
    whole, y = {side: torch.cat(parts) for side, parts in said.items()}, torch.cat(labels)
    _check_widths({side: z.shape[1] for side, z in whole.items()}, y)
    return whole, y, torch.cat(known)


def answers(
    models: Mapping[str, nn.Module], batches: Iterable[Any], samples: int | None = None
) -> tuple[dict[str, Float[Tensor, "N C"]], Int[Tensor, " N"]]:
    """The same without ids."""
    said, y, _ = answered(models, batches, samples)
    return said, y


def count_classes(models: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> int:
    """How many classes the models tell apart, asked with one input.

    Raises:
        ValueError: as ``answers`` does.
    """
    with torch.no_grad():
        widths = {side: as_function(model, side)(x[:1]).shape[1] for side, model in models.items()}
    return _check_widths(widths, y)


def _check_widths(widths: Mapping[str, int], y: Tensor) -> int:
    if len(set(widths.values())) > 1:
        said = " and ".join(f"the {side} {n}" for side, n in widths.items())
        raise ValueError(f"student and teacher must answer the same classes; {said}.")
    classes = next(iter(widths.values()))
    if int(y.max()) >= classes:
        raise ValueError(f"there is a label {int(y.max())} and the models answer {classes} classes.")
    return classes


def check_positive(sizes: Mapping[str, float]) -> None:
    """Raise ValueError for a size that is below 1, naming it."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
