"""Rows, what they refuse, and total: the one reduction."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tempering
import tests.quick_hypothesis  # noqa: F401
from tempering.methods import KD
from tempering.rows import IGNORE_INDEX, Rows, expand_to_rows, is_labeled, total, upcast_to_float32
from tests.cases import each
from tests.conftest import random_rows

Z = torch.zeros(4, 3)


def test_the_fields_and_their_defaults() -> None:
    rows = Rows(Z, Z + 1)
    assert (rows.target, rows.weight, dict(rows.features), rows.name, rows.ids) == (None, None, {}, "logits", None)
    assert len(rows) == 4 and float(rows.total_weight) == 4.0
    assert tempering.Rows is Rows and tempering.total is total
    assert IGNORE_INDEX == -100
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.student = Z  # pyright: ignore[reportAttributeAccessIssue]
    changed = rows.replace(name="anchors", weight=torch.ones(4))
    assert (changed.name, rows.name) == ("anchors", "logits") and changed.student is rows.student
    with pytest.raises(ValueError, match=r"Rows\(name='anchors'\) needs weight of shape \(N,\) = \(4,\); got \(3,\)"):
        changed.replace(weight=torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"teacher": torch.zeros(4, 5)}, r"student and teacher of one shape \(N, C\); got \(4, 3\) and \(4, 5\)"),
        ({"teacher": torch.zeros(4, 5)}, r"Cut, map or mask them \(minus infinity on both sides\) in the task"),
        ({"student": Z[0], "teacher": Z[0]}, r"got \(3,\) and \(3,\)"),
        ({"student": Z[None], "teacher": Z[None]}, r"Flatten them: logits.flatten\(0, -2\)"),
        (
            {"teacher": Z.clone().requires_grad_()},
            r"would be trained. Wrap it in teachers.Live\(model\), or .detach\(\)",
        ),
        ({"student": Z.long()}, r"floating point logits; got student torch.int64 .*Convert with .float\(\) first"),
        ({"teacher": Z.to(torch.uint8)}, r"floating point logits; got student torch.float32 and teacher torch.uint8"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"needs target of shape \(N,\) = \(4,\); got \(5,\)"),
        ({"target": torch.zeros(4, 3, dtype=torch.long)}, r"needs target of shape \(N,\) = \(4,\); got \(4, 3\)"),
        ({"target": torch.zeros(4)}, r"an integer tensor, or soft labels \(N, C\); got torch.float32 \(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, r"needs class indices as target.*got torch.bool"),
        ({"weight": torch.ones(4, 1)}, r"needs weight of shape \(N,\) = \(4,\); got \(4, 1\)"),
        ({"ids": torch.arange(3)}, r"needs ids of shape \(N,\) = \(4,\); got \(3,\)"),
    ],
)
def test_what_rows_refuse(arguments: dict, error: str) -> None:
    with pytest.raises(ValueError, match=r"Rows\(name='logits'\)") as caught:
        Rows(**({"student": Z, "teacher": Z} | arguments))
    assert caught.match(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_any_integer_is_a_target_and_kept_as_int64(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 1, 2, 2], dtype=dtype)
    rows = Rows(Z, Z, target)
    assert rows.target is not None and rows.target.dtype == torch.int64 and rows.target.tolist() == [0, 1, 2, 2]
    assert is_labeled(torch.tensor([156, 255], dtype=torch.uint8)).all()  # -100 and -1 in 8 bits


@each(
    "field, value, error",
    [
        ("student", [[0.0] * 3] * 4, r"a tensor as student; got list. Write torch.tensor\(x\)"),
        ("teacher", np.zeros((4, 3), np.float32), r"a tensor as teacher; got ndarray. Write torch.from_numpy\(x\)"),
        ("target", [0, 1, 2, 0], "a tensor as target; got list"),
        ("weight", np.ones(4), "a tensor as weight; got ndarray"),
        ("teacher", torch.zeros(4, 3, device="meta"), "the teacher's on the meta device"),
        ("student", torch.zeros(4, 3).to(torch.float8_e4m3fn), r"16 bits or more; .*Write logits.float\(\)"),
        ("teacher", torch.zeros(4, 3).to_sparse(), r"the teacher's as torch.sparse_coo. Write logits.to_dense\(\)"),
        ("target", torch.tensor([0, -100, -1, -2]), "class indices from 0 on; got -2. Only -100 and -1 mean"),
        ("target", torch.tensor([0, -128, 1, 2], dtype=torch.int8), "class indices from 0 on; got -128"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:24],
)
def test_what_is_no_tensor_of_numbers_is_refused_by_name(field: str, value: object, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Rows\(name='logits'\)") as caught:
        Rows(**({"student": Z, "teacher": Z} | {field: value}))  # pyright: ignore[reportArgumentType]
    assert caught.match(error)


def test_a_row_without_a_label_is_learned_from_the_teacher_and_counts_unless_its_weight_is_0() -> None:
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for unlabeled in (-100, -1):
        rows = Rows(student, teacher, torch.tensor([0, 1, 2, unlabeled]))
        terms = KD()(rows)
        assert float(terms["hard"][3]) == 0.0 and float(terms["soft"][3]) > 0.0
        assert float(total(terms, rows)) == pytest.approx(float(sum(term.sum() for term in terms.values())) / 4)
        left_out = rows.replace(weight=weight)
        want = total(KD()(rows.select(slice(3))), rows.select(slice(3)))
        torch.testing.assert_close(total(KD()(left_out), left_out), want)


def test_mass_counts_in_float32_at_least() -> None:
    weight = torch.full((5000,), 1.0, dtype=torch.bfloat16)
    rows = Rows(torch.zeros(5000, 2), torch.zeros(5000, 2), weight=weight)
    assert rows.total_weight.dtype == torch.float32 and float(rows.total_weight) == 5000.0
    assert float(Rows(Z[:0], Z[:0]).total_weight) == 0.0
    assert Rows(Z, Z, weight=torch.ones(4, dtype=torch.float64)).total_weight.dtype == torch.float64


def test_widened() -> None:
    kept = {torch.float64: torch.float64, torch.float32: torch.float32}
    for dtype, want in (kept | dict.fromkeys((torch.float16, torch.bfloat16), torch.float32)).items():
        assert upcast_to_float32(Z.to(dtype)).dtype == want
    assert upcast_to_float32(Z) is Z


def test_shared_is_its_own_mean() -> None:
    value = torch.tensor(2.5, requires_grad=True)
    rows = Rows(Z, Z)
    spread = expand_to_rows(value, rows)
    assert spread.shape == (4,)
    loss = total({"block": spread}, rows)
    loss.backward()
    assert value.grad is not None and float(loss.detach()) == 2.5 and float(value.grad) == 1.0


def test_total_is_the_weighted_mean_of_summed_terms() -> None:
    rows = random_rows(weighted=True)
    a, b = torch.arange(6.0, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    assert rows.weight is not None
    want = ((a + b) * rows.weight).sum() / rows.weight.sum()
    torch.testing.assert_close(total({"a": a, "b": b}, rows), want)
    torch.testing.assert_close(total({"a": a}, rows.replace(weight=None)), a.mean())
    torch.testing.assert_close(total({"a": a}, rows, normalizer=24.0), (a * rows.weight).sum() / 24)
    torch.testing.assert_close(total({"a": a}, rows, normalizer=torch.tensor(24)), (a * rows.weight).sum() / 24)
    assert total({"a": a}, rows).shape == ()


@pytest.mark.parametrize("whole", [None, 0.0, torch.tensor(0.0), 8.0], ids=str)
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_learn_from_is_zero_with_a_gradient_path(n: int, whole: object) -> None:
    term = torch.full((n,), 7.0, requires_grad=True)
    rows = Rows(Z[:n], Z[:n], weight=torch.zeros(n))
    loss = total({"a": term}, rows, normalizer=whole)  # pyright: ignore[reportArgumentType]
    loss.backward()
    assert term.grad is not None and float(loss.detach()) == 0.0 and not term.grad.any()
    assert float(total({"a": term[:0]}, Rows(Z[:0], Z[:0]), normalizer=whole).detach()) == 0.0  # pyright: ignore


def test_an_infinity_in_a_row_of_weight_zero_is_left_out() -> None:
    logits = Z.clone().index_put_((torch.tensor([1]), torch.tensor([0])), torch.tensor(-torch.inf)).requires_grad_()
    rows = Rows(logits, Z, torch.zeros(4, dtype=torch.long), torch.tensor([1.0, 0, 1, 1]))
    terms = {"hard": tempering.objectives.cross_entropy(rows)}  # infinite in row 1: its label is masked
    assert terms["hard"].isinf().sum() == 1
    loss = total(terms, rows)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[1].any()
    torch.testing.assert_close(loss.detach(), torch.tensor(3.0).log())


def test_what_total_refuses() -> None:
    rows = Rows(Z, Z)
    with pytest.raises(ValueError, match=r"total\(\) got no terms; a method returns at least one, \{name: \(N,\)\}"):
        total({}, rows)
    for wrong in (torch.zeros(()), torch.zeros(4, 1), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"every term must have shape \(N,\) = \(4,\), unreduced; got \{'bad': "):
            total({"good": torch.zeros(4), "bad": wrong}, rows)


@settings(deadline=None, derandomize=True, max_examples=40, database=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.sampled_from([0.0, 0.25, 1.0, 3.0])), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=3),
    st.booleans(),
)
def test_the_loss_does_not_depend_on_the_split(values: list, cuts: list[int], weighted: bool) -> None:
    term, weight = (torch.tensor(x, dtype=torch.float64) for x in zip(*values, strict=True))
    term.requires_grad_()
    empty = torch.zeros(len(term), 2, dtype=torch.float64)
    rows = Rows(empty, empty, weight=weight if weighted else None)
    loss = total({"a": term}, rows)
    (want,) = torch.autograd.grad(loss, term)
    places = [0, *sorted(min(c, len(term)) for c in cuts), len(term)]
    parts = []
    for a, b in itertools.pairwise(places):
        part = Rows(empty[a:b], empty[a:b], weight=weight[a:b] if weighted else None)
        parts.append(total({"a": term[a:b]}, part, normalizer=rows.total_weight))
    together = torch.stack(parts).sum()
    torch.testing.assert_close(together, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(together, term)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights(wrong: float) -> None:
    z = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"needs weights >= 0 and finite; got .* 0 leaves out the row"):
        Rows(z, z, weight=torch.tensor([wrong, 1.0, 1.0]))


def test_select_takes_every_field_of_the_same_rows() -> None:
    n = torch.arange(4)
    rows = Rows(torch.randn(4, 3), torch.randn(4, 3), n, n / 4, {"map": (torch.randn(4, 2), torch.randn(4, 5))}, "weak")
    rows = rows.replace(ids=n + 10, positions=n, privacy_score=n / 4, task_loss=n / 2)
    want = torch.tensor([1, 3])
    for index in (want, torch.tensor([False, True, False, True]), slice(1, None, 2)):
        part = rows.select(index)
        assert part.name == "weak" and torch.equal(part.features["map"][1], rows.features["map"][1][want])
        for name in ("student", "teacher", "target", "weight", "ids", "positions", "privacy_score", "task_loss"):
            assert torch.equal(getattr(part, name), getattr(rows, name)[want]), name
    assert Rows(torch.ones(2, 3), torch.ones(2, 3)).select(slice(1)).target is None
