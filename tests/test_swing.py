"""Swing Distillation: what is public is KD's, what is private is hot, noisy and unlabeled, wherever a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tempering import Rows, total
from tempering.experiments.spec import method_from
from tempering.kernels import chunked
from tempering.methods import DTKD, KD, Swing  # pyright: ignore[reportAttributeAccessIssue]
from tempering.methods.logits.swing import draws
from tempering.rows import IGNORE_INDEX
from tempering.temperature import Private, Sharpness, Static
from tests.conftest import random_rows
from tests.contract import same

SCORES = torch.tensor([0.0, 1.0, 0.25, 0.0, 0.75, 1.0], dtype=torch.float64)


def private(scores: Tensor | None = SCORES, **options: Any) -> Rows:
    rows = random_rows(**options)
    n = len(rows)
    return rows.replace(privacy_score=scores, ids=torch.arange(n) // 2, positions=torch.arange(n) % 2 + 3)


def part(rows: Rows, at: Any) -> Rows:
    """Some of the rows, with all that each of them has."""
    names = ("student", "teacher", "target", "weight", "ids", "positions", "privacy_score")
    return rows.replace(**{name: None if getattr(rows, name) is None else getattr(rows, name)[at] for name in names})


def backward(method: Any, rows: Rows, **whole: Any) -> tuple[Tensor, Tensor]:
    student = rows.student.detach().clone().requires_grad_()
    made = rows.replace(student=student)
    loss = total(method(made, 0.5), made, **whole)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    return loss.detach(), student.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [None, torch.zeros(6)], ids=["unsaid", "public"])
def test_without_anything_private_it_is_kd_to_the_last_bit(scores: Tensor | None, dtype: torch.dtype) -> None:
    rows = private(scores, dtype=dtype, weighted=True)
    for made, plain in (
        (Swing(), KD()),
        (
            Swing(soft=2.0, hard=0.5, temperature=Private(Sharpness(4.0))),
            KD(soft=2.0, hard=0.5, temperature=Sharpness(4.0)),
        ),
        (DTKD(temperature=Private(Sharpness(4.0))), DTKD()),
    ):
        same(backward(made, rows), backward(plain, rows), 0.0, 0.0)
    off = Swing(temperature=Static(4.0), noise=0.0, hide=1.0)
    same(backward(off, private(dtype=dtype)), backward(KD(), private(dtype=dtype)), 0.0, 0.0)


def test_temperatures() -> None:
    rows, s = private(), SCORES.unsqueeze(1)
    T = Private(Static(4.0), high=20.0)(rows)
    same(T.teacher, 4.0 + 16.0 * s)
    same(T.student, torch.full((1, 1), 4.0, dtype=torch.float64))
    same(T.scale, 16.0 - 15.0 * SCORES)
    curved = Private(Static(4.0), power=2.0, sides="both", squared=True)(rows)
    same(curved.student, 4.0 + 16.0 * s**2)
    same(curved.student, curved.teacher)
    base = curved.teacher.squeeze(1) ** 2
    same(curved.scale, 16.0 + SCORES**2 * (base - 16.0))
    inner = Sharpness(4.0)(rows)
    over = Private(Sharpness(4.0))(rows)
    public = SCORES == 0
    assert torch.equal(over.teacher[public], inner.teacher[public]) and torch.equal(
        over.scale[public], inner.scale[public]
    )
    same(over.teacher[SCORES == 1], torch.full((2, 1), 20.0, dtype=torch.float64))
    policy = Private()
    policy(rows)
    assert int(policy.report()["private"]) == 4
    same(policy.with_reference(2.0, rows, 1.0).teacher, 2.0 + 18.0 * s)
    nothing = rows.replace(
        weight=torch.tensor([1.0, 0, 1, 1, 1, 0]),
        privacy_score=SCORES.clone().index_fill(0, torch.tensor(5), torch.nan),
    )
    same(policy(nothing).teacher[[1, 5]], torch.full((2, 1), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("distribution", ["normal", "laplace", "gumbel"])
def test_noise_is_what_it_says(distribution: Any) -> None:
    ids = torch.arange(400)
    x = draws(distribution, 3, ids, ids % 11, 500)
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1.0) < 0.02 and x.isfinite().all()
    kurtosis = float((x**4).mean())
    assert abs(kurtosis - {"normal": 3.0, "laplace": 6.0, "gumbel": 5.4}[distribution]) < 0.4
    near = [torch.corrcoef(y[:60]).fill_diagonal_(0.0).abs().max() for y in (x, x.T)]
    assert max(near) < 0.25, "rows and classes have noise of their own"
    assert torch.equal(draws(distribution, 3, ids[7:9], ids[7:9] % 11, 500), x[7:9])
    for other in (draws(distribution, 4, ids, ids % 11, 500), draws(distribution, 3, ids, ids % 11 + 1, 500)):
        assert abs(float(torch.corrcoef(torch.stack((x.flatten(), other.flatten())))[0, 1])) < 0.02
    assert not torch.equal(
        draws(distribution, 3, ids[:1] + 2**32, ids[:1], 9), draws(distribution, 3, ids[:1], ids[:1], 9)
    )


def test_noise_meets_private_rows_alone_and_is_the_same_again() -> None:
    rows = private()
    quiet, loud = Swing(noise=0.0)(rows)["soft"], Swing(noise=2.0)(rows)["soft"]
    assert torch.equal(quiet == loud, SCORES == 0)
    assert torch.equal(loud, Swing(noise=2.0)(rows, 0.1)["soft"]), "another epoch, the same noise"
    assert not torch.equal(loud, Swing(noise=2.0, seed=1)(rows)["soft"])
    # of the size that it says, on tempered logits
    seen: list[Rows] = []
    method = Swing(noise=0.5)
    T = method.temperature(rows).teacher
    seen.append(method._add_noise(rows, SCORES, T.expand(6, 1)))
    moved = ((seen[0].teacher - rows.teacher) / T)[SCORES > 0]
    want = 0.5 * SCORES[SCORES > 0].unsqueeze(1) * draws("normal", 0, rows.ids, rows.positions, 7)[SCORES > 0]  # pyright: ignore
    same(moved, want)


def test_cut_batches_add_up_and_chunks_do() -> None:
    for method in (
        Swing(),
        Swing(temperature=Private(Sharpness(4.0)), redact=True),
        DTKD(temperature=Private(Sharpness(4.0))),
    ):
        rows = private(weighted=True)
        whole = backward(method, rows)
        pieces = [part(rows, at) for at in (slice(0, 1), slice(1, 4), slice(4, 6))]
        parts = [backward(method, piece, normalizer=rows.total_weight) for piece in pieces]
        same((sum(loss for loss, _ in parts), torch.cat([g for _, g in parts])), whole)
        order = torch.tensor([4, 2, 5, 0, 1, 3])
        same(backward(method, part(rows, order))[1], whole[1][order])


def test_padding_classes_and_empty_batches() -> None:
    rows = private()
    gone = torch.tensor([2, 5])
    masked = rows.replace(
        student=rows.student.index_fill(1, gone, -torch.inf),
        teacher=rows.teacher.index_fill(1, gone, -torch.inf),
        target=torch.zeros(6, dtype=torch.long),
    )
    _, gradient = backward(Swing(noise=3.0), masked)
    assert not gradient[:, gone].any()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    broken = rows.replace(
        weight=weight, teacher=rows.teacher.clone(), privacy_score=SCORES.clone(), student=rows.student.clone()
    )
    for x in (broken.teacher, broken.student, broken.privacy_score):
        x[1], x[5] = torch.nan, torch.inf  # pyright: ignore[reportOptionalSubscript]
    same(backward(Swing(), broken), backward(Swing(), rows.replace(weight=weight)))
    nothing, _ = backward(Swing(), part(rows, slice(0, 0)))
    assert float(nothing) == 0.0
    one = backward(Swing(), private(classes=1))[0]
    assert float(one) == 0.0
    for dtype in (torch.float16, torch.bfloat16):
        backward(Swing(noise=5.0), private(scale=2.0, dtype=dtype))
    backward(Swing(), private(scale=1e4))


def test_what_a_hidden_label_and_a_redacted_row_send() -> None:
    rows = private()
    hidden = SCORES > 0.5
    hard = Swing()(rows)["hard"]
    assert not hard[hidden].any() and bool((hard[~hidden] > 0).all())
    assert bool((Swing(hide=1.0)(rows)["hard"] > 0).all())
    own = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    assert torch.equal(Swing(hard=1.0)(rows.replace(task_loss=own))["hard"] == 0, hidden)
    _, gradient = backward(Swing(redact=True), rows)
    assert not gradient[hidden].any() and bool(gradient[~hidden].any(1).all())
    less = backward(Swing(), rows)[1][hidden].norm()
    assert 0 < less < 0.2 * backward(KD(), rows)[1][hidden].norm()
    unlabeled = rows.replace(target=torch.full((6,), IGNORE_INDEX))
    backward(Swing(), unlabeled)
    backward(Swing(hard=0.0), rows.replace(target=None))


def test_slips_are_named() -> None:
    rows = private().replace(ids=None)
    with pytest.raises(ValueError, match=r'has no ids or no positions. Give batches "ids", .* or set noise=0'):
        Swing()(rows)
    Swing(noise=0.0)(rows)
    Swing()(rows.replace(privacy_score=torch.zeros(6)))
    for kind, options, said in (
        (Swing, {"hide": 1.5}, r"Swing needs hide in \[0, 1\], a privacy"),
        (Swing, {"distribution": "cauchy"}, "needs distribution 'normal', 'laplace' or 'gumbel'; got 'cauchy'"),
        (Private, {"sides": "student"}, "needs sides 'teacher' or 'both'; got 'student'"),
        (Private, {"high": 0.0}, "Private needs high > 0 and finite"),
        (Private, {"power": -1.0}, "Private needs power > 0 and finite"),
    ):
        with pytest.raises(ValueError, match=said):
            kind(**options)
    with pytest.raises(TypeError, match="Private wraps another policy"):
        Private(4.0)
    made = method_from("swing(noise=0, temperature=private(sharpness(4), high=10))")
    assert isinstance(made, Swing) and isinstance(made.temperature, Private) and made.temperature.high == 10


def test_it_goes_through_the_chunked_loss() -> None:
    rows = private()
    student = rows.student.detach().clone().requires_grad_()
    made = rows.replace(student=student)
    chunks = chunked(Swing(), made, memory=1)
    chunks.loss.backward()
    assert student.grad is not None
    same((chunks.loss.detach(), student.grad), backward(Swing(), rows))
