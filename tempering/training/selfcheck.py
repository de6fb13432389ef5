"""What is asserted on the first batch, before an hour is spent: one line when all is well, a stop when not."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.methods.base import Method, StepMethod
from tempering.rows import Rows, total, widened
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.training.checkpoint import random_state, set_random_state

CLOSE = 1e-4  # how far two ways to one number may lie apart, relative: float32 losses of a few thousand classes
AGAIN = (
    1e-2  # how far two answers to one batch may lie apart, relative to the largest logit: half precision on a device
)


class SelfCheckFailed(RuntimeError):
    """The first batch shows that the run would be wrong; the message says what and what to do."""


class Checked(NamedTuple):
    """What was looked at: check -> "ok", or why it was left out."""

    checks: dict[str, str]

    @property
    def line(self) -> str:
        """One line for the terminal and the record."""
        fine = [name for name, said in self.checks.items() if said.startswith("ok")]
        rest = [f"{name} ({said})" for name, said in self.checks.items() if not said.startswith("ok")]
        return f"self-check ok: {', '.join(fine)}" + (f"; not checked: {', '.join(rest)}" if rest else "")


def selfcheck(
    student: nn.Module,
    teacher: Teacher | None,
    batch: Any,
    *,
    method: Method,
    task: Task,
    features: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] | None = None,
) -> Checked:
    """Look at one batch and leave no trace: modes, random numbers, statistics and the method's state are put back.

    Raises:
        SelfCheckFailed: naming what is wrong and what to do about it.
    """
    before, modes = random_state(), {module: module.training for module in student.modules()}
    try:
        with torch.no_grad():
            student_in, teacher_in, ids = task.inputs(batch)
            taught = None if teacher is None else teacher(teacher_in, ids)
            student.eval()
            said = student(student_in)
            blocks = task.rows(said, taught, batch)
            if features is not None:
                blocks[-1] = blocks[-1].with_(features={**blocks[-1].features, **features()})
            checks: dict[str, str] = {}
            for rows in blocks:
                _values(rows)
            if teacher is not None:
                again = task.rows(said, teacher(teacher_in, ids), batch)
                learns = isinstance(method, StepMethod) and method.trains_teacher
                checks |= _teacher(teacher, blocks, again, learns=learns, comparable=task.comparable)
        _masses(task, batch, blocks)
        for rows in blocks:
            checks |= _loss(method, rows, teacher is not None)
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_random_state(before)
    return Checked(checks)


def _teacher(
    teacher: Teacher, blocks: list[Rows], again: list[Rows], *, learns: bool, comparable: bool
) -> dict[str, str]:
    checks = {}
    model = teacher.model
    if model is not None:
        if any(p.requires_grad for p in model.parameters()):
            raise SelfCheckFailed("the teacher has parameters that require grad. Wrap it in teachers.Live(model).")
        loose = [name or "itself" for name, m in model.named_modules() if m.training]
        if loose:
            raise SelfCheckFailed(
                f"the teacher is in training mode ({loose[0]}): its answers depend on the batch and on dropout. Wrap "
                "it in teachers.Live(model), and do not call .train() on it."
            )
        checks |= {"teacher frozen": "the method trains it" if learns else "ok", "in eval": "ok"}
    for rows in blocks:
        if torch.isnan(rows.teacher).any() or torch.isposinf(rows.teacher).any():
            row = int((torch.isnan(rows.teacher) | torch.isposinf(rows.teacher)).any(-1).nonzero()[0])
            raise SelfCheckFailed(
                f"the teacher's logits hold NaN or infinity (first in row {row} of the first batch). Is its checkpoint "
                "whole, are its inputs normalised as in its training, does its precision suffice? Try precision='fp32'."
            )
    if not all(_alike(a.teacher, b.teacher) for a, b in zip(again, blocks, strict=True)):
        raise SelfCheckFailed(
            "the teacher answers the same batch differently the second time. Dropout left on, or random augmentation "
            "inside the model? Wrap it in teachers.Live(model), or give it the inputs without augmentation."
        )
    checks["deterministic"] = "ok"
    for rows in blocks:
        if not teacher.trained:
            checks["above chance"] = "the teacher is not trained yet"
        else:
            checks["above chance"] = _above_chance(rows) if comparable else "the two have classes of their own"
    return checks


def _alike(a: Tensor, b: Tensor) -> bool:
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return not len(a) or bool((a - b).abs().max() <= AGAIN * a.abs().max())


def _above_chance(rows: Rows) -> str:
    """Refuse a teacher that knows no more of the labels than a guess: a sign of shuffled classes or broken weights."""
    if rows.target is None:
        return "no labels"
    known = rows.target >= 0 if rows.weight is None else (rows.target >= 0) & (rows.weight > 0)
    n, classes = int(known.sum()), rows.teacher.shape[1]
    if n < 8 or classes < 2:
        return f"only {n} labelled rows of {classes} classes"
    right = int((rows.teacher.argmax(-1) == rows.target)[known].sum())
    if _by_guessing(right, n, classes) > 0.05:
        raise SelfCheckFailed(
            f"the teacher is right on {right} of {n} rows, as a guess among {classes} classes would be. Are its "
            "classes in the labels' order, its weights loaded, its inputs normalised as in its training? "
            "selfcheck=False (--no-selfcheck) runs it all the same."
        )
    return f"ok ({100 * right / n:.1f} % on the first batch)"


def _by_guessing(right: int, n: int, classes: int) -> float:
    """The probability that guesses among ``classes`` are right ``right`` times of ``n`` or more, for classes > 1."""
    k = torch.arange(right, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways - k * math.log(classes) + (n - k) * math.log1p(-1 / classes)).exp().sum())


def _masses(task: Task, batch: Any, blocks: list[Rows]) -> None:
    promised = task.mass(batch)
    for rows in blocks:
        if rows.name not in promised:
            raise SelfCheckFailed(
                f"{type(task).__name__}.mass() does not name the block {rows.name!r} that rows() makes."
            )
        got, said = float(rows.mass), float(promised[rows.name])
        if abs(got - said) > 1e-3 * max(1.0, got):
            raise SelfCheckFailed(
                f"{type(task).__name__}.mass() promises weight {said:g} for the block {rows.name!r} and rows() makes "
                f"{got:g}: the loss would change with the batch split."
            )


def _values(rows: Rows) -> None:
    if rows.target is not None and len(rows) and int(rows.target.max()) >= rows.student.shape[1]:
        raise SelfCheckFailed(
            f"label {int(rows.target.max())} is out of range for {rows.student.shape[1]} classes (they count from 0). "
            "Is the student's head too small, or do labels start at 1?"
        )
    if torch.isnan(rows.student).any():
        raise SelfCheckFailed("the student's logits hold NaN on the first batch. Are the inputs finite and normalised?")


def _loss(method: Method, rows: Rows, taught: bool) -> dict[str, str]:
    """Zero at agreement, the same for a split batch, shifted logits and rows without weight; finite gradients."""
    if isinstance(method, StepMethod):
        return {"loss": "the method owns its step"}
    hard = None if rows.hard is None else widened(rows.hard.detach())
    rows = rows.with_(student=widened(rows.student.detach()), teacher=widened(rows.teacher), hard=hard)

    def value(changed: Rows, whole: float | None = None) -> float:
        with torch.no_grad():
            return float(total(_ask(copy.deepcopy(method), changed), changed, rows_in_batch=whole))

    name, whole, reference = type(method).__name__, float(rows.mass), value(rows)
    if not math.isfinite(reference):
        raise SelfCheckFailed(
            f"{name}: the loss of the first batch is {reference}. Look at the logits of both models there."
        )
    checks = _agreement(method, rows) if taught and method.zero_at_agreement else {}

    def same(check: str, got: float, why: str) -> None:
        # "not <=" and not ">": a loss that is no number is not the same
        if not abs(got - reference) <= CLOSE * (1.0 + abs(reference)):
            raise SelfCheckFailed(f"{name}: the loss is {reference:.6g}, and {got:.6g} {why}")
        checks[check] = "ok"

    if method.is_relational() or len(rows) < 2:
        checks["split"] = "rows are compared with each other" if len(rows) > 1 else "one row"
    else:
        half = len(rows) // 2
        parts = (_cut(rows, slice(None, half)), _cut(rows, slice(half, None)))
        split = sum(value(p, whole) for p in parts)
        same("same when split", split, f"when the batch is split in two. Is {name} a method with relational = True?")
        padded = "with rows of weight 0 added: leave them out, or weigh what is summed over rows."
        same("same when padded", value(_padded(rows)), padded)
    if all(p.shift_invariant for p in method.policies().values()) and method.shift_invariant:
        moved = rows.with_(student=rows.student + 3.0, teacher=rows.teacher - 5.0)
        same("same when shifted", value(moved), "with a constant added to the logits, which softmax ignores.")
    else:
        checks["shift"] = "its temperatures move with a shift of the logits"
    _gradients(method, rows)
    return checks | {"finite gradients": "ok"}


def _ask(method: Method, rows: Rows) -> dict[str, Tensor]:
    """The terms of a fresh copy, which may remember rows, always with the same random numbers."""
    torch.default_generator.manual_seed(0)
    if rows.student.is_cuda:
        torch.cuda.manual_seed_all(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns, of rows that are its own
        return method(rows, 1.0)


def _agreement(method: Method, rows: Rows) -> dict[str, str]:
    agreeing = {name: (t, t) for name, (_, t) in rows.features.items()}
    with torch.no_grad():
        # what is private may be meant to be forgotten
        terms = _ask(copy.deepcopy(method), rows.with_(student=rows.teacher, features=agreeing, private=None))
    kept = slice(None) if rows.weight is None else rows.weight > 0
    soft = {k: v[kept].abs().max().item() for k, v in terms.items() if not k.endswith("hard") and len(v[kept])}
    if not all(v <= CLOSE for v in soft.values()):
        said = ", ".join(f"{k} = {v:.3g}" for k, v in soft.items())
        raise SelfCheckFailed(
            f"{type(method).__name__}: the loss of a student equal to its teacher is not 0 but {said} at most in a "
            "row. If it is meant so, the method says zero_at_agreement = False."
        )
    return {"zero at agreement": "ok"}


def _gradients(method: Method, rows: Rows) -> None:
    with torch.enable_grad():
        student = rows.student.clone().requires_grad_()
        features = {n: (s.detach().clone().requires_grad_(), t) for n, (s, t) in rows.features.items()}
        hard = None if rows.hard is None else rows.hard.clone().requires_grad_()
        made, own = rows.with_(student=student, features=features, hard=hard), copy.deepcopy(method)
        leaves = {"the student's logits": student} | {f"the feature {n!r}": s for n, (s, _) in features.items()}
        leaves |= {} if hard is None else {"the task's own losses": hard}
        leaves |= {f"its own {n}": p for n, p in own.named_parameters() if p.requires_grad}
        loss = total(_ask(own, made), made)
        if not loss.requires_grad:
            raise SelfCheckFailed(
                f"{type(method).__name__}: no gradient reaches the student. Is its side detached, or under no_grad?"
            )
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for what, gradient in zip(leaves, gradients, strict=True):
        if gradient is None or torch.isfinite(gradient).all():
            continue
        where = ""
        if not what.startswith("its own"):
            where = f", first in row {int((~torch.isfinite(gradient)).view(len(gradient), -1).any(1).nonzero()[0])}"
        raise SelfCheckFailed(
            f"{type(method).__name__}: the gradient in {what} is not finite on the first batch{where}. If classes are "
            "masked, mask them on both sides."
        )


def _cut(rows: Rows, part: slice) -> Rows:
    return rows.with_(
        student=rows.student[part],
        teacher=rows.teacher[part],
        target=None if rows.target is None else rows.target[part],
        weight=None if rows.weight is None else rows.weight[part],
        ids=None if rows.ids is None else rows.ids[part],
        places=None if rows.places is None else rows.places[part],
        private=None if rows.private is None else rows.private[part],
        hard=None if rows.hard is None else rows.hard[part],
        features={name: (s[part], t[part]) for name, (s, t) in rows.features.items()},
    )


def _padded(rows: Rows, extra: int = 2) -> Rows:
    """The rows with ``extra`` copies of weight 0 of the last ones, turned round, behind them."""
    tail = slice(-extra, None)
    weight = torch.ones(len(rows), device=rows.student.device) if rows.weight is None else rows.weight
    return rows.with_(
        student=torch.cat((rows.student, rows.student[tail].flip(-1))),
        teacher=torch.cat((rows.teacher, -rows.teacher[tail].flip(-1))),
        target=None if rows.target is None else torch.cat((rows.target, torch.full_like(rows.target[tail], -100))),
        weight=torch.cat((weight, torch.zeros_like(weight[tail]))),
        ids=None if rows.ids is None else torch.cat((rows.ids, rows.ids[tail])),
        places=None if rows.places is None else torch.cat((rows.places, rows.places[tail])),
        private=None if rows.private is None else torch.cat((rows.private, rows.private[tail])),
        hard=None if rows.hard is None else torch.cat((rows.hard, -rows.hard[tail])),
        features={n: (torch.cat((s, s[tail])), torch.cat((t, t[tail]))) for n, (s, t) in rows.features.items()},
    )
