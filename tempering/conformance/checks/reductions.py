"""Invariants of reductions: the mean over valid rows, ignored rows, sequences, micro-batches, chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.conformance.checks.base import check_close, first_line, invariant, plain, sequences, shifted
from tempering.conformance.checks.values import factor_at
from tempering.conformance.definitions import EXPECTATIONS, MEANS_OVER_CLASSES
from tempering.conformance.draws import Draw
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.tolerances import FORMULA, SHARE, rounding
from tempering.rows import IGNORE_INDEX

NO_LABELS = "the loss has no argument for labels or a mask"


def needs_labels(probe: Probe) -> None:
    if not probe.ignores:
        raise NotApplicable(NO_LABELS)


def contributions(
    probe: Probe, student: Tensor, teacher: Tensor, target: Tensor, call: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Return how strongly every valid row counts, (n,): gradient over the definition's; and which rows were usable."""
    temperature = probe.temperatures[0]
    _, found = probe.differentiate(lambda x: call(x, teacher, target, temperature), student)
    leaf = student.detach().clone().flatten(0, -2).requires_grad_()
    flat = teacher.flatten(0, -2)
    (expected,) = torch.autograd.grad(
        probe.reference(leaf, flat, target.flatten().clamp(min=0), temperature).sum(), leaf
    )
    found = found.flatten(0, -2)
    usable = (expected.norm(dim=1) > 0.05) & (target.flatten() != IGNORE_INDEX)
    return (found * expected).sum(1) / expected.square().sum(1).clamp(min=1e-12), usable


@invariant(
    "equal weight", after=("runs", "alignment", "definition", "gradient"), applies=lambda p: not p.batch_dependent
)
def equal_weight(probe: Probe, draw: Draw) -> None:
    """Every row counts the same, however the rows are divided into sequences and chunks."""
    student, teacher, target, call = sequences(probe, draw, ignored=False)
    _equal_weight(probe, student, teacher, target, call)


def _equal_weight(probe: Probe, student: Tensor, teacher: Tensor, target: Tensor, call: Callable[..., Tensor]) -> None:
    weight, usable = contributions(probe, student, teacher, target, call)
    if int(usable.sum()) < 2:
        return
    weight = weight[usable]
    check_close(
        weight / weight.mean(),
        torch.ones_like(weight),
        "rows count differently",
        tol=SHARE,
        student=student,
        teacher=teacher,
        labels=target,
    )


@invariant(
    "equal weight beside ignored rows",
    after=("equal weight", "ignored rows", "padding"),
    applies=lambda p: not p.batch_dependent,
    promised=lambda p: p.ignored_rows,
)
def equal_weight_beside_ignored(probe: Probe, draw: Draw) -> None:
    """Every valid row counts the same where sequences (and chunks) have unequal numbers of them."""
    needs_labels(probe)
    _equal_weight(probe, *sequences(probe, draw, ignored=True))


DIVISORS = {
    "mean": "the number of rows",
    "sum": "1",
    "batch": "the first dimension",
    "elements": "rows times classes",
}
ONE_ROW = 5  # classes


@invariant(
    "reduction",
    after=("equal weight", "definition", "temperature squared"),
    promised=lambda p: p.reduction is not None,
    applies=lambda p: not p.batch_dependent,
    recognizes=True,
)
def reduction(probe: Probe, draw: Draw) -> None:
    """The value is the documented reduction of the rows; undocumented, it is not divided by the number of classes."""
    student, teacher, target, call = sequences(probe, draw, ignored=False)
    t, promises = probe.temperatures[0], probe.promises
    rows = probe.reference(student.flatten(0, -2), teacher.flatten(0, -2), target.flatten(), t)
    n, c, total = len(rows), student.shape[-1], float(rows.sum())
    if abs(total) < 0.02:
        return
    found, factor = float(call(student, teacher, target)), factor_at(probe, t, ONE_ROW)
    divisors = {"mean": n, "none": n, "sum": 1, "batch": len(student), "elements": n * c}

    def holds(name: str, over: float = 1.0) -> bool:
        """Whether the value is this reduction of the definition, or of what a single row of other classes has."""
        unit = (factor or 0.0) * (ONE_ROW if name == "elements" else 1.0)
        units = (unit, *((t**2,) if promises.temperature_squared else (1.0, t, t**2)))
        return any(close(found, u * total * over / divisors[name]) for u in units)

    def close(value: float, wanted: float) -> bool:
        return abs(value - wanted) <= FORMULA * abs(wanted) + rounding(student.dtype, 4.0) * min(1.0, factor or 1.0)

    wanted = promises.reduction or "mean"
    if holds(wanted) or (promises.definition in MEANS_OVER_CLASSES and holds(wanted, c / ONE_ROW)):
        return
    fits = next((name for name in DIVISORS if holds(name)), None)
    by_classes = fits == "elements" and promises.definition in EXPECTATIONS
    said = f"; the sum is divided by {DIVISORS[fits]}" if fits else ""
    if by_classes and promises.reduction is None:
        said += ", which is not documented (in torch, reduction='batchmean' divides by the rows alone)"
    raise Violation(
        f"the value is not the {wanted} over rows{said}",
        expected=total * (t**2 if promises.temperature_squared else 1.0) / divisors[wanted],
        found=found,
        promised=by_classes if promises.reduction is None else None,
        student=student,
        teacher=teacher,
        labels=target,
    )


@invariant("ignored rows", after=("runs", "alignment"), promised=lambda p: p.ignored_rows)
def ignored_rows(probe: Probe, draw: Draw) -> None:
    """The contents of ignored rows change nothing, and they get no gradient."""
    needs_labels(probe)

    def drawn(mask: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        student, teacher = (draw.array(int(mask.sum()), classes) for _ in "st")
        return student, teacher

    _ignored(probe, draw, drawn, "the contents of ignored rows change")


def _ignored(probe: Probe, draw: Draw, contents: Callable[[Tensor, int], tuple[Any, Any]], message: str) -> None:
    """Compare loss and gradient with those of other contents of the ignored rows, which get no gradient."""
    student, teacher, target, call = sequences(probe, draw, ignored=True)
    mask = target == IGNORE_INDEX
    if probe.promises.batch_dependent and int((~mask).sum()) < 2:
        return
    s, t = student.clone(), teacher.clone()
    s[mask], t[mask] = contents(mask, student.shape[-1])
    want = probe.differentiate(lambda x: call(x, teacher, target), student)
    got = probe.differentiate(lambda x: call(x, t, target), s)
    tensors, tol = {"student": s, "teacher": t, "labels": target}, rounding(student.dtype, 1.0)
    check_close(got[0], want[0], f"{message} the loss", tol=tol, tensors=tensors)
    check_close(want[1][mask], torch.zeros(()), "ignored rows get a gradient", tol=0.0, tensors=tensors)
    check_close(got[1], want[1], f"{message} the gradient", tol=tol, tensors=tensors)


@invariant("padding", after=("ignored rows",), promised=lambda p: p.ignored_rows)
def padding(probe: Probe, draw: Draw) -> None:
    """Ignored rows appended to every sequence change nothing: the mean is over the valid rows."""
    student, teacher, target, call = sequences(probe, draw, ignored=False)
    needs_labels(probe)
    if probe.promises.reduction in ("sum", "batch"):
        raise NotApplicable("the loss is not a mean over rows")
    b, length, c = student.shape if student.ndim == 3 else (1, *student.shape)
    more, shift = draw.integer(1, 2), probe.promises.shift if student.ndim == 3 else 0
    s, t, y = student.reshape(b, length, c), teacher.reshape(b, length, c), target.reshape(b, length)
    s, t = (torch.cat((x, draw.array(b, more + shift, c)), 1) for x in (s, t))
    y = torch.cat((y.new_full((b, shift), IGNORE_INDEX), y, y.new_full((b, more), IGNORE_INDEX)), 1)
    if student.ndim == 2:
        s, t, y = s[0], t[0], y[0]
    want, tol = call(student, teacher, target), rounding(student.dtype, 1.0)
    tensors = {"student": s, "teacher": t, "labels": y}
    check_close(probe.call(s, t, y), want, "appended ignored rows change the loss", tol=tol, tensors=tensors)


@invariant(
    "NaN in ignored rows",
    after=("ignored rows", "padding", "equal weight beside ignored rows"),
    promised=lambda p: p.ignored_rows,
)
def nan_in_ignored_rows(probe: Probe, draw: Draw) -> None:
    """Ignored rows may hold NaN and infinity."""
    needs_labels(probe)
    _ignored(probe, draw, lambda mask, classes: (torch.nan, torch.inf), "NaN in an ignored row changes")


@invariant(
    "everything ignored",
    after=("ignored rows", "padding", "equal weight beside ignored rows"),
    promised=lambda p: p.ignored_rows,
    examples=5,
)
def everything_ignored(probe: Probe, draw: Draw) -> None:
    """Where every row is ignored, or all of a sequence, loss and gradient are finite."""
    student, teacher, target, call = sequences(probe, draw, ignored=False)
    needs_labels(probe)
    targets = [torch.full_like(target, IGNORE_INDEX)]
    if target.ndim == 2:
        targets.append(target.clone())
        targets[-1][0] = IGNORE_INDEX
    for y in targets:
        value, gradient = probe.differentiate(lambda x, y=y: call(x, teacher, y), student)
        if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
            raise Violation(
                "nothing to learn gives a loss or gradient that is not finite",
                expected=0.0,
                found=plain(value),
                student=student,
                teacher=teacher,
                labels=y,
            )


@invariant("(B, T, V) as (N, V)", ("logits",), after=("runs", "equal weight"), promised=lambda p: p.sequences)
def batches_of_sequences(probe: Probe, draw: Draw) -> None:
    """Logits of B sequences of T tokens give the value of their N = B T rows."""
    b, length, c = 2, draw.integer(2, 3), draw.integer(2, 5)
    student, teacher = draw.pair(n=b * length, c=c)
    target, shift = draw.labels(b * length, c), probe.promises.shift
    s, t, y = shifted(student.view(b, length, c), teacher.view(b, length, c), target.view(b, length), shift)
    try:
        got = probe.call(s, t, y)
    except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
        raise NotApplicable(f"refused: {first_line(error)}") from None
    check_close(
        got,
        probe(student, teacher, target),
        "(B, T, V) logits give another value than their rows",
        student=s,
        teacher=t,
    )


@invariant("micro-batches", after=("runs", "equal weight"), applies=lambda p: not p.batch_dependent)
def micro_batches(probe: Probe, draw: Draw) -> None:
    """Micro-batches of unequal size, given the whole step's number of rows, add up to the whole."""
    if probe.normalizer is None:
        raise NotApplicable("the loss has no argument for the number of rows of a step")
    student, teacher = draw.pair(3, 5)
    n, c = student.shape
    target, cut = draw.labels(n, c), draw.integer(1, n - 1)
    whole = probe(student, teacher, target, None, {probe.normalizer: n})
    parts = [
        probe(student[p], teacher[p], target[p], None, {probe.normalizer: n}) for p in (slice(0, cut), slice(cut, n))
    ]
    check_close(
        parts[0] + parts[1], whole, "micro-batches do not add up to the whole step", student=student, teacher=teacher
    )


@invariant("chunk size", after=("runs", "equal weight"), applies=lambda p: not p.batch_dependent)
def chunk_size(probe: Probe, draw: Draw) -> None:
    """The size of the chunks in which the loss is computed changes nothing."""
    if probe.chunk_size is None:
        raise NotApplicable("the loss has no argument for chunks")
    n, c = draw.integer(2, 5), draw.integer(2, 5)
    student, teacher = draw.pair(n=n, c=c)
    target = draw.labels(n, c)
    values = [probe(student, teacher, target, None, {probe.chunk_size: size}) for size in (1, 2, n)]
    for value in values:
        check_close(value, values[-1], "the size of the chunks changes the loss", student=student, teacher=teacher)


@invariant(
    "ignored chunks", after=("chunk size", "everything ignored", "ignored rows"), promised=lambda p: p.ignored_rows
)
def ignored_chunks(probe: Probe, draw: Draw) -> None:
    """Chunks in which every row is ignored, such as a long prompt, and partly ignored ones, change nothing."""
    if probe.chunk_size is None or not probe.ignores:
        raise NotApplicable("the loss has no argument for chunks" if probe.ignores else NO_LABELS)
    prompt, n, c = draw.integer(2, 4), draw.integer(2, 4), draw.integer(2, 5)
    student, teacher = draw.pair(n=prompt + n, c=c)
    target = torch.cat((torch.full((prompt,), IGNORE_INDEX), draw.labels(n, c, ignored=True)))
    size = {probe.chunk_size: draw.integer(1, prompt)}
    want = probe.differentiate(lambda x: probe(x, teacher[prompt:], target[prompt:]), student[prompt:])
    got = probe.differentiate(lambda x: probe(x, teacher, target, None, size), student)
    tensors, tol = {"student": student, "teacher": teacher, "labels": target}, rounding(student.dtype, 1.0)
    check_close(got[0], want[0], "a chunk of ignored rows changes the loss", tol=tol, tensors=tensors)
    check_close(got[1][prompt:], want[1], "a chunk of ignored rows changes the gradient", tol=tol, tensors=tensors)


@invariant(
    "packing",
    ("tokens",),
    after=("equal weight beside ignored rows", "ignored rows", "padding", "reduction"),
    promised=lambda p: p.ignored_rows,
    applies=lambda p: not p.batch_dependent and p.reduction != "batch",
)
def packing(probe: Probe, draw: Draw) -> None:
    """Sequences packed into one row of the batch have the loss of the same sequences in a row each."""
    c, shift = draw.integer(2, 5), probe.promises.shift
    first, second = draw.integer(1, 3), draw.integer(1, 3) if probe.ignores else 0
    second = second or first
    if not probe.ignores and shift:
        raise NotApplicable(NO_LABELS)
    parts = [(*draw.pair(n=n, c=c), draw.labels(n, c)) for n in (first, second)]
    rows = [shifted(s[None], t[None], y[None], shift) for s, t, y in parts]
    packed = [torch.cat(sides, 1) for sides in zip(*rows, strict=True)]
    length = max(first, second) + shift
    apart = [
        torch.cat([_to_length(x, length, IGNORE_INDEX if i == 2 else 0) for x in sides])
        for i, sides in enumerate(zip(*rows, strict=True))
    ]
    check_close(
        probe.call(packed[0], packed[1], packed[2]),
        probe.call(apart[0], apart[1], apart[2]),
        "packed sequences have another loss than the same sequences in a row each",
        student=packed[0],
        teacher=packed[1],
        labels=packed[2],
    )


def _to_length(x: Tensor, length: int, value: float) -> Tensor:
    """Pad dimension 1."""
    more = length - x.shape[1]
    return F.pad(x, (0, 0, 0, more) if x.ndim == 3 else (0, more), value=value)


@invariant("compile", ("logits", "tokens", "top_k", "features", "scores"), after=("runs",), examples=1, of_draws=True)
def compiled(probe: Probe, draw: Draw) -> None:
    """torch.compile changes neither the value nor the gradient."""
    if not probe.compile:
        raise NotApplicable("checked with compile=True (--compile)")
    student, teacher = draw.pair(3, c=5)
    fast = copy.copy(probe)
    fast.loss = torch.compile(probe.loss, backend=backend_of(probe), dynamic=False)
    want = probe.gradient(student, teacher)
    try:
        got = fast.gradient(student, teacher)
    except Exception as error:
        raise NotApplicable(f"refused: {type(error).__name__}: {first_line(error)}") from None
    for found, expected in zip(got, want, strict=True):
        check_close(
            found, expected, "torch.compile changes the value or the gradient", student=student, teacher=teacher
        )


def backend_of(probe: Probe) -> str:
    return probe.compile if isinstance(probe.compile, str) else "inductor"
