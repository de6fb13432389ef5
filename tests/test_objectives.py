"""The divergences a row: their definitions, their limits, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tests.quick_hypothesis  # noqa: F401
from tempering.objectives import (
    adaptive_kl,
    cross_entropy,
    divergence,
    entropy,
    jsd,
    kl,
    log_softmax,
    mixture,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    softened,
    tvd,
)
from tempering.rows import IGNORE_INDEX, Rows
from tempering.temperature import Temperatures
from tests.conftest import random_rows

Objective = Callable[[Rows, Temperatures], Tensor]
DIVERGENCES: dict[str, Objective] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd(0.1)": partial(jsd, beta=0.1),
    "jsd(0)": partial(jsd, beta=0.0),
    "jsd(1)": partial(jsd, beta=1.0),
    "skew_kl": skew_kl,
    "skew_kl(0)": partial(skew_kl, skew=0.0),
    "skew_reverse_kl": skew_reverse_kl,
    "skew_reverse_kl(0.9)": partial(skew_reverse_kl, skew=0.9),
    "adaptive_kl": adaptive_kl,
    "adaptive_kl(0.9)": partial(adaptive_kl, head=0.9),
    "tvd": tvd,
}


@pytest.fixture(params=DIVERGENCES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return DIVERGENCES[request.param]


def temperatures(n: int = 6, dtype: torch.dtype = torch.float64) -> Temperatures:
    """Another one for each side of each row."""
    steps = torch.linspace(0.5, 6.0, n, dtype=dtype).unsqueeze(1)
    return Temperatures(steps, steps.flip(0) + 0.3)


def one(value: float = 1.0, dtype: torch.dtype = torch.float64) -> Temperatures:
    T = torch.full((1, 1), value, dtype=dtype)
    return Temperatures(T, T)


def defined(name: str, p: Tensor, q: Tensor) -> Tensor:
    """The definition in probabilities; p the teacher's, q the student's."""

    def from_to(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if name.startswith("adaptive_kl"):
        head = torch.zeros_like(p, dtype=torch.bool)
        for row, probabilities in enumerate(p.tolist()):
            mass = 0.0
            for place, c in enumerate(sorted(range(len(probabilities)), key=lambda c: -probabilities[c])):
                mass += probabilities[c]
                head[row, c] = place == 0 or mass <= (0.9 if "(" in name else 0.5)
        w = ((p - q).abs() * head).sum(-1) / (p - q).abs().sum(-1)
        return w * from_to(p, q) + (1 - w) * from_to(q, p)
    if name.startswith("jsd"):
        beta = {"jsd": 0.5, "jsd(0.1)": 0.1}.get(name)
        if beta is None:
            return from_to(p, q) if name == "jsd(0)" else from_to(q, p)
        m = beta * p + (1 - beta) * q
        return beta * from_to(p, m) + (1 - beta) * from_to(q, m)
    return {
        "kl": lambda: from_to(p, q),
        "reverse_kl": lambda: from_to(q, p),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "skew_kl": lambda: from_to(p, 0.1 * p + 0.9 * q),
        "skew_kl(0)": lambda: from_to(p, q),
        "skew_reverse_kl": lambda: from_to(q, 0.1 * q + 0.9 * p),
        "skew_reverse_kl(0.9)": lambda: from_to(q, 0.9 * q + 0.1 * p),
    }[name]()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_definition_times_the_two_temperatures(name: str) -> None:
    rows, T = random_rows(), temperatures()
    p, q = torch.softmax(rows.teacher / T.teacher, -1), torch.softmax(rows.student / T.student, -1)
    want = (T.student * T.teacher).squeeze(-1) * defined(name, p, q)
    torch.testing.assert_close(DIVERGENCES[name](rows, T), want, rtol=1e-12, atol=1e-13)


def test_kl_is_torch_s_and_its_slope_is_the_difference() -> None:
    rows, T = random_rows(), one(4.0)
    leaf = rows.student.clone().requires_grad_()
    found = kl(rows.replace(student=leaf), T)
    logq, p = F.log_softmax(rows.student / 4, -1), F.softmax(rows.teacher / 4, -1)
    torch.testing.assert_close(found.detach(), 16 * F.kl_div(logq, p, reduction="none").sum(-1))
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    torch.testing.assert_close(slope, 4 * (logq.exp() - p))


def test_a_factor_takes_the_place_of_the_product() -> None:
    rows, T = random_rows(), temperatures()
    factor = torch.full_like(T.student, 7.0)
    torch.testing.assert_close(
        kl(rows, Temperatures(*T[:2], factor)) / 7.0, kl(rows, T) / (T.student * T.teacher).squeeze(-1)
    )


def test_zero_at_agreement_and_its_slope(objective: Objective) -> None:
    rows = random_rows()
    leaf = rows.teacher.clone().requires_grad_()
    T = temperatures()
    value = objective(rows.replace(student=leaf), Temperatures(T.student, T.student))
    assert value.max() < 1e-13 and value.min() >= 0
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert slope.abs().max() < 1e-13


def test_jsd_is_bounded_and_symmetric() -> None:
    rows, T = random_rows(scale=50.0), one(1.0)
    swapped = Rows(rows.teacher, rows.student)
    torch.testing.assert_close(jsd(rows, T), jsd(swapped, T))
    assert jsd(rows, T).max() <= math.log(2) * (1 + 1e-12)
    torch.testing.assert_close(jsd(rows, T, beta=0.2), jsd(swapped, T, beta=0.8))
    torch.testing.assert_close(reverse_kl(rows, T), kl(swapped, T))
    torch.testing.assert_close(skew_reverse_kl(rows, T), skew_kl(swapped, T))
    torch.testing.assert_close(skew_kl(rows, T, skew=0.0), kl(rows, T))
    assert skew_kl(rows, T).max() <= -math.log(0.1)
    # near its ends jsd, over its weight, is what stands at them
    near = random_rows(scale=1.0)
    torch.testing.assert_close(jsd(near, T, beta=1e-8) / 1e-8, kl(near, T), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jsd(near, T, beta=1 - 1e-8) / 1e-8, reverse_kl(near, T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_at_ten_thousand(objective: Objective, dtype: torch.dtype) -> None:
    hot = 1e4 * torch.eye(4, dtype=torch.float64)
    for s, t in ((hot, -hot), (-hot, hot), (hot, hot.flip(0)), (hot, hot), (hot, torch.zeros(4, 4))):
        leaf = s.to(dtype).clone().requires_grad_()
        value = objective(Rows(leaf, t.to(dtype)), one(1.0, torch.float32))
        value.sum().backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.isfinite().all() and (value >= 0).all()
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_classes_masked_on_both_sides_are_left_out(objective: Objective) -> None:
    rows, T = random_rows(), temperatures()
    kept = [0, 2, 3, 6]
    gone = torch.tensor([1, 4, 5])
    leaf = rows.student.index_fill(1, gone, -torch.inf).requires_grad_()
    masked = Rows(leaf, rows.teacher.index_fill(1, gone, -torch.inf))
    value = objective(masked, T)
    torch.testing.assert_close(
        value.detach(), objective(Rows(rows.student[:, kept], rows.teacher[:, kept]), T), rtol=1e-12, atol=1e-14
    )
    value.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[:, gone].any()
    nothing = torch.full((2, 3), -torch.inf, requires_grad=True)
    value = objective(Rows(nothing, nothing.detach()), one(2.0))
    value.sum().backward()
    assert value.max() < 1e-14 and nothing.grad is not None and not nothing.grad.any()


def test_a_class_masked_for_the_student_alone_costs_infinity() -> None:
    rows = Rows(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
    assert kl(rows, one()).isposinf().all()
    assert reverse_kl(Rows(rows.teacher, rows.student), one()).isposinf().all()
    assert kl(Rows(rows.teacher, rows.student), one()).isfinite().all()
    assert jsd(rows, one()).isfinite().all()


def test_a_temperature_that_learns_gets_a_finite_slope(objective: Objective) -> None:
    rows = random_rows()
    T = Temperatures(*(t.clone().requires_grad_() for t in temperatures()[:2]))
    gone = torch.tensor([2])
    masked = Rows(rows.student.index_fill(1, gone, -torch.inf), rows.teacher.index_fill(1, gone, -torch.inf))
    kept = [0, 1, 3, 4, 5, 6]
    fewer = Rows(rows.student[:, kept], rows.teacher[:, kept])
    found, want = (torch.autograd.grad(objective(r, T).sum(), T[:2]) for r in (masked, fewer))
    torch.testing.assert_close(found, want)


def test_gradients(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(3, 4)
    # the weight of adaptive_kl is held constant, and so it is here
    monkeypatch.setattr("tempering.objectives.head_share", lambda *_: torch.tensor([0.2, 0.5, 0.9]).double())
    T = Temperatures(*(t.requires_grad_() for t in temperatures(3)[:2]))

    def value(student: Tensor, T_s: Tensor, T_t: Tensor) -> Tensor:
        return objective(rows.replace(student=student), Temperatures(T_s, T_t))

    leaf = rows.student.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (leaf, *T[:2]))
    assert torch.autograd.gradgradcheck(value, (leaf, *T[:2]), atol=1e-4), "input-gradient methods need the second"


def test_cross_entropy_is_torch_s() -> None:
    rows = random_rows()
    leaf = rows.student.clone().requires_grad_()
    assert rows.target is not None
    value = cross_entropy(rows.replace(student=leaf))
    torch.testing.assert_close(value.detach(), F.cross_entropy(rows.student, rows.target, reduction="none"))
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(cross_entropy(rows.replace(target=rows.target.to(dtype))), value.detach())
    some = rows.target.clone()
    some[0], some[3] = IGNORE_INDEX, -1
    value = cross_entropy(rows.replace(student=leaf, target=some))
    value.sum().backward()
    assert float(value[0].detach()) == float(value[3].detach()) == 0.0
    assert leaf.grad is not None and not leaf.grad[0].any() and leaf.grad[1].any()
    half = cross_entropy(rows.replace(student=rows.student.half()))
    assert half.dtype == torch.float32


def test_labels_that_are_not_there() -> None:
    rows = random_rows().replace(target=None, name="anchors")
    with pytest.raises(ValueError, match=r"cross_entropy needs labels, but Rows\(name='anchors'\) has target=None"):
        cross_entropy(rows)
    with pytest.raises(
        ValueError, match=r"label 7 is out of range for 7 classes \(labels count from 0 to 6\).*start at"
    ):
        cross_entropy(rows.replace(target=torch.tensor([0, 1, 7, 2, 3, 4])))


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_mixtures_out_of_range(bad: float) -> None:
    rows, T = random_rows(), one()
    with pytest.raises(ValueError, match=r"jsd needs beta in \[0, 1\]; got"):
        jsd(rows, T, beta=bad)
    for name, function in (("skew_kl", skew_kl), ("skew_reverse_kl", skew_reverse_kl)):
        for value in (bad, 1.0):
            with pytest.raises(ValueError, match=rf"^{name} needs skew in \[0, 1\); got {value}"):
                function(rows, T, skew=value)


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [0, 0, -torch.inf, -torch.inf]], requires_grad=True)
    found = entropy(logits)
    torch.testing.assert_close(found.detach(), torch.tensor([math.log(4), 0.0, math.log(2)]))
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    rows = random_rows()
    p = rows.student.softmax(-1)
    torch.testing.assert_close(entropy(rows.student), -(p * p.log()).sum(-1))


def test_mixture_stays_in_log_space() -> None:
    logp, logq = (F.log_softmax(z, -1) for z in (random_rows().student, random_rows().teacher))
    torch.testing.assert_close(mixture(logp, logq, 0.3).exp(), 0.3 * logp.exp() + 0.7 * logq.exp())
    assert mixture(logp, logq, 1.0) is logp and mixture(logp, logq, 0.0) is logq
    far = torch.tensor([[0.0, -1e5, -torch.inf]])
    assert mixture(far, far, 0.5).tolist() == [[0.0, -1e5, -math.inf]]


def test_rounding_below_zero_is_cut_off_and_the_slope_is_not() -> None:
    logq = log_softmax(torch.randn(2000, 50) * 3)
    leaf = (logq + 1e-8 * torch.randn_like(logq)).requires_grad_()
    plain = (logq.exp() * (logq - leaf)).sum(-1)
    assert (plain < 0).any(), "else this shows nothing"
    value = divergence(logq, leaf)
    assert (value >= 0).all()
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(slope, -logq.exp(), rtol=0.0, atol=0.0)


@settings(deadline=None, derandomize=True, max_examples=50, database=None)
@given(
    st.integers(1, 5).flatmap(
        lambda c: st.tuples(*(st.lists(st.floats(-1e4, 1e4, width=32), min_size=c, max_size=c) for _ in "uv"))
    ),
    st.sampled_from(sorted(DIVERGENCES)),
    st.floats(0.1, 20.0),
)
def test_never_negative_and_finite(pair: tuple[list[float], list[float]], name: str, T: float) -> None:
    teacher, student = (torch.tensor([z]) for z in pair)
    leaf = student.requires_grad_()
    value = DIVERGENCES[name](Rows(leaf, teacher), one(T, torch.float32))
    value.sum().backward()
    assert value.isfinite().all() and bool((value >= 0).all())
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    for both in softened(Rows(leaf, teacher), one(T, torch.float32)):
        torch.testing.assert_close(both.exp().sum(), torch.ones(()), rtol=1e-5, atol=1e-5)
