"""Invariants of losses on the teacher's top-k list."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tempering.conformance.checks.base import (
    check_close,
    invariant,
    is_divergence,
    plain,
)
from tempering.conformance.checks.values import factor_at
from tempering.conformance.definitions import kl
from tempering.conformance.draws import Draw
from tempering.conformance.probe import Probe, Violation, top_k_of
from tempering.conformance.tolerances import FORMULA, RELATIVE, rounding


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


@invariant(
    "tail",
    ("top_k",),
    after=("runs", "definition"),
    promised=lambda p: p.tail is not None,
    applies=lambda p: not p.sampled and p.definition in (None, "kl"),
)
def tail(probe: Probe, draw: Draw) -> None:
    """The teacher's mass outside its list is treated as documented."""
    c = draw.integer(4, 6)
    student, teacher = draw.pair(n=1, c=c)
    k = draw.integer(2, c - 2)
    found = float(probe.call_top_k(student, teacher, k))
    factor = factor_at(probe, probe.temperatures[0], c) or 1.0  # of the whole list, which has no tail
    values = {name: factor * float(_top_k_reference(student, teacher, k, name)) for name in TAILS}
    expected = values[probe.promises.tail or "bucket"]
    if not abs(found - expected) <= FORMULA * abs(expected) + rounding(student.dtype, 4.0):
        same = [
            name
            for name, value in values.items()
            if abs(found - value) <= FORMULA * abs(value) + rounding(student.dtype)
        ]
        said = f"; it is {same[0]}" if len(same) == 1 else ""
        raise Violation(
            f"the mass outside the list is not treated as documented{said}",
            expected=expected,
            found=found,
            student=student,
            teacher=teacher,
        )


@invariant(
    "zero at agreement on a list", ("top_k",), after=("runs", "zero at agreement", "tail"), promised=is_divergence
)
def zero_on_a_list(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has loss 0 on a part of the classes."""
    _, teacher = draw.pair(n=1, c=6)
    found = float(probe.call_top_k(teacher.clone(), teacher, draw.integer(1, 5)))
    if not abs(found) <= rounding(teacher.dtype, 4.0):
        raise Violation("a student equal to the teacher has a loss", expected=0.0, found=found, teacher=teacher)


@invariant(
    "stationary at agreement on a list",
    ("top_k",),
    after=("runs", "stationary at agreement", "tail"),
    promised=is_divergence,
)
def stationary_on_a_list(probe: Probe, draw: Draw) -> None:
    """A student equal to the teacher has no gradient on a part of the classes."""
    _, teacher = draw.pair(n=1, c=6)
    k = draw.integer(1, 5)
    _, gradient = probe.differentiate(lambda x: probe.call_top_k(x, teacher, k), teacher)
    if not bool((gradient.abs() <= RELATIVE).all()):
        raise Violation(
            f"a student equal to the teacher is moved away from it by a list of {k} of 6 classes",
            expected=0.0,
            found=plain(gradient.abs().max()),
            teacher=teacher,
            gradient=gradient,
        )


@invariant("order of the list", ("top_k",), after=("runs",), examples=8, of_draws=True)
def order_of_the_list(probe: Probe, draw: Draw) -> None:
    """The order of the entries in the teacher's list changes nothing."""
    student, teacher = draw.pair(n=2, c=5)
    order = draw.permutation(3)
    want, got = (probe.call_top_k(student, teacher, 3, order=o) for o in (None, order))
    check_close(got, want, "the order of the list changes the loss", student=student, teacher=teacher)


@invariant("unbiased", ("top_k",), after=("runs",), applies=lambda p: p.sampled, of_draws=True)
def unbiased(probe: Probe, draw: Draw) -> None:
    """The mean over all draws of one or two classes from the teacher is the gradient of the whole distribution."""
    student, teacher = draw.pair(n=1, c=draw.integer(2, 4))
    k, c = draw.integer(1, 2), student.shape[1]
    log_probs = torch.log_softmax(teacher, -1)
    values = {"log_probs": log_probs, "probs": log_probs.exp(), "logits": teacher}[probe.promises.top_k_values]
    mean = torch.zeros_like(student)
    for classes in itertools.product(range(c), repeat=k):
        drawn = torch.tensor([classes])
        gradient = probe.differentiate(lambda x, i=drawn: probe.call_sides((x, values.gather(1, i), i)), student)[1]
        mean += log_probs[0, list(classes)].sum().exp() * gradient
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(probe.reference(leaf, teacher, None, 1.0).sum(), leaf)
    check_close(mean, want, "the estimate is biased", student=student, teacher=teacher)
