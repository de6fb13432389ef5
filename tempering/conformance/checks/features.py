"""Invariants of losses on features and on candidates' scores."""

from __future__ import annotations

import torch

from tempering.conformance.checks.base import check_close, check_finite_or_refused, invariant
from tempering.conformance.draws import Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.tolerances import FORMULA, rounding


@invariant(
    "definition of both sides",
    ("features", "scores"),
    after=("runs",),
    promised=lambda p: p.definition is not None,
    applies=lambda p: callable(p.definition),
)
def definition_of_both_sides(probe: Probe, draw: Draw) -> None:
    """The value of features or scores is the declared definition's, up to a constant factor."""
    function = probe.promises.definition
    assert callable(function)
    pairs = [draw.pair(n=3, c=3) for _ in range(2)]
    want = [float(function(*pair)) for pair in pairs]
    got = [float(probe(*pair)) for pair in pairs]
    # two batches of one size: the factor drops out
    tol = rounding(pairs[0][0].dtype, 4.0) * (sum(map(abs, want)) + sum(map(abs, got)) + 1.0)
    if not abs(got[0] * want[1] - got[1] * want[0]) <= tol + FORMULA * abs(got[0] * want[1]):
        tensors = dict(zip(("student", "teacher", "student_2", "teacher_2"), (*pairs[0], *pairs[1]), strict=True))
        raise Violation("the value is not the definition's", expected=want, found=got, **tensors)


@invariant("one sample", ("features",), after=("runs",), examples=5)
def one_sample(probe: Probe, draw: Draw) -> None:
    """A batch of one sample gives a finite loss and gradient, or is refused."""
    check_finite_or_refused(probe, *draw.pair(n=1))


@invariant("no sample", ("features",), after=("runs",), promised=lambda p: None, examples=2)
def no_sample(probe: Probe, draw: Draw) -> None:
    """A batch without a sample gives a finite loss, or is refused."""
    shape = (0, *probe.promises.feature_shape)
    check_finite_or_refused(probe, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))


@invariant("constant features", ("features",), after=("runs",), examples=5)
def constant_features(probe: Probe, draw: Draw) -> None:
    """Features that are all zero give a finite loss and gradient, on either side."""
    student, teacher = draw.pair(2)
    for s, t in (
        (torch.zeros_like(student), teacher),
        (student, torch.zeros_like(teacher)),
        (student * 0, teacher * 0),
    ):
        check_finite_or_refused(probe, s, t)


@invariant("one candidate", ("scores",), after=("runs",), examples=5)
def one_candidate(probe: Probe, draw: Draw) -> None:
    """A list of one candidate gives a finite loss and gradient, or is refused."""
    student, teacher = (draw.array(2, 1) for _ in "st")
    check_finite_or_refused(probe, student, teacher)


@invariant("ties", ("scores",), after=("runs",), examples=5)
def ties(probe: Probe, draw: Draw) -> None:
    """Equal scores give a finite loss and gradient, and candidates that are equal on both sides get equal gradients."""
    student, teacher = draw.pair(n=1, c=4)
    student[:, 1], teacher[:, 1] = student[:, 2], teacher[:, 2]  # the first and last may have a role
    check_finite_or_refused(probe, student, teacher)
    gradient = probe.gradient(student, teacher)[1]
    check_close(
        gradient[:, 1],
        gradient[:, 2],
        "equal candidates get different gradients",
        tol=rounding(student.dtype, 1.0),
        student=student,
        teacher=teacher,
    )
    flat = torch.zeros_like(student)
    check_finite_or_refused(probe, flat, teacher)
    check_finite_or_refused(probe, student, flat)


@invariant("scale", ("features",), after=("runs",), promised=lambda p: p.scale_power is not None, examples=6)
def scale(probe: Probe, draw: Draw) -> None:
    """Both sides multiplied by c have the loss times a documented power of c: 2 for a squared error, 0 for a cosine."""
    student, teacher = draw.pair(2)
    c, power = draw.one_of((2.0, 8.0)), probe.promises.scale_power
    if power is None:
        raise NotApplicable("no power of the scale is declared")
    check_close(
        probe(student * c, teacher * c),
        probe(student, teacher) * c**power,
        f"both sides multiplied by {c:g} do not have the loss times {c:g}^{power:g}",
        tol=rounding(student.dtype, 4.0) * c**power,
        relative=FORMULA,
        student=student,
        teacher=teacher,
    )


@invariant("features of 1,000 and 0.001", ("features",), after=("runs", "constant features"), examples=5)
def sizes_of_features(probe: Probe, draw: Draw) -> None:
    """Loss and gradient are finite for large and small float32 features."""
    student, teacher = draw.pair(2)
    for size in (1e3, 1e-3):
        check_finite_or_refused(probe, (student * size).float(), (teacher * size).float())


@invariant("masked features", ("features",), after=("runs",), promised=lambda p: p.ignored_rows)
def masked_features(probe: Probe, draw: Draw) -> None:
    """The contents of masked positions change nothing, and they get no gradient."""
    student, teacher = draw.pair(2)
    mask = _mask(probe, draw, student.shape[:-1])
    tensors = {"student": student, "teacher": teacher, "mask": mask}
    hidden = ~mask.unsqueeze(-1)
    sides = [torch.where(hidden, draw.array(*x.shape) + x, x) for x in (student, teacher)]
    want, got = (probe.gradient(s, t, mask) for s, t in ((student, teacher), sides))
    check_close(got[0], want[0], "the contents of masked positions change the loss", tensors=tensors)
    check_close(want[1][~mask], torch.zeros(()), "masked positions get a gradient", tol=0.0, tensors=tensors)


@invariant("padded features", ("features",), after=("runs", "masked features"), promised=lambda p: p.ignored_rows)
def padded_features(probe: Probe, draw: Draw) -> None:
    """Masked positions appended to every sample (or masked samples) change nothing: the mean is over the valid ones."""
    student, teacher = draw.pair(2)
    mask = torch.ones(student.shape[:-1], dtype=torch.bool)
    if probe.mask is None:
        raise NotApplicable("the loss has no argument for a mask")
    along = mask.ndim - 1
    more = [*student.shape]
    more[along] = draw.integer(1, 2)
    s, t = (torch.cat((x, draw.array(*more)), along) for x in (student, teacher))
    longer = torch.cat((mask, mask.new_zeros(more[:-1])), along)
    check_close(
        probe(s, t, longer),
        probe(student, teacher, mask),
        "appended masked positions change the loss",
        student=s,
        teacher=t,
        mask=longer,
    )


def _mask(probe: Probe, draw: Draw, shape: torch.Size) -> torch.Tensor:
    """A mask that leaves out at least one position, and keeps the first of every sample (or the first sample)."""
    if probe.mask is None:
        raise NotApplicable("the loss has no argument for a mask")
    mask = draw.array(*shape, low=0, high=1) == 0
    mask[..., 0], mask[..., -1] = True, False
    return mask
