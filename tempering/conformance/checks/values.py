"""Invariants of the value: definition, temperature, agreement, symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from tempering.conformance.checks.base import ALL, check_close, invariant, is_divergence, plain, scale_of
from tempering.conformance.definitions import DEFINITIONS, MISTAKES
from tempering.conformance.draws import STEP, Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.promises import Definition
from tempering.conformance.tolerances import FORMULA, RELATIVE, SHARE, rounding


@invariant(
    "definition",
    after=("runs", "alignment", "order of the list"),
    promised=lambda p: p.definition is not None,
    recognizes=True,
)
def definition(probe: Probe, draw: Draw) -> None:
    """The value of a single row is the definition's, up to a constant factor; where none fits, no known mistake's."""
    c = draw.integer(2, 6)
    temperature = probe.temperatures[0]
    one, two = draw.pair(n=2, c=c)
    target = draw.labels(2, c)
    rows = [(one[i : i + 1], two[i : i + 1], target[i : i + 1]) for i in range(2)]
    if probe.promises.definition is None and (said := mistake(probe, MISTAKES)):
        raise Violation(f"no definition is declared{said}", promised=True, student=one, teacher=two, labels=target)
    want = [float(probe.reference(s, t, y, temperature)) for s, t, y in rows]
    got = [float(probe(s, t, y, temperature)) for s, t, y in rows]
    # two rows: the factor drops out
    tol = 4 * rounding(one.dtype, 3.0) * (sum(map(abs, want)) + sum(map(abs, got)) + 0.1)
    if not abs(got[0] * want[1] - got[1] * want[0]) <= tol + RELATIVE * abs(got[0] * want[1]) or _opposite(
        got, want, tol
    ):
        raise Violation(
            f"the value is not the definition's{mistake(probe, KNOWN)}",
            expected=want,
            found=got,
            student=one,
            teacher=two,
            labels=target,
        )


def _opposite(got: list[float], want: list[float], tol: float) -> bool:
    return any(abs(w) > 100 * tol and g * w <= 0 for g, w in zip(got, want, strict=True))


@cache
def _single_rows() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Six rows of five classes: student, teacher, label."""
    generator = torch.Generator().manual_seed(0)

    def logits() -> Tensor:
        return torch.randint(-8, 9, (1, 5), generator=generator).double() * STEP

    return [(logits(), logits(), torch.randint(5, (1,), generator=generator)) for _ in range(6)]


def fits(probe: Probe, function: Callable[..., Tensor], temperature: float) -> float | None:
    """Return the factor of a definition which the loss computes for single rows of five classes, or None."""
    factors: list[float] = []
    for number, (student, teacher, target) in enumerate(_single_rows()):
        want = float(function(student, teacher, temperature))
        key = (number, temperature if probe.temperature else None)
        if key not in probe.values_of_rows:
            probe.values_of_rows[key] = float(probe(student, teacher, target, temperature))
        got = probe.values_of_rows[key]
        if want == 0.0 or not math.isfinite(got):
            return None
        factors.append(got / want)
        if abs(factors[-1] - factors[0]) > 3 * FORMULA * abs(factors[0]):  # too far apart for any mean
            return None
    mean = sum(factors) / len(factors)
    return mean if mean > 0 and all(abs(f - mean) <= FORMULA * mean for f in factors) else None


KNOWN = {**{f"the definition {name}": function for name, function in DEFINITIONS.items()}, **MISTAKES}


def mistake(probe: Probe, known: Mapping[str, Definition]) -> str:
    """Name the known mistake, or other definition, that the values of a loss agree with."""
    for name, function in known.items():
        if fits(probe, function, probe.temperatures[0]) is not None:
            return f"; it agrees with {name}"
    return ""


@invariant("temperature", after=("definition", "confident rows"), promised=lambda p: p.definition is not None)
def temperature_dependence(probe: Probe, draw: Draw) -> None:
    """The value depends on T as the definition does, up to a factor of T, at T = 0.05 to 100."""
    if probe.temperature is None:
        raise NotApplicable("the loss has no argument for the temperature")
    c = draw.integer(2, 6)
    one, two = draw.pair(n=2, c=c)
    target = draw.labels(2, c)
    rows = [(one[i : i + 1], two[i : i + 1], target[i : i + 1]) for i in range(2)]
    for t in probe.temperatures:
        want = [float(probe.reference(*row, t)) for row in rows]
        got = [float(probe(*row, t)) for row in rows]
        unit = max(t**2, 1.0)
        tol = (
            2
            * rounding(one.dtype, 3.0 + float(one.abs().max()) / t)
            * (sum(map(abs, want)) * unit + sum(map(abs, got)))
        )
        if not abs(got[0] * want[1] - got[1] * want[0]) <= tol + RELATIVE * abs(got[0] * want[1]):
            raise Violation(
                f"at T = {t:g} the value is not the definition's",
                expected=want,
                found=got,
                student=one,
                teacher=two,
                labels=target,
            )


def factor_at(probe: Probe, temperature: float, classes: int) -> float | None:
    """Return the loss over the definition for a single row of this number of classes at this T."""
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randint(-8, 9, (1, classes), generator=generator).double() * STEP for _ in "st")
    y = torch.zeros(1, dtype=torch.long)
    want = float(probe.reference(s, t, y, temperature))
    return float(probe(s, t, y, temperature)) / want if want else None


@invariant(
    "temperature squared",
    after=("definition", "temperature"),
    promised=lambda p: p.temperature_squared is not None,
    examples=5,
)
def temperature_squared(probe: Probe, draw: Draw) -> None:
    """The value has the factor T^2 if and only if that is documented."""
    squared = probe.promises.temperature_squared
    if probe.temperature is None and probe.promises.temperature == 1.0:
        raise NotApplicable("the loss has no temperature but 1")
    student, teacher = draw.pair(n=1)
    base = factor_at(probe, 1.0, student.shape[1]) if probe.temperature else 1.0
    for t in (2.0, 4.0) if probe.temperature else (probe.promises.temperature,):
        reference = probe.reference(student, teacher, None, t)
        if base is None or not bool(reference.abs() > 1e-3):
            continue
        found = float(probe(student, teacher, None, t)) / float(reference) / base
        for power in (0, 1, 2):
            if abs(found - t**power) < SHARE * t**power:
                break
        else:
            power = None
        if power != (2 if squared else 0) and (squared is not None or power is None):
            raise Violation(
                f"at T = {t:g} the value is the definition times {found:.4g}",
                expected=t**2 if squared else 1.0,
                found=found,
                student=student,
                teacher=teacher,
            )
        if squared is None and power != 2:
            raise Violation(f"no factor T^2 at T = {t:g}", expected=t**2, found=found, student=student, teacher=teacher)


@invariant("gradient", after=("slope", "definition", "temperature"), promised=lambda p: p.definition is not None)
def gradient_of_definition(probe: Probe, draw: Draw) -> None:
    """The gradient of a single row is the definition's, up to a constant factor, at every T."""
    student, teacher = draw.pair(n=1)
    target = draw.labels(1, student.shape[1])
    for t in probe.temperatures:
        found = probe.gradient(student, teacher, target, t)[1]
        leaf = student.clone().requires_grad_()
        (expected,) = torch.autograd.grad(probe.reference(leaf, teacher, target, t).sum(), leaf)
        norms = float(found.norm()), float(expected.norm())
        if min(norms) < 1e-5 / t:  # too small to have a direction in float32
            continue
        check_close(
            found / norms[0],
            expected / norms[1],
            f"at T = {t:g} the gradient has another direction",
            tol=rounding(student.dtype, scale_of(student, teacher) / t) / min(norms) / t + RELATIVE,
            student=student,
            teacher=teacher,
            labels=target,
        )


@invariant(
    "zero at agreement",
    ALL,
    after=("runs", "alignment", "definition", "definition of both sides", "temperature"),
    promised=is_divergence,
)
def zero_at_agreement(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has loss 0."""
    _, teacher = draw.pair()
    if probe.promises.divergence is False and probe.promises.definition is None:
        raise NotApplicable("the loss is no divergence")
    for t in probe.temperatures:
        value, gradient = probe.gradient(teacher.clone(), teacher, None, t)
        tol = rounding(torch.float32, scale_of(teacher, temperature=t))
        defined = probe.on_rows and probe.promises.definition is not None
        if defined and bool((probe.reference(teacher, teacher, None, t).abs() > tol).any()):
            continue  # as the cosine of rows of zeros
        if not abs(float(value)) <= tol:
            # an entropy of the teacher may be left in, as cross entropies do, if no definition is declared
            constant = probe.promises.definition is None and bool((gradient.abs() <= tol).all())
            raise Violation(
                f"a student equal to the teacher has loss {float(value):.4g} at T = {t:g}",
                expected=0.0,
                found=float(value),
                promised=False if constant else None,
                teacher=teacher,
            )


@invariant(
    "stationary at agreement",
    ALL,
    after=("runs", "alignment", "definition", "temperature", "zero at agreement"),
    promised=is_divergence,
)
def stationary_at_agreement(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has no gradient."""
    student, teacher = draw.pair()
    for t in probe.temperatures:
        gradient = probe.gradient(teacher.clone(), teacher, None, t)[1]
        elsewhere = float(probe.gradient(student, teacher, None, t)[1].abs().max())
        elsewhere = elsewhere if math.isfinite(elsewhere) else 0.0
        tol = FORMULA * elsewhere + rounding(gradient.dtype, max(1.0, t))
        if not bool((gradient.abs() <= tol).all()):
            raise Violation(
                f"a student equal to the teacher has a gradient at T = {t:g}",
                expected=0.0,
                found=plain(gradient.abs().max()),
                teacher=teacher,
            )


@invariant(
    "never negative", ALL, after=("runs", "alignment", "definition", "zero at agreement"), promised=is_divergence
)
def never_negative(probe: Probe, draw: Draw) -> None:
    """The loss is at least 0, but for rounding."""
    student, teacher = draw.pair()
    near = teacher + (student - teacher) * draw.one_of((1.0, 1e-2, 1e-4))
    for t in probe.temperatures:
        value = probe(near, teacher, None, t)
        if float(value) < -rounding(torch.float32, scale_of(near, teacher, temperature=t)):
            raise Violation(
                f"the loss is negative at T = {t:g}", expected=0.0, found=float(value), student=near, teacher=teacher
            )


@invariant(
    "constant added to the logits",
    after=("runs", "definition"),
    promised=lambda p: p.definition is not None if p.shift_invariant is None else p.shift_invariant,
)
def constant_added(probe: Probe, draw: Draw) -> None:
    """A constant added to all logits of a row changes nothing, unless the definition depends on it."""
    student, teacher = draw.pair()
    by = draw.array(len(student), 1) * 4
    target = draw.labels(len(student), student.shape[1])
    t = probe.temperatures[0]
    if probe.promises.definition is not None:
        plain_rows = probe.reference(student, teacher, target, t)
        moved = [probe.reference(s, u, target, t) for s, u in ((student + by, teacher), (student, teacher - by))]
        if any(bool(((rows - plain_rows).abs() > 1e-9).any()) for rows in moved):
            raise NotApplicable("the definition depends on it")
    want = probe.gradient(student, teacher, target)
    for s, u in ((student + by, teacher), (student, teacher - by)):
        got = probe.gradient(s, u, target)
        for found, expected in zip(got, want, strict=True):
            check_close(
                found,
                expected,
                "a constant added to the logits of a row changes the loss",
                tol=rounding(student.dtype, 12.0),
                student=s,
                teacher=u,
                labels=target,
            )


@invariant("order of the classes", after=("runs", "definition"), promised=lambda p: p.class_order)
def order_of_classes(probe: Probe, draw: Draw) -> None:
    """A permutation of the classes changes nothing."""
    student, teacher = draw.pair(c=draw.integer(3, 6))
    c = student.shape[1]
    order = draw.permutation(c)
    target = draw.labels(len(student), c)
    moved = torch.argsort(order)[target]
    want, got = probe(student, teacher, target), probe(student[:, order], teacher[:, order], moved)
    check_close(
        got, want, "a permutation of the classes changes the loss", student=student, teacher=teacher, order=order
    )


@invariant(
    "order of the rows",
    ALL,
    after=("runs", "alignment", "zero at agreement", "equal weight", "chunk size"),
    promised=lambda p: p.row_order,
    of_draws=True,
)
def order_of_rows(probe: Probe, draw: Draw) -> None:
    """A permutation of the rows changes nothing."""
    student, teacher = draw.pair(2, 5)
    order = draw.permutation(len(student))
    if probe.on_rows:
        target = draw.labels(len(student), student.shape[1])
        want, got = probe(student, teacher, target), probe(student[order], teacher[order], target[order])
    else:
        want, got = probe(student, teacher), probe(student[order], teacher[order])
    check_close(got, want, "a permutation of the rows changes the loss", student=student, teacher=teacher, order=order)
