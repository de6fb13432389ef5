"""Invariants of floating point: confident rows, large logits, classes of minus infinity, bfloat16."""

from __future__ import annotations

import math

import torch

from tempering.conformance.checks.base import ROWS, check_close, first_line, invariant, plain
from tempering.conformance.checks.values import factor_at
from tempering.conformance.draws import Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.tolerances import BFLOAT16, FORMULA, rounding


@invariant("confident rows", after=("definition",), promised=lambda p: p.definition is not None)
def confident_rows(probe: Probe, draw: Draw) -> None:
    """The value is the definition's where probabilities are as small as e^-60."""
    c = draw.integer(2, 5)
    student, teacher = (draw.array(1, c) * 30 for _ in "st")
    t = probe.temperatures[0]
    target = draw.labels(1, c)
    reference = float(probe.reference(student, teacher, target, t))
    factor = factor_at(probe, t, c)
    if factor is None or not math.isfinite(reference):
        return
    found = float(probe(student, teacher, target, t))
    if not abs(found - factor * reference) <= FORMULA * abs(factor * reference) + rounding(student.dtype, 60.0) * abs(
        factor
    ):
        raise Violation(
            "confident rows are off", expected=factor * reference, found=found, student=student, teacher=teacher
        )


@invariant("logits of 10,000", after=("runs",), of_draws=True)
def large_logits(probe: Probe, draw: Draw) -> None:
    """Loss and gradient are finite for float32 logits of 10,000."""
    student, teacher = draw.pair()
    size = 5000.0 if probe.kind != "top_k" else 40.0
    student, teacher = (size * student).float(), (size * teacher).float()
    value, gradient = probe.gradient(student, teacher, draw.labels(len(student), student.shape[1]))
    if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
        raise Violation(
            "logits of 10,000 give a loss or gradient that is not finite",
            found=plain(value),
            student=student,
            teacher=teacher,
        )


def _masked(probe: Probe, draw: Draw, *, both: bool) -> None:
    n, c = draw.integer(1, 3), draw.integer(3, 6)
    student, teacher = draw.pair(n=n, c=c)
    # class 0 is the label; where the classes have an order, those that stay keep their places
    column = draw.integer(1, c - 1) if probe.promises.class_order else c - 1
    kept = torch.arange(c) != column
    target = torch.zeros(n, dtype=torch.long)
    t = teacher.clone()
    t[:, column] = -torch.inf
    s = student.clone()
    if both:
        s[:, column] = -torch.inf
    try:
        value, gradient = probe.gradient(s, t, target)
    except (ValueError, RuntimeError, TypeError) as error:
        raise NotApplicable(f"refused: {first_line(error)}") from None
    tensors = {"student": s, "teacher": t}
    if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
        raise Violation("a class of minus infinity gives NaN or infinity", found=plain(value), promised=None, **tensors)
    if both:
        want = probe(student[:, kept], teacher[:, kept], target)
        if probe.promises.definition in ("mse", "mse_of_probabilities") or probe.promises.reduction == "elements":
            want = want * (c - 1) / c
        check_close(value, want, "the value is not the one without the masked class", relative=FORMULA, tensors=tensors)


@invariant("classes masked on both sides", after=("runs",), promised=lambda p: p.masked_classes)
def masked_on_both_sides(probe: Probe, draw: Draw) -> None:
    """A class of minus infinity on both sides is as if it were not there, or refused."""
    if probe.kind == "top_k":
        raise NotApplicable("a top-k list leaves the class out")
    _masked(probe, draw, both=True)


@invariant(
    "classes masked by the teacher", after=("runs", "classes masked on both sides"), promised=lambda p: p.masked_teacher
)
def masked_by_the_teacher(probe: Probe, draw: Draw) -> None:
    """A class that only the teacher masks has probability 0: loss and gradient are finite, or it is refused."""
    if probe.promises.definition not in (None, "kl", "cross_entropy"):
        raise NotApplicable("the definition is infinite")
    _masked(probe, draw, both=False)


def _bf16(probe: Probe, draw: Draw, near: bool) -> None:
    c = draw.integer(2, 6)
    student, teacher = draw.pair(n=draw.integer(1, 3), c=c)
    if near:
        student = teacher + 0.04 * student
    student, teacher = student.bfloat16(), teacher.bfloat16()
    target = draw.labels(len(student), c)
    try:
        found = probe(student, teacher, target)
    except (ValueError, RuntimeError, TypeError) as error:
        raise NotApplicable(f"refused: {first_line(error)}") from None
    expected = float(probe(student.double(), teacher.double(), target))
    limit = BFLOAT16 * abs(expected) + rounding(torch.float32, 3.0)
    if found.dtype == torch.bfloat16:  # the last rounding is to the inputs' dtype
        limit += torch.finfo(torch.bfloat16).eps * abs(expected)
    if not abs(float(found) - expected) <= limit:
        raise Violation(
            "bfloat16 logits give another value",
            expected=expected,
            found=float(found),
            student=student,
            teacher=teacher,
        )


@invariant("bfloat16", ROWS, after=("runs",), promised=lambda p: p.low_precision)
def bfloat16_far(probe: Probe, draw: Draw) -> None:
    """bfloat16 logits give the value of the same logits in float64, since the arithmetic is in float32."""
    _bf16(probe, draw, near=False)


@invariant("bfloat16 near agreement", ROWS, after=("runs", "bfloat16"), promised=lambda p: p.low_precision)
def bfloat16_near(probe: Probe, draw: Draw) -> None:
    """The same near agreement, where small differences of logarithms are lost in bfloat16."""
    _bf16(probe, draw, near=True)


@invariant("padded vocabulary", ("logits", "tokens"), after=("runs",), promised=lambda p: p.padded_vocabulary)
def padded_vocabulary(probe: Probe, draw: Draw) -> None:
    """Columns that only one side has do not count, or are refused."""
    student, teacher = draw.pair()
    n, c = student.shape
    target, extra = draw.labels(n, c), draw.array(n, 2, low=0, high=8)
    want = probe(student, teacher, target)
    refused: list[str] = []
    for s, t in ((student, torch.cat((teacher, extra), 1)), (torch.cat((student, extra), 1), teacher)):
        try:
            got = probe(s, t, target)
        except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
            refused.append(first_line(error))
            continue
        check_close(got, want, "columns of one side's vocabulary padding count", student=s, teacher=t)
    if len(refused) == 2:
        raise NotApplicable(f"refused: {refused[0]}")
