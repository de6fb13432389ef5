"""Classes that are masked by a constant are masked; enormous logits and masks of one side give numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempering.methods import DIST, DKD, DTKD, KD, LSKD, RLD, Method
from tempering.rows import Rows, total
from tempering.temperature import Sharpness, Standardized
from tempering.temperature.base import mask_constants
from tempering.temperature.sharpness import solve_delta
from tests.cases import each

SMALLEST = torch.finfo(torch.float32).min
CONSTANTS = [SMALLEST, -1e30, -1e20, -1e9, -65504.0, -1e4]


def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of student and teacher, with the classes that are masked and labels that are not."""
    masked = torch.zeros(16, 12, dtype=torch.bool)
    masked[:, 8:] = True
    masked[3, :6] = True
    return 2.0 * torch.randn(16, 12), 5.0 * torch.randn(16, 12), masked, torch.full((16,), 7)


METHODS = {
    "exact": lambda: DTKD(),
    "std": lambda: DTKD(temperature=Sharpness(4.0, solve="std")),
    "max": lambda: DTKD(temperature=Sharpness(4.0, solve="max")),
    "published, attached": lambda: DTKD(temperature=Sharpness(4.0, solve="published", differentiable=True)),
    "another method": lambda: DKD(temperature=Sharpness(2.0)),
    "standardized": lambda: KD(temperature=Standardized()),
    "standardized logits": lambda: LSKD(),
}


@each("side", ["student", "teacher"])
@each("solve", ["exact", "std", "max"])
def test_constants_mask_beside_a_row_of_nan(solve: str, side: str) -> None:
    """NaN in a row that is left out does not hide the masks of the others."""
    v, u, masked, y = logits()
    (v if side == "student" else u)[0] = torch.nan
    weight = torch.ones(16).index_fill(0, torch.tensor([0]), 0.0)
    policy = Sharpness(4.0, solve=solve)  # pyright: ignore
    want, got = (
        policy(Rows(v.masked_fill(masked, mask), u.masked_fill(masked, mask), y, weight), 1.0)
        for mask in (-torch.inf, -1e9)
    )
    assert torch.equal(got.student[1:], want.student[1:]) and torch.equal(got.teacher[1:], want.teacher[1:])


@each("name", list(METHODS))
@pytest.mark.parametrize("additive", [False, True])
def test_constants_mask_as_minus_infinity_does(name: str, additive: bool) -> None:
    student, teacher, masked, label = logits()
    losses, gradients = [], []
    for constant in (-torch.inf, *CONSTANTS):
        z = student.clone().requires_grad_()
        sides = [torch.where(masked, side + constant if additive else constant, side) for side in (z, teacher)]
        rows = Rows(sides[0], sides[1], label)
        loss = total(METHODS[name]()(rows), rows)
        (gradient,) = torch.autograd.grad(loss, z)
        losses.append(loss.detach())
        gradients.append(gradient.masked_fill(masked, 0.0))
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-7)


@each("scale", [1.0, 1e2, 1e3, 1e4, 1e30])
def test_the_logits_of_a_model_keep_their_bits(scale: float) -> None:
    z = scale * torch.randn(200, 20)
    assert torch.equal(mask_constants(z), z) and torch.equal(mask_constants(z - 2e4), z - 2e4)
    assert torch.equal(mask_constants(torch.full((2, 3), -1e9)), torch.full((2, 3), -1e9)), "a row has to have others"


@each("solve", ["exact", "std", "max"])
def test_enormous_logits_have_the_temperatures_of_their_shape(solve: str) -> None:
    """Temperatures of "std" and "max" do not depend on a common scale; "exact" tends to "max" as the logits grow."""
    u, v = torch.randn(50, 10), torch.randn(50, 10)
    reference = solve_delta(u, v, tau=4.0, solve="max" if solve == "exact" else solve, reach=0.9).delta  # pyright: ignore
    for scale in (1e20, 1e30):
        got = solve_delta(scale * u, scale * v, tau=4.0, solve=solve, reach=0.9).delta  # pyright: ignore
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)
        rows = Rows(scale * v, scale * u, torch.zeros(50, dtype=torch.long))
        assert all(term.isfinite().all() for term in DTKD(temperature=Sharpness(solve=solve))(rows).values())  # pyright: ignore


@each("make", [RLD, DTKD, KD, DKD, DIST, LSKD], ids=lambda m: m.__name__)
def test_classes_that_the_teacher_alone_masks_give_a_finite_loss(make: type[Method]) -> None:
    student, teacher, masked, label = logits()
    masked[3, :7] = True
    teacher[0, 7] = -50.0  # the label is last of the teacher's classes: none is below it
    for constant in (-torch.inf, SMALLEST, -1e4):
        z = student.clone().requires_grad_()
        rows = Rows(z, teacher.masked_fill(masked, constant), label)
        loss = total(make()(rows), rows)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and gradient.isfinite().all()
