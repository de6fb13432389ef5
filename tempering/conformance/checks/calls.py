"""Invariants of every loss: it runs, leaves its inputs alone, and its gradient is the slope of its value."""

from __future__ import annotations

import torch

from tempering.conformance.checks.base import ALL, check_close, invariant, plain, scale_of, sequences
from tempering.conformance.draws import Draw
from tempering.conformance.probe import Probe, Violation, top_k_of
from tempering.conformance.tolerances import FORMULA, SLOPE, rounding
from tempering.rows import IGNORE_INDEX


@invariant("runs", ALL, examples=5, of_draws=True)
def runs(probe: Probe, draw: Draw) -> None:
    """The loss is finite and has a gradient in the student."""
    student, teacher = draw.pair(2)
    value, gradient = probe.gradient(student, teacher)
    if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
        raise Violation("the loss or its gradient is not finite", found=plain(value), student=student, teacher=teacher)
    if not bool(gradient.any()) and not _has_gradient(probe, *student.shape):
        raise Violation("no gradient reaches the student", found=0.0, student=student, teacher=teacher)


def _has_gradient(probe: Probe, *shape: int) -> bool:
    """Whether there is a gradient for other inputs, since a loss may be stationary for some."""
    generator = torch.Generator().manual_seed(0)
    if probe.kind == "scores":  # what is left of two after they are normalized is constant
        shape = (*shape[:-1], 4)
    pairs = torch.randn(3, 2, *shape, generator=generator, dtype=torch.float64)
    return any(bool(probe.gradient(student, teacher)[1].any()) for student, teacher in pairs)


@invariant("inputs untouched", ALL, after=("runs",), examples=5, of_draws=True)
def inputs_untouched(probe: Probe, draw: Draw) -> None:
    """The inputs are not modified."""
    target = None
    if probe.on_rows:
        student, teacher, target, _ = sequences(probe, draw, ignored=False)
    else:
        student, teacher = draw.pair(2)
    given = student, teacher
    if probe.kind == "top_k":
        given = student, *top_k_of(teacher, 2, probe.promises.top_k_values)
    held = tuple(x.clone() for x in given)
    held = held[0].requires_grad_() * 1.0, *held[1:]
    probe.copies = False
    try:
        if target is None:
            probe(held[0], held[1])
        else:
            probe.call_sides(held, target)
    finally:
        probe.copies = True
    for side, x, y in zip(("student", "teacher", "list"), held, given, strict=False):
        if not torch.equal(x, y):
            raise Violation(f"the {side}'s tensor is modified in place", student=student, teacher=teacher)


@invariant("deterministic", ALL, after=("runs",), examples=5, of_draws=True)
def deterministic(probe: Probe, draw: Draw) -> None:
    """Two calls with the same inputs give the same bits."""
    student, teacher = draw.pair(2)
    first, second = probe.gradient(student, teacher), probe.gradient(student, teacher)
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise Violation(
            "two calls differ", expected=plain(first[0]), found=plain(second[0]), student=student, teacher=teacher
        )


@invariant("no gradient into the teacher", ("logits", "tokens", "features", "scores"), after=("runs",), examples=5)
def no_gradient_into_the_teacher(probe: Probe, draw: Draw) -> None:
    """A teacher that requires grad gets none, or is refused."""
    student, teacher = draw.pair(2)
    leaf = teacher.clone().requires_grad_()
    try:
        value = probe(student.clone().requires_grad_(), leaf)
        value.backward()
    except (ValueError, RuntimeError, TypeError, AssertionError):
        return
    if leaf.grad is not None and bool(leaf.grad.any()):
        raise Violation(
            "the teacher gets a gradient",
            expected=0.0,
            found=plain(leaf.grad.abs().max()),
            student=student,
            teacher=teacher,
        )


@invariant("alignment", after=("runs",), applies=lambda p: not p.batch_dependent)
def alignment(probe: Probe, draw: Draw) -> None:
    """The student's row i is compared with the teacher's row i, and a mask selects the rows that it names."""
    student, teacher = draw.pair(3, 4)
    n, c = student.shape
    target = draw.labels(n, c)
    i, other = draw.integer(0, n - 1), draw.array(c)
    moved = teacher.clone()
    moved[i] = other
    g = [probe.gradient(student, t, target)[1] for t in (teacher, moved)]
    rest = torch.arange(n) != i
    check_close(
        g[1][rest],
        g[0][rest],
        f"the teacher's row {i} changes the gradient of other rows of the student",
        tol=rounding(student.dtype, 1.0),
        student=student,
        teacher=teacher,
        moved=moved,
    )
    if not probe.ignores:
        return
    alone = torch.where(rest, IGNORE_INDEX, target)
    gradient = probe.gradient(student, teacher, alone)[1]
    with_gradient = gradient.abs().amax(1) > rounding(student.dtype) * 1e-3
    if bool(with_gradient.any()) and not bool(with_gradient[i]):
        raise Violation(
            f"only row {i} is valid, and the gradient is in other rows",
            expected=i,
            found=with_gradient.nonzero().flatten().tolist(),
            student=student,
            teacher=teacher,
            labels=alone,
        )


@invariant("slope", ALL, after=("runs",), promised=lambda p: not p.detached_scale, examples=12, of_draws=True)
def slope(probe: Probe, draw: Draw) -> None:
    """The gradient is the slope of the value (central differences), at every T."""
    student, teacher = draw.pair(1, 3)
    direction = _uneven_direction(draw.array(*student.shape))
    target = draw.labels(len(student), student.shape[1]) if probe.on_rows else None
    for temperature in probe.temperatures:
        if temperature < 1.0:  # curved: differences need smaller steps than float32 has digits for
            continue
        value, gradient = probe.gradient(student, teacher, target, temperature)
        steps = [h * temperature for h in (0.025, 0.05, 0.1)]
        with torch.no_grad():
            up, down = (
                [float(probe(student + sign * h * direction, teacher, target, temperature)) for h in steps]
                for sign in (1, -1)
            )
        differences = [(u - v) / (2 * h) for u, v, h in zip(up, down, steps, strict=True)]
        # Richardson: the error of a central difference is a multiple of h^2, which the combination removes
        expected, farther = ((4 * differences[i] - differences[i + 1]) / 3 for i in (0, 1))
        bends = [(u + v - 2 * float(value)) / h for u, v, h in zip(up, down, steps, strict=True)]
        # where the value has a kink, as absolute values and ranks have, one of the first two is near the change of
        # slope; both are 0 elsewhere
        kink = abs(2 * bends[0] - bends[1]) + abs(2 * bends[1] - bends[2]) + abs(expected - farther)
        size = abs(float(value)) + 0.1 * scale_of(student, teacher, temperature=temperature)
        tol = 4 * rounding(value.dtype, size) / temperature + kink + FORMULA * float(gradient.norm())
        found = float((gradient * direction).sum())
        check_close(
            torch.tensor(found),
            torch.tensor(expected),
            f"the gradient is not the slope of the value at T = {temperature:g}",
            tol=tol,
            relative=SLOPE,
            student=student,
            teacher=teacher,
            direction=direction,
        )


def _uneven_direction(x: torch.Tensor) -> torch.Tensor:
    """A direction of length 1; (1, 0, ...) in place of 0."""
    x = x.clone()
    if not bool(x.any()):
        x.view(-1)[0] = 1.0
    return x / x.norm()
