"""Invariants of losses on the teacher's top-k list, on features and on scores, and of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.conformance.draws import Draw
from tempering.conformance.invariants.base import (
    ROWS,
    check_close,
    check_finite_or_refused,
    invariant,
    is_divergence,
    plain,
)
from tempering.conformance.probe import Probe, Violation, tolerance, top_k_of
from tempering.conformance.promises import kl
from tempering.rows import IGNORE_INDEX

STATIONARY = "stationary at agreement"


def _top_k_reference(student: Tensor, teacher: Tensor, k: int, tail: str | None) -> Tensor:
    _, indices = top_k_of(teacher, k)
    p, q = (torch.log_softmax(x, -1) for x in (teacher, student))
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, indices, True)
    if tail == "truncated":
        return torch.where(inside, p.exp() * (p - q), 0.0).sum(-1)
    masked = [torch.where(inside, x, -torch.inf) for x in (student, teacher)]
    if tail == "renormalized":
        return kl(masked[0], masked[1], 1.0)
    rest = [torch.where(inside, -torch.inf, x).logsumexp(-1, keepdim=True) for x in (student, teacher)]
    listed = [x.gather(-1, indices) for x in (student, teacher)]
    return kl(torch.cat((listed[0], rest[0]), -1), torch.cat((listed[1], rest[1]), -1), 1.0)


TAILS = ("truncated", "renormalized", "bucket")


def call_top_k(probe: Probe, student: Tensor, teacher: Tensor, k: int, target: Tensor) -> Tensor:
    values, indices = top_k_of(teacher, k, probe.promises.top_k_values)
    kw: dict[str, Any] = {}
    if probe.labels:
        kw[probe.labels] = target
    if probe.mask:
        kw[probe.mask] = target != IGNORE_INDEX
    if probe.temperature:
        kw[probe.temperature] = 1.0
    return probe._scalar(probe.loss(student, values, indices, **kw), len(student))


@invariant(
    "tail",
    ("top_k",),
    after=("runs", "definition"),
    promised=lambda p: p.tail is not None,
    applies=lambda p: not p.sampled,
)
def tail(probe: Probe, draw: Draw) -> None:
    """The teacher's mass outside its list is treated as documented."""
    c = draw.integer(4, 6)
    student, teacher = draw.pair(n=1, c=c)
    k = draw.integer(2, c - 2)
    target = torch.zeros(1, dtype=torch.long)
    found = float(call_top_k(probe, student, teacher, k, target))
    values = {name: float(_top_k_reference(student, teacher, k, name)) for name in TAILS}
    expected = values[probe.promises.tail or "bucket"]
    if not abs(found - expected) <= 1e-3 * abs(expected) + tolerance(student.float(), 4.0):
        same = [name for name, value in values.items() if abs(found - value) <= 1e-3 * abs(value) + 1e-5]
        said = f"; it is {same[0]}" if len(same) == 1 else ""
        raise Violation(
            f"the mass outside the list is not treated as documented{said}",
            expected=expected,
            found=found,
            student=student,
            teacher=teacher,
        )


@invariant(
    "zero at agreement on a list",
    ("top_k",),
    after=("runs", "zero at agreement", "tail"),
    promised=is_divergence,
    applies=lambda p: not p.sampled,
)
def zero_on_a_list(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has loss 0 on a part of the classes."""
    _, teacher = draw.pair(n=1, c=6)
    found = float(call_top_k(probe, teacher.clone(), teacher, draw.integer(1, 5), torch.zeros(1, dtype=torch.long)))
    if not abs(found) <= tolerance(teacher.float(), 4.0):
        raise Violation("a student equal to the teacher has a loss", expected=0.0, found=found, teacher=teacher)


@invariant(
    "stationary at agreement on a list",
    ("top_k",),
    after=("runs", "stationary at agreement", "tail"),
    promised=is_divergence,
    applies=lambda p: not p.sampled,
)
def stationary_on_a_list(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has no gradient on a part of the classes."""
    _, teacher = draw.pair(n=1, c=6)
    k = draw.integer(1, 5)
    _, gradient = probe.differentiate(
        lambda x: call_top_k(probe, x, teacher, k, torch.zeros(1, dtype=torch.long)), teacher
    )
    if not bool((gradient.abs() <= 1e-4).all()):
        raise Violation(
            f"a student equal to the teacher is moved away from it by a list of {k} of 6 classes",
            expected=0.0,
            found=plain(gradient.abs().max()),
            teacher=teacher,
            gradient=gradient,
        )


@invariant("order of the list", ("top_k",), after=("runs",), examples=8)
def order_of_the_list(probe: Probe, draw: Draw) -> None:
    """The order of the entries in the teacher's list changes nothing."""
    student, teacher = draw.pair(n=2, c=5)
    values, indices = top_k_of(teacher, 3, probe.promises.top_k_values)
    order = draw.permutation(3)
    kw: dict[str, Any] = {probe.labels: torch.zeros(2, dtype=torch.long)} if probe.labels else {}
    want, got = (
        probe._scalar(probe.loss(student, v, i, **kw), 2)
        for v, i in ((values, indices), (values[:, order], indices[:, order]))
    )
    check_close(
        got,
        want,
        "the order of the list changes the loss",
        tol=tolerance(student.float(), 4.0),
        student=student,
        teacher=teacher,
    )


@invariant("unbiased", ("top_k",), after=("runs",), applies=lambda p: p.sampled)
def unbiased(probe: Probe, draw: Draw) -> None:
    """The mean over all draws of a class from the teacher is the gradient of the whole distribution."""
    student, teacher = draw.pair(n=1, c=draw.integer(2, 5))
    p = torch.softmax(teacher, -1)[0]
    values, _ = top_k_of(teacher, teacher.shape[1], probe.promises.top_k_values)
    logp = torch.log_softmax(teacher, -1)
    per_class = {"log_probs": logp, "probs": logp.exp(), "logits": teacher}[probe.promises.top_k_values]
    del values
    total = torch.zeros_like(student)
    for j in range(student.shape[1]):
        index = torch.tensor([[j]])
        _, g = probe.differentiate(
            lambda x, i=index: probe._scalar(probe.loss(x, per_class.gather(1, i), i), 1), student
        )
        total += p[j] * g
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(probe.reference(leaf, teacher, None, 1.0).sum(), leaf)
    check_close(
        total, want, "the estimate is biased", tol=tolerance(student.float(), 4.0), student=student, teacher=teacher
    )


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
    student[:, 1], teacher[:, 1] = student[:, 0], teacher[:, 0]
    check_finite_or_refused(probe, student, teacher)
    gradient = probe.gradient(student, teacher)[1]
    check_close(
        gradient[:, 1],
        gradient[:, 0],
        "equal candidates get different gradients",
        tol=1e-5,
        student=student,
        teacher=teacher,
    )
    flat = torch.zeros_like(student)
    check_finite_or_refused(probe, flat, teacher)
    check_finite_or_refused(probe, student, flat)


def _trained(probe: Probe, student: Tensor, teacher: Tensor) -> Tensor:
    leaf = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.1)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 150)
        optimizer.zero_grad()
        value = (
            call_top_k(probe, leaf, teacher, 3, torch.zeros(len(leaf), dtype=torch.long))
            if probe.kind == "top_k" and not probe.promises.sampled
            else probe(leaf, teacher)
        )
        value.backward()
        optimizer.step()
    return leaf.detach()


@invariant(
    "training ends at the teacher",
    ROWS,
    after=("runs", "alignment", "definition", "zero at agreement", "tail", STATIONARY, f"{STATIONARY} on a list"),
    promised=lambda p: is_divergence(p) and p.identifies_teacher is not False,
    applies=lambda p: not p.sampled,
    examples=1,
)
def training(probe: Probe, draw: Draw) -> None:
    """Minimized alone, from random logits and from agreement, the student ends at the teacher's probabilities."""
    generator = torch.Generator().manual_seed(0)
    teacher, start = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in "st")
    for name, begin in (("agreement", teacher), ("random logits", start)):
        end = _trained(probe, begin, teacher)
        p, q = (torch.softmax(x, -1) for x in (teacher, end))
        if probe.kind == "top_k":  # the classes that are not on the list are free among themselves
            indices = top_k_of(teacher, 3)[1]
            p, q = p.gather(1, indices), q.gather(1, indices)
            if probe.promises.tail == "renormalized":
                p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        check_close(q, p, f"from {name}, the student ends elsewhere", tol=0.02, student=begin, teacher=teacher, end=end)
