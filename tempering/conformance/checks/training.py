"""The invariant of training: a student that minimizes the loss alone becomes the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from tempering.conformance.checks.base import ROWS, check_close, invariant, is_divergence
from tempering.conformance.draws import Draw
from tempering.conformance.probe import Probe, top_k_of
from tempering.conformance.tolerances import TRAINED

STATIONARY = "stationary at agreement"
STEPS, ROUNDS = 40, 9
LISTED = 3  # of 5 classes


def _trained(probe: Probe, student: Tensor, teacher: Tensor) -> Tensor:
    """Minimize by Adam, which is written out because importing torch.optim takes longer than all invariants."""
    leaf, first, second = student.clone(), torch.zeros_like(student), torch.zeros_like(student)
    for step in range(1, STEPS + 1):
        if probe.kind == "top_k":
            gradient = probe.differentiate(lambda x: probe.call_top_k(x, teacher, LISTED), leaf)[1]
        else:
            gradient = probe.gradient(leaf, teacher)[1]
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
        direction = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        leaf = leaf - 0.15 * (1 - (step - 1) / STEPS) * direction
    return leaf


def _compared(probe: Probe, logits: Tensor, teacher: Tensor) -> Tensor:
    """The probabilities that the loss determines: the classes that are not on a list are free among themselves."""
    p = torch.softmax(logits, -1)
    if probe.kind == "top_k":
        p = p.gather(1, top_k_of(teacher, LISTED)[1])
        p = p / p.sum(1, keepdim=True) if probe.promises.tail == "renormalized" else p
    return p


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
    wanted = _compared(probe, teacher, teacher)
    for name, begin in (("agreement", teacher), ("random logits", start)):
        end = begin
        for _ in range(1 if probe.promises.identifies_teacher is False else ROUNDS):
            end = _trained(probe, end, teacher)
            found = _compared(probe, end, teacher)
            if bool(((found - wanted).abs() <= TRAINED).all()):
                break
        check_close(
            _compared(probe, end, teacher),
            wanted,
            f"from {name}, the student ends elsewhere",
            tol=TRAINED,
            student=begin,
            teacher=teacher,
            end=end,
        )
