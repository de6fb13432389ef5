"""Checks of the first batch before training: one line if all pass, an error if one fails."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.rows import Rows, rows_per_sample, total, upcast_to_float32
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.training.checkpoint import random_state, set_random_state

LOSS_TOLERANCE = 1e-4  # relative tolerance of losses, for float32 and a few thousand classes
REPEAT_TOLERANCE = (
    1e-2  # tolerance of repeated forward passes, relative to the largest logit, for half precision on a GPU
)


class SelfCheckError(RuntimeError):
    """The first batch shows that the run would be wrong; the message names the problem and what to do."""


class Checked(NamedTuple):
    """The result of the self-check.

    Attributes:
        checks: check -> "ok", or why it does not apply.
    """

    checks: dict[str, str]

    @property
    def line(self) -> str:
        """The result in one line, for the terminal and the record."""
        passed = [name for name, result in self.checks.items() if result.startswith("ok")]
        skipped = [f"{name} ({result})" for name, result in self.checks.items() if not result.startswith("ok")]
        return f"self-check ok: {', '.join(passed)}" + (f"; not checked: {', '.join(skipped)}" if skipped else "")


def selfcheck(
    student: nn.Module,
    teacher: Teacher | None,
    batch: Any,
    *,
    method: Method,
    task: Task,
    features: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] | None = None,
) -> Checked:
    """Check teacher, student and method on a batch, and restore all state, random state included.

    Args:
        features: the paired features of the last forward passes, for methods that compare them.

    Raises:
        SelfCheckError: if a check fails.
    """
    saved_random_state, modes = random_state(), {module: module.training for module in student.modules()}
    checks: dict[str, str] = {}
    try:
        with torch.no_grad():
            student_inputs, teacher_inputs, ids = task.inputs(batch)
            teacher_output = None if teacher is None else teacher(teacher_inputs, ids)
            student.eval()
            student_output = student(student_inputs)
            blocks = task.rows(student_output, teacher_output, batch)
            if features is not None:
                blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **features()})
            for rows in blocks:
                _check_student(rows)
            if teacher is not None:
                repeated = task.rows(student_output, teacher(teacher_inputs, ids), batch)
                checks |= _check_modes(teacher, method)
                checks |= _check_teacher_logits(blocks, repeated, comparable=task.comparable, trained=teacher.trained)
        _check_row_weights(task, batch, blocks)
        for rows in blocks:
            checks |= _check_loss(method, rows, has_teacher=teacher is not None)
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_random_state(saved_random_state)
    return Checked(checks)


def _check_modes(teacher: Teacher, method: Method) -> dict[str, str]:
    """Check that a live teacher is frozen and in eval mode."""
    model = teacher.model
    if model is None:
        return {}
    if any(p.requires_grad for p in model.parameters()):
        raise SelfCheckError("the teacher has parameters that require grad. Wrap it in teachers.Live(model).")
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    training = [name or "itself" for name, m in modules if m.training]
    if training:
        raise SelfCheckError(
            f"the teacher is in training mode ({training[0]}): its outputs depend on the batch and on dropout. Wrap "
            "it in teachers.Live(model), and do not call .train() on it."
        )
    return {"teacher frozen": "the method trains it" if method.trains_teacher else "ok", "in eval": "ok"}


def _check_teacher_logits(
    blocks: list[Rows], repeated: list[Rows], *, comparable: bool, trained: bool
) -> dict[str, str]:
    """Check that the teacher's logits are finite, equal in a second forward pass, and better than chance."""
    for rows in blocks:
        if torch.isnan(rows.teacher).any() or torch.isposinf(rows.teacher).any():
            row = int((torch.isnan(rows.teacher) | torch.isposinf(rows.teacher)).any(-1).nonzero()[0])
            raise SelfCheckError(
                f"the teacher's logits hold NaN or infinity (first in row {row} of the first batch). Is its checkpoint "
                "complete? Are its inputs normalized as in its training? Is its precision enough? Try precision='fp32'."
            )
    if not all(_close(a.teacher, b.teacher) for a, b in zip(repeated, blocks, strict=True)):
        raise SelfCheckError(
            "the teacher's logits differ in a second forward pass of the same batch. Is dropout on, or is there random "
            "augmentation in the model? Wrap it in teachers.Live(model), or give it the inputs without augmentation."
        )
    checks = {"deterministic": "ok"}
    for rows in blocks:
        if not trained:
            checks["above chance"] = "the teacher is not trained yet"
        else:
            checks["above chance"] = _check_above_chance(rows) if comparable else "the two have classes of their own"
    return checks


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether logits of two forward passes agree."""
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return not len(a) or bool((a - b).abs().max() <= REPEAT_TOLERANCE * a.abs().max())


def _check_above_chance(rows: Rows) -> str:
    """Check that the teacher's accuracy is above chance; it is not for shuffled classes or broken weights."""
    if rows.target is None:
        return "no labels"
    known = rows.target >= 0 if rows.weight is None else (rows.target >= 0) & (rows.weight > 0)
    n, classes = int(known.sum()), rows.teacher.shape[1]
    if n < 8 or classes < 2:
        return f"only {n} labeled rows of {classes} classes"
    correct = int((rows.teacher.argmax(-1) == rows.target)[known].sum())
    if _p_value(correct, n, classes) > 0.05:
        raise SelfCheckError(
            f"the teacher is right on {correct} of {n} rows, as a guess among {classes} classes would be. Are its "
            "classes in the labels' order, its weights loaded, its inputs normalized as in its training? "
            "selfcheck=False (--no-selfcheck) skips this check."
        )
    return f"ok ({100 * correct / n:.1f} % on the first batch)"


def _p_value(correct: int, n: int, classes: int) -> float:
    """Return the probability of at least ``correct`` hits in ``n`` uniform guesses among ``classes`` > 1."""
    k = torch.arange(correct, n + 1, dtype=torch.float64)
    log_binomial = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((log_binomial - k * math.log(classes) + (n - k) * math.log1p(-1 / classes)).exp().sum())


def _check_row_weights(task: Task, batch: Any, blocks: list[Rows]) -> None:
    """Check that ``task.row_weights()`` is the total weight of the rows that ``task.rows()`` returns."""
    declared = task.row_weights(batch)
    for rows in blocks:
        if rows.name not in declared:
            raise SelfCheckError(
                f"{type(task).__name__}.row_weights() does not have the block {rows.name!r} that rows() returns."
            )
        got, expected = float(rows.total_weight), float(declared[rows.name])
        if abs(got - expected) > 1e-3 * max(1.0, got):
            raise SelfCheckError(
                f"{type(task).__name__}.row_weights() is {expected:g} for the block {rows.name!r}, but rows() has "
                f"{got:g}: the loss would change with the batch split."
            )


def _check_student(rows: Rows) -> None:
    """Check labels and the student's logits."""
    if rows.target is not None and len(rows) and int(rows.target.max()) >= rows.student.shape[1]:
        raise SelfCheckError(
            f"label {int(rows.target.max())} is out of range for {rows.student.shape[1]} classes (the first is 0). "
            "Is the student's head too small, or do labels start at 1?"
        )
    if torch.isnan(rows.student).any():
        raise SelfCheckError("the student's logits hold NaN on the first batch. Are the inputs finite and normalized?")


def _check_loss(method: Method, rows: Rows, *, has_teacher: bool) -> dict[str, str]:
    """Check the method's loss and gradients.

    The soft terms are 0 for a student equal to the teacher, splitting the batch, shifting logits and adding rows of
    weight 0 do not change the loss, and gradients are finite.
    """
    if method.owns_step:
        return {"loss": "the method owns its step"}
    hard = None if rows.task_loss is None else upcast_to_float32(rows.task_loss.detach())
    rows = rows.replace(
        student=upcast_to_float32(rows.student.detach()), teacher=upcast_to_float32(rows.teacher), task_loss=hard
    )

    def loss(rows: Rows, normalizer: float | None = None) -> float:
        with torch.no_grad():
            return float(total(_terms(copy.deepcopy(method), rows), rows, normalizer=normalizer))

    name, weight, reference = type(method).__name__, float(rows.total_weight), loss(rows)
    if not math.isfinite(reference):
        raise SelfCheckError(
            f"{name}: the loss of the first batch is {reference}. Inspect the logits of both models on it."
        )
    checks = _check_zero_when_equal(method, rows) if has_teacher and method.zero_when_equal else {}

    def check_equal(check: str, got: float, reason: str) -> None:
        # "not <=" rather than ">", to catch NaN
        if not abs(got - reference) <= LOSS_TOLERANCE * (1.0 + abs(reference)):
            raise SelfCheckError(f"{name}: the loss is {reference:.6g}, and {got:.6g} {reason}")
        checks[check] = "ok"

    if method.is_batch_dependent() or len(rows) < 2:
        checks["split"] = "rows are compared with each other" if len(rows) > 1 else "one row"
    else:
        half = len(rows) // 2
        if (per := rows_per_sample(rows)) > 1:  # samples are not cut
            half = max(1, len(rows) // per // 2) * per
        parts = (rows.select(slice(None, half)), rows.select(slice(half, None)))
        split = sum(loss(part, weight) for part in parts)
        check_equal(
            "same when split", split, f"when the batch is split in two. Is {name} a method with relational = True?"
        )
        padded = "with rows of weight 0 added: leave them out, or weight the terms of every sum over rows."
        check_equal("same when padded", loss(_padded(rows)), padded)
    if all(p.shift_invariant for p in method.policies().values()) and method.shift_invariant:
        shifted = rows.replace(student=rows.student + 3.0, teacher=rows.teacher - 5.0)
        check_equal(
            "same when shifted", loss(shifted), "with a constant added to the logits, which does not change softmax."
        )
    else:
        checks["shift"] = "its temperatures move with a shift of the logits"
    _check_gradients(method, rows)
    return checks | {"finite gradients": "ok"}


def _terms(method: Method, rows: Rows) -> dict[str, Tensor]:
    """Compute the terms with a fixed seed; the method has to be a copy, because it may store rows."""
    torch.default_generator.manual_seed(0)
    if rows.student.is_cuda:
        torch.cuda.manual_seed_all(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run warns
        return method(rows, 1.0)


def _check_zero_when_equal(method: Method, rows: Rows) -> dict[str, str]:
    """Check that the soft terms of a student equal to the teacher are 0."""
    features = {name: (t, t) for name, (_, t) in rows.features.items()}
    with torch.no_grad():
        # without privacy scores: private rows may have other targets
        terms = _terms(copy.deepcopy(method), rows.replace(student=rows.teacher, features=features, privacy_score=None))
    kept = slice(None) if rows.weight is None else rows.weight > 0
    soft = {k: v[kept].abs().max().item() for k, v in terms.items() if not k.endswith("hard") and len(v[kept])}
    if not all(v <= LOSS_TOLERANCE for v in soft.values()):
        values = ", ".join(f"{k} = {v:.3g}" for k, v in soft.items())
        raise SelfCheckError(
            f"{type(method).__name__}: the loss of a student equal to its teacher is not 0; the largest terms of a "
            f"row: {values}. If this is intended, set zero_when_equal = False."
        )
    return {"zero at agreement": "ok"}


def _check_gradients(method: Method, rows: Rows) -> None:
    """Check that gradients reach the student, and that all gradients are finite."""
    with torch.enable_grad():
        student = rows.student.clone().requires_grad_()
        features = {n: (s.detach().clone().requires_grad_(), t) for n, (s, t) in rows.features.items()}
        hard = None if rows.task_loss is None else rows.task_loss.clone().requires_grad_()
        rows, method = rows.replace(student=student, features=features, task_loss=hard), copy.deepcopy(method)
        leaves = {"the student's logits": student} | {f"the feature {n!r}": s for n, (s, _) in features.items()}
        leaves |= {} if hard is None else {"the task's own losses": hard}
        leaves |= {f"its own {n}": p for n, p in method.named_parameters() if p.requires_grad}
        loss = total(_terms(method, rows), rows)
        if not loss.requires_grad:
            raise SelfCheckError(
                f"{type(method).__name__}: no gradient reaches the student. Is it detached, or computed under no_grad?"
            )
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, cast("Sequence[Tensor | None]", gradients), strict=True):
        if gradient is None or torch.isfinite(gradient).all():
            continue
        position = ""
        if not name.startswith("its own"):
            position = f", first in row {int((~torch.isfinite(gradient)).view(len(gradient), -1).any(1).nonzero()[0])}"
        raise SelfCheckError(
            f"{type(method).__name__}: the gradient in {name} is not finite on the first batch{position}. If classes "
            "are masked, mask them on both sides."
        )


def _padded(rows: Rows, extra: int = 2) -> Rows:
    """Append copies of the last ``extra`` samples with weight 0 and changed values."""
    per = rows_per_sample(rows)
    samples, tail = slice(-extra, None), slice(-extra * per, None)
    weight = torch.ones(len(rows), device=rows.student.device) if rows.weight is None else rows.weight
    return rows.replace(
        student=torch.cat((rows.student, rows.student[tail].flip(-1))),
        teacher=torch.cat((rows.teacher, -rows.teacher[tail].flip(-1))),
        target=None if rows.target is None else torch.cat((rows.target, torch.full_like(rows.target[tail], -100))),
        weight=torch.cat((weight, torch.zeros_like(weight[tail]))),
        ids=None if rows.ids is None else torch.cat((rows.ids, rows.ids[tail])),
        positions=None if rows.positions is None else torch.cat((rows.positions, rows.positions[tail])),
        privacy_score=None if rows.privacy_score is None else torch.cat((rows.privacy_score, rows.privacy_score[tail])),
        task_loss=None if rows.task_loss is None else torch.cat((rows.task_loss, -rows.task_loss[tail])),
        features={n: (torch.cat((s, s[samples])), torch.cat((t, t[samples]))) for n, (s, t) in rows.features.items()},
    )
