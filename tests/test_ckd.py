"""Comparative KD: the authors' numbers, and the closed form against the loop over all comparisons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempering.methods.logits.ckd as ckd
from tempering.methods import CKD, FeatureCKD, Method, Sum, Supervised
from tempering.methods.logits.ckd import differences, sample_groups
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.tasks import Classification
from tempering.temperature import Sharpness, Static
from tests.conftest import random_rows
from tests.contract import block, ran, same
from tests.paths import needs_shared
from tests.runs import ADAMW, LOADERS, go
from tests.test_golden import Case

SAMPLED = ["g1v1", "g1v1_kd", "g2v1", "g2v2"]


def method_of(case: Case, **more: Any) -> CKD:
    config = case.config
    weights = {"soft": config["w_rel"], "hard": config["w_cls"], "divergence": config["w_kd"]}
    return CKD(groups=(config["pos"], config["neg"]), temperature=Static(config["kd_temperature"]), **(weights | more))


@needs_shared
@pytest.mark.parametrize("name", [*SAMPLED, "pairs_all"])
def test_drawn_comparisons_are_the_authors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ckd", name)
    drawn = torch.tensor(case.values["group_index"])
    case.seen.add("group_index")
    monkeypatch.setattr(ckd, "sample_groups", lambda kept, pairs, size: drawn)
    rows, first = case.rows(), case.config["pos"]
    every = torch.ones(rows.student.shape, dtype=torch.bool)
    assert rows.target is not None
    hot = torch.nn.functional.one_hot(rows.target, rows.student.shape[1]).double()
    for side, x in (("student", rows.student), ("teacher", rows.teacher), ("label", hot)):
        case.agree(f"delta_{side}", differences(x, every, drawn, first))
    whole = method_of(case, pairs=len(drawn))
    case.agree_with_gradient("loss", "grad", total(whole(rows, 1.0), rows), rows)
    unit = method_of(case, soft=1.0, hard=1.0, divergence=1.0, pairs=len(drawn))(rows, 1.0)
    for key, grad, term in (
        ("mse_rel", "grad_rel", "soft"),
        ("mse_cls", "grad_cls", "hard"),
        ("kd", "grad_kd", "divergence"),
    ):
        case.agree_with_gradient(key, grad, unit[term].mean(), rows)
    if name == "pairs_all":
        closed = method_of(case, soft=1.0, hard=1.0)(rows, 1.0)
        n = len(rows)
        for key, term in (("rel", "soft"), ("cls", "hard")):
            value = closed[term].mean()
            case.agree_with_gradient(f"allpairs_{key}_offdiag", f"grad_allpairs_{key}_offdiag", value, rows)
            case.agree(f"allpairs_{key}_incl", value * (n - 1) / n)
    case.all_seen()


def naive(rows: Rows, other: Tensor, groups: tuple[int, int]) -> Tensor:
    """The loop over all pairs of disjoint groups, each counting by the product of its rows' weights."""
    weight = torch.ones(len(rows), dtype=torch.float64) if rows.weight is None else rows.weight
    summed, mass = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for first in itertools.combinations(range(len(rows)), groups[0]):
        for last in itertools.combinations(sorted(set(range(len(rows))) - set(first)), groups[1]):
            by = weight[[*first, *last]].prod()
            r = rows.student - other
            summed = summed + by * (r[list(first)].mean(0) - r[list(last)].mean(0)).square().mean()
            mass = mass + by
    return summed / mass


@pytest.mark.parametrize(("groups", "weighted"), [((1, 1), False), ((1, 1), True), ((2, 1), False), ((2, 3), False)])
def test_the_closed_form_is_the_loop_over_all_comparisons(groups: tuple[int, int], weighted: bool) -> None:
    rows = random_rows(7, 5, weighted=weighted)
    if rows.weight is not None:
        rows.weight[2] = 0.0
    rows.student.requires_grad_()
    got = total(CKD(hard=0.0, groups=groups)(rows, 1.0), rows)
    want = naive(rows, rows.teacher, groups)
    same(got, want)
    same(*(torch.autograd.grad(value, rows.student)[0] for value in (got, want)))


@pytest.mark.parametrize("groups", [(2, 1), (1, 3), (2, 3)])
def test_weighted_groups_are_the_documented_mean_over_pairs(groups: tuple[int, int]) -> None:
    rows = random_rows(7, 5, weighted=True)
    assert rows.weight is not None
    r, w = rows.student - rows.teacher, rows.weight
    by = (w[:, None] * w).fill_diagonal_(0.0)
    pairs = (by * (r[:, None] - r).square().mean(-1)).sum() / by.sum()
    got = total(CKD(hard=0.0, groups=groups)(rows, 1.0), rows)
    same(got, (1 / groups[0] + 1 / groups[1]) / 2 * pairs)
    assert not torch.isclose(got, naive(rows, rows.teacher, groups), rtol=1e-3), "not each weighted by a product"


def test_labels_take_part_where_they_are() -> None:
    rows = random_rows(7, 5)
    target = torch.tensor([0, 1, IGNORE_INDEX, 3, 4, IGNORE_INDEX, 1])
    some = rows.replace(target=target)
    known = target >= 0
    few = Rows(rows.student[known], rows.teacher[known], target[known])
    hot = torch.nn.functional.one_hot(target[known], 5).double()
    got = CKD()(some, 1.0)["hard"]
    same(got[known].mean(), naive(few, hot, (1, 1)))
    assert not got[~known].any()
    alone = torch.full_like(target, IGNORE_INDEX)
    alone[0] = 2
    assert not CKD()(rows.replace(target=alone), 1.0)["hard"].any(), "one label has no other to be compared with"


def test_drawn_comparisons_have_the_mean_of_all() -> None:
    rows = random_rows(6, 4).replace(weight=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    every, some = CKD(groups=(2, 1)), CKD(groups=(2, 1), pairs=40_000)
    for name, term in every(rows, 1.0).items():
        want = float(total({name: term}, rows))
        assert float(some(rows, 1.0)[name][0]) == pytest.approx(want, rel=0.03)
    kept = torch.tensor([True, False, True, True, False, True])
    drawn = sample_groups(kept, 500, 3)
    assert drawn.shape == (500, 3) and set(drawn.unique().tolist()) == {0, 2, 3, 5}
    assert all(len(set(line)) == 3 for line in drawn.tolist())
    assert len(sample_groups(kept, 500, 5)) == 0


@pytest.mark.parametrize(
    "method",
    [CKD(pairs=16, divergence=1.0), CKD(pairs=16, divergence=1.0, groups=(2, 2), temperature=Sharpness(4.0)), CKD()],
    ids=repr,
)
def test_what_a_block_may_be(method: Method) -> None:
    """Too few rows, one class, masked classes, all masked, huge logits: finite, with a gradient path."""
    gone = torch.tensor([1, 3])
    wide = block(6, 5)
    for rows in (
        block(0),
        block(1),
        block(3),
        block(6, 1),
        wide.replace(
            student=wide.student.index_fill(1, gone, -torch.inf),
            teacher=wide.teacher.index_fill(1, gone, -torch.inf),
            target=wide.target * 0,
        ),
        wide.replace(
            student=torch.full_like(wide.student, -torch.inf),
            teacher=torch.full_like(wide.student, -torch.inf),
            target=None if wide.target is None else wide.target * 0 - 100,
        ),
        wide.replace(student=1e4 * wide.student.sign().float(), teacher=-1e4 * wide.teacher.sign().float()),
        wide.replace(student=wide.student.bfloat16(), teacher=wide.teacher.bfloat16()),
    ):
        student = rows.student.detach().clone().requires_grad_()
        made = rows.replace(student=student)
        loss = total(ran(method, made), made)
        loss.backward()
        assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_what_all_rows_share_cancels() -> None:
    """A classifier's bias learns nothing from comparisons; a cross entropy beside them anchors it."""
    for method, learns in ((CKD(), False), (CKD(pairs=8, divergence=1.0), False), (Sum(CKD(), Supervised()), True)):
        rows = random_rows()
        rows.student.requires_grad_()
        (gradient,) = torch.autograd.grad(total(method(rows, 1.0), rows), rows.student)
        assert bool((gradient.sum(0).abs() > 1e-9).any()) == learns


def test_features_are_compared_as_logits_are() -> None:
    rows = block()
    method = FeatureCKD(feature=2.0, names=["map"])
    method.setup(rows)
    method.double()
    s, t = rows.features["map"]
    said, taught = method.projectors[0](s).flatten(1), t.flatten(1)
    want = naive(Rows(said, taught), taught, (1, 1))
    same(total(method(rows, 1.0), rows), 2.0 * want)
    shifted = rows.replace(features={"map": (s + 1.0, t - 3.0)})
    same(total(method(shifted, 1.0), rows), 2.0 * want)
    assert list(method(rows, 1.0)) == ["feature"]


def test_a_run_on_logits_and_features() -> None:
    def conv(channels: int) -> nn.Module:
        torch.manual_seed(channels)
        return nn.Sequential(nn.Conv2d(1, channels, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * channels, 5))

    student, teacher = conv(3), conv(6)
    before = [p.detach().clone() for p in student.parameters()]
    task, method = Classification(features={"map": ("0", "0")}), Sum(CKD(), FeatureCKD(), Supervised(hard=0.1))
    models: dict[str, Any] = {"student": student, "teacher": teacher, "optimizer": ADAMW}
    run = go(LOADERS["batches"](), method=method, task=task, steps=6, selfcheck=False, **models)
    assert all(not torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))
    assert run.facts["method"]["ckd"]["groups"] == [1, 1]
    with pytest.raises(ValueError, match=r"^Sum compares rows with each other"):
        go(LOADERS["batches"](), method=Sum(CKD()), steps=1, accumulate=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": (1,)}, r"CKD compares two groups of one row or more, such as \(1, 1\) or \(2, 1\); got \(1,\)"),
        ({"groups": (0, 1)}, r"got \(0, 1\)"),
        ({"pairs": 0}, "CKD needs pairs >= 1, or None for all; got 0"),
        ({"divergence": 1.0}, "no closed form of divergence > 0: draw comparisons, pairs=64"),
        ({"soft": -1.0}, "CKD needs soft >= 0"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CKD(**options)
