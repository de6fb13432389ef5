"""What is asserted on the first batch, before an hour is spent: one line when all is well, a stop when not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tempering.checkpoints import random_state, set_random_state
from tempering.methods.base import Method, StepMethod
from tempering.rows import Rows, total, widened
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher

CLOSE = 1e-4  # how far two ways to one number may lie apart, relative: float32 losses of a few thousand classes


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
    before, training = random_state(), student.training
    try:
        with torch.no_grad():
            student_in, teacher_in, ids = task.inputs(batch)
            taught = None if teacher is None else teacher(teacher_in, ids)
            student.eval()
            said = student(student_in)
            blocks = task.rows(said, taught, batch)
            if features is not None:
                blocks[-1] = blocks[-1].with_(features=features())
            checks: dict[str, str] = {}
            if teacher is not None:
                again = task.rows(said, teacher(teacher_in, ids), batch)
                checks |= _teacher(teacher, blocks, again)
        _masses(task, batch, blocks)
        for rows in blocks:
            _values(rows)
            checks |= _loss(copy.deepcopy(method), rows, teacher is not None)
    finally:
        student.train(training)
        set_random_state(before)
    return Checked(checks)


def _teacher(teacher: Teacher, blocks: list[Rows], again: list[Rows]) -> dict[str, str]:
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
        checks |= {"teacher frozen": "ok", "in eval": "ok"}
    for rows in blocks:
        if torch.isnan(rows.teacher).any() or torch.isposinf(rows.teacher).any():
            row = int((torch.isnan(rows.teacher) | torch.isposinf(rows.teacher)).any(-1).nonzero()[0])
            raise SelfCheckFailed(
                f"the teacher's logits hold NaN or infinity (first in row {row} of the first batch). Is its checkpoint "
                "whole, are its inputs normalised as in its training, does its precision suffice? Try precision='fp32'."
            )
    if not all(torch.equal(a.teacher, b.teacher) for a, b in zip(again, blocks, strict=True)):
        raise SelfCheckFailed(
            "the teacher answers the same batch differently the second time. Dropout left on, or random augmentation "
            "inside the model? Wrap it in teachers.Live(model), or give it the inputs without augmentation."
        )
    checks["deterministic"] = "ok"
    for rows in blocks:
        checks["above chance"] = _above_chance(rows)
    return checks


def _above_chance(rows: Rows) -> str:
    """Refuse a teacher that knows no more of the labels than a guess: a sign of shuffled classes or broken weights."""
    if rows.target is None:
        return "no labels"
    known = rows.target >= 0 if rows.weight is None else (rows.target >= 0) & (rows.weight > 0)
    n, classes = int(known.sum()), rows.teacher.shape[1]
    if n < 8 or classes < 2:
        return f"only {n} labelled rows of {classes} classes"
    right = int((rows.teacher.argmax(-1) == rows.target)[known].sum())
    # the probability that guessing gets as many right
    p = sum(math.comb(n, k) * (1 / classes) ** k * (1 - 1 / classes) ** (n - k) for k in range(right, n + 1))
    if p > 0.05:
        raise SelfCheckFailed(
            f"the teacher is right on {right} of {n} rows, as a guess among {classes} classes would be. Are its "
            "classes in the labels' order, its weights loaded, its inputs normalised as in its training? "
            "selfcheck=False runs it all the same."
        )
    return f"ok ({100 * right / n:.1f} % on the first batch)"


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
    rows = rows.with_(student=widened(rows.student.detach()), teacher=widened(rows.teacher))

    def value(changed: Rows, **whole: Any) -> float:
        with torch.no_grad():
            return float(total(method(changed, 1.0), changed, **whole))

    checks, whole, reference = {}, float(rows.mass), value(rows)
    if not math.isfinite(reference):
        raise SelfCheckFailed(f"the loss of the first batch is {reference}. Look at the logits of both models there.")

    def same(name: str, got: float, why: str) -> None:
        if abs(got - reference) > CLOSE * (1.0 + abs(reference)):
            raise SelfCheckFailed(f"{type(method).__name__}: the loss is {reference:.6g}, and {got:.6g} {why}")
        checks[name] = "ok"

    if taught and method.zero_at_agreement:
        agreeing = {name: (t, t) for name, (_, t) in rows.features.items()}
        agree = method(rows.with_(student=rows.teacher, features=agreeing), 1.0)
        soft = {k: float(v.abs().max()) for k, v in agree.items() if not k.endswith("hard") and len(rows)}
        if any(v > CLOSE for v in soft.values()):
            raise SelfCheckFailed(
                f"{type(method).__name__}: the loss of a student equal to its teacher is {soft}, not 0."
            )
        checks["zero at agreement"] = "ok"
    if method.is_relational() or len(rows) < 2:
        checks["split"] = "rows are compared with each other" if len(rows) > 1 else "one row"
    else:
        half = len(rows) // 2
        parts = (_cut(rows, slice(None, half)), _cut(rows, slice(half, None)))
        same("same when split", sum(value(p, rows_in_batch=whole) for p in parts), "when the batch is split in two.")
        padded = _padded(rows)
        same("same when padded", value(padded), "with rows of weight 0 added.")
    if all(p.shift_invariant for p in method.policies().values()) and method.shift_invariant:
        moved = rows.with_(student=rows.student + 3.0, teacher=rows.teacher - 5.0)
        same("same when shifted", value(moved), "with a constant added to the logits, which softmax ignores.")
    else:
        checks["shift"] = "its temperatures move with a shift of the logits"
    _gradients(method, rows)
    return checks | {"finite gradients": "ok"}


def _gradients(method: Method, rows: Rows) -> None:
    leaf = rows.student.clone().requires_grad_()
    with torch.enable_grad():
        made = rows.with_(student=leaf)
        (gradient,) = torch.autograd.grad(total(method(made, 1.0), made), leaf)
    if not torch.isfinite(gradient).all():
        row = int((~torch.isfinite(gradient)).any(-1).nonzero()[0])
        raise SelfCheckFailed(
            f"{type(method).__name__}: the gradient is not finite in row {row} of the first batch. If classes are "
            "masked, mask them on both sides."
        )


def _cut(rows: Rows, part: slice) -> Rows:
    return rows.with_(
        student=rows.student[part],
        teacher=rows.teacher[part],
        target=None if rows.target is None else rows.target[part],
        weight=None if rows.weight is None else rows.weight[part],
        ids=None if rows.ids is None else rows.ids[part],
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
        features={n: (torch.cat((s, s[tail])), torch.cat((t, t[tail]))) for n, (s, t) in rows.features.items()},
    )
