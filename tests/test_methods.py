"""Logit methods: the authors' numbers, and what the options change.

What every method promises is in test_contract.
"""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tempering.methods import ATS, CSKD, DIST, DKD, DTKD, ERKD, KD, LSKD, MLKD, NKD, R2KD, RLD, TTM, USKD, WTTM, Method
from tempering.methods.logits import cskd as cskd_module
from tempering.methods.logits import mlkd as mlkd_module
from tempering.methods.logits import r2kd as r2kd_module
from tempering.methods.logits.labeled import drop_classes, one_hot, soft_cross_entropy
from tempering.methods.logits.lskd import standardized
from tempering.methods.logits.r2kd import hard_ranks, soft_ranks
from tempering.methods.logits.relations import Lines, correlation_distance, counted_entries, row_distance, soften
from tempering.objectives import cross_entropy, entropy, kl
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.temperature import Cosine, Policy, Sharpness, Standardized, Static, Temperatures
from tests.conftest import random_rows
from tests.paths import SHARED, needs_shared

CASES = ("c10", "c100")


@cache
def archive(file: str) -> dict[str, np.ndarray]:
    with np.load(SHARED / "golden" / f"{file}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def golden(file: str, case: str) -> dict[str, Tensor]:
    """The arrays of a case by name, in float64 but for labels."""
    found = {k.split("__", 1)[1]: v for k, v in archive(file).items() if k.startswith(f"{case}__")}
    settings = json.loads(str(found.pop("config")))
    assert settings
    return {k: torch.tensor(v) if k == "labels" else torch.tensor(v).double() for k, v in found.items()}


def rows_of(g: dict[str, Tensor], view: str = "", name: str = "logits", teacher: str | None = None) -> Rows:
    student = g[f"student_logits{view}"].clone().requires_grad_()
    return Rows(student, g[teacher or f"teacher_logits{view}"], g["labels"], name=name)


def close(got: Tensor, want: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got.detach(), want, rtol=rtol, atol=atol)


def loss_of(method: Method, rows: Rows, *terms: str) -> Tensor:
    made = method(rows)
    return total({name: made[name] for name in terms} if terms else made, rows)


def agree(g: dict[str, Tensor], key: str, method: Method) -> None:
    rows = rows_of(g)
    loss = loss_of(method, rows)
    close(loss, g[key])
    loss.backward()
    assert rows.student.grad is not None
    close(rows.student.grad, g[f"grad_{key}"])


# the authors' numbers


@needs_shared
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("dist", DIST(inter=1.0, intra=1.0, hard=0.0, eps=1e-8)),
        ("ttm", TTM(soft=1.0, hard=0.0, temperature=Static(10.0))),
        ("wttm", WTTM(soft=1.0, hard=0.0, temperature=Static(5.0))),
        ("nkd", NKD(target=1.0, non_target=1.5, hard=0.0, temperature=Static(1.0))),
        ("erkd", ERKD(soft=1.0, hard=0.0)),
        ("rld", RLD(sample=1.0, masked=8.0, hard=0.0)),
        ("lskd_kd", LSKD(KD(soft=1.0, hard=0.0, temperature=Static(2.0)), hard=0.0)),
        ("lskd_dkd", LSKD(DKD(target=1.0, non_target=8.0, hard=0.0, temperature=Static(2.0)), hard=0.0)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_authors_numbers(case: str, key: str, method: Method) -> None:
    agree(golden("logit_methods", case), key, method)


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_authors_parts(case: str) -> None:
    g = golden("logit_methods", case)
    rows = rows_of(g)
    dist = DIST(inter=1.0, intra=1.0, hard=0.0, eps=1e-8)
    # stored without tau^2
    close(loss_of(dist, rows, "inter") / 16.0, g["dist_inter"])
    close(loss_of(dist, rows, "intra") / 16.0, g["dist_intra"])
    close(loss_of(NKD(hard=0.0), rows, "target"), g["nkd_target"])
    close(WTTM().weigh(rows, torch.tensor([[5.0]], dtype=torch.float64)), g["wttm_weight"])
    rld = RLD(sample=1.0, masked=1.0, hard=0.0)
    close(loss_of(rld, rows, "sample"), g["rld_scd"])
    close(loss_of(rld, rows, "masked"), g["rld_mcd"])
    close(standardized(rows.student, 1e-7), g["lskd_student_z"])
    close(standardized(rows.teacher, 1e-7), g["lskd_teacher_z"])


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_r2kd(case: str) -> None:
    g = golden("r2kd", case)
    close(0.7 * g["teacher_logits"] + 0.3 * g["pruned_teacher_logits"], g["mixed_teacher_logits"])
    rows = rows_of(g, teacher="mixed_teacher_logits")
    method = R2KD(rank="published", eps=1e-8)
    close(loss_of(method, rows, "rows") / 32.0, g["value_row_distance"])
    close(loss_of(method, rows, "classes") / 32.0, g["value_col_distance"])
    value = loss_of(method, rows, "rows", "classes")
    close(value, g["value_loss"])
    close(torch.autograd.grad(value, rows.student)[0], g["grad_value"])
    close(loss_of(method, rows, "hard"), g["loss_ce"])
    # the original takes its ranks in float32
    close(1.0 - method(rows)["order"] / 2.0, g["spearman"], rtol=0.0, atol=3e-7)
    close(loss_of(method, rows, "order"), g["rank_loss"], rtol=0.0, atol=3e-7)
    assert not method(rows)["order"].requires_grad
    loss = loss_of(method, rows)
    close(loss, g["loss"], rtol=0.0, atol=3e-7)
    loss.backward()
    assert rows.student.grad is not None
    close(rows.student.grad, g["grad"])
    counted = torch.ones_like(rows.student, dtype=torch.bool)
    assert torch.equal(hard_ranks(rows.student.detach(), counted), g["ranks_student"])


def close_on_both_views(method: Method, weak: Rows, strong: Rows, g: dict[str, Tensor]) -> None:
    """The released loss and gradients of two views of a batch."""
    loss = loss_of(method, weak) + loss_of(method, strong)
    close(loss, g["loss"])
    loss.backward()
    for rows, name in ((weak, "grad_weak"), (strong, "grad_strong")):
        assert rows.student.grad is not None
        close(rows.student.grad, g[name])


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_mlkd(case: str) -> None:
    g = golden("mlkd", case)
    weak, strong = rows_of(g, name="weak"), rows_of(g, "_strong", "strong")
    method = MLKD(published=True)
    close(loss_of(method, weak, "hard") + loss_of(method, strong, "hard"), g["loss_ce"])
    # the released "strong" sum holds the last two temperatures on the weak view
    soft = loss_of(method, weak, "soft") + loss_of(method, strong, "soft")
    close(soft, g["loss_kd_weak"] + g["loss_kd_strong"])
    close(loss_of(method, weak, "classes"), g["loss_cc_weak"])
    close(loss_of(method, weak, "batch"), g["loss_bc_weak"])
    close_on_both_views(method, weak, strong, g)
    kept, counted = counted_entries(weak)
    for i, tau in enumerate(method.temperatures):
        softened = soften(kept, counted, Static(tau)(weak))
        close(total({"kl": kl(weak, Static(tau)(weak))}, weak), g[f"kd_loss_T{i}"])
        close(mlkd_module.class_gram(softened, counted.any(0)), g[f"cc_loss_T{i}"])
        close(mlkd_module.batch_gram(softened, counted.any(1)), g[f"bc_loss_T{i}"])
    unsure, rare = mlkd_module.doubtful(weak.teacher, counted)
    assert (
        float(unsure.double().mean()) == g["mask_fraction"] and float(rare.double().mean()) == g["class_mask_fraction"]
    )


class Given(Policy):
    """Temperatures from elsewhere."""

    paper = "none: for tests"
    tau = 4.0

    def __init__(self, T: Tensor) -> None:
        super().__init__()
        self.T = T.unsqueeze(1)

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return Temperatures(self.T, self.T)


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_cskd(case: str) -> None:
    g = golden("cskd", case)
    weak, strong = rows_of(g, name="weak"), rows_of(g, "_strong", "strong")
    cosine = Cosine(4.0, low=2.0, high=6.0, eps=1e-8)
    close(cosine(weak).student.squeeze(1), g["temperatures"])
    alone = CSKD(hard=0.0, eps=1e-8, temperature=cosine)
    for name, key in (("fixed", "cs_fixed"), ("weighted", "cs_weighted")):
        loss = loss_of(alone, weak, name)
        close(loss, g[key])
        close(torch.autograd.grad(loss, weak.student)[0], g[f"grad_{key}"])
    close(torch.autograd.grad(loss_of(alone, weak), weak.student)[0], g["grad_cs_sum"])
    kept, counted = counted_entries(weak)
    for T, key in ((Static(4.0)(weak), "fixed"), (cosine(weak), "weighted")):
        softened = soften(kept, counted, T)
        close(cskd_module.class_grams(softened, 1e-8), g[f"cc_{key}"])
        close(cskd_module.batch_grams(softened, 1e-8), g[f"bc_{key}"])
    # as released, the strong view has the weak view's temperatures
    method = CSKD(gram=1.0, published=True, eps=1e-8, temperature=Given(g["temperatures"]))
    cs_weak, cs_strong = loss_of(method, weak, "fixed", "weighted"), loss_of(method, strong, "fixed", "weighted")
    close(cs_weak, g["loss_cs_weak"])
    close(cs_strong, g["loss_cs_strong"])
    close(loss_of(method, weak, "gram"), g["loss_cc_weak"] + g["loss_bc_weak"])
    close(loss_of(method, weak, "hard") + loss_of(method, strong, "hard"), g["loss_ce"])
    close_on_both_views(method, weak, strong, g)


def test_cosine_where_all_rows_are_alike() -> None:
    one = random_rows(1, 5)
    assert float(Cosine()(one).student) == 4.0 and float(Cosine(3.0)(one).teacher) == 3.0
    twice = Rows(one.student.expand(4, 5), one.teacher.expand(4, 5))
    assert Cosine()(twice).student.squeeze(1).tolist() == [4.0] * 4
    T = Cosine(low=1.0, high=9.0)(random_rows(8, 5)).student
    assert float(T.min()) == 1.0 and float(T.max()) == 9.0
    with pytest.raises(ValueError, match=r"Cosine needs low <= high; got low=7\.0 and high=6\.0"):
        Cosine(low=7.0)


def test_cskd_without_masks_weighs_the_whole_batch() -> None:
    rows = random_rows(8, 6)
    mended, published = CSKD(gram=1.0, hard=0.0), CSKD(gram=1.0, hard=0.0, published=True)
    for name, term in mended(rows).items():
        close(published(rows)[name], 0.5 * term)  # half of eight rows, and half of six classes
    strong = rows.replace(name="strong")
    assert set(mended(strong)) == {"fixed", "weighted"}
    close(published(strong)["fixed"], mended(strong)["fixed"])


# what the options change


def test_mlkd_masks_choose_rows() -> None:
    rows = random_rows(8, 6)
    rows.student.requires_grad_()
    method = MLKD(hard=0.0)
    unsure, rare = mlkd_module.doubtful(rows.teacher, torch.ones(8, 6, dtype=torch.bool))
    confidence = rows.teacher.softmax(1).amax(1)
    assert unsure.sum() == 4 and float(confidence[unsure].max()) < float(confidence[~unsure].min())
    assert rare.sum() == 3
    term = method(rows)["soft"]
    assert (term[~unsure] == 0).all() and (term[unsure] > 0).all()
    want = 0.9 * sum(kl(rows, Static(tau)(rows)) for tau in method.temperatures)
    close(term[unsure], want[unsure].detach())
    (gradient,) = torch.autograd.grad(term.sum(), rows.student)
    assert (gradient[~unsure] == 0).all() and gradient[unsure].abs().amax(1).min() > 0
    strong = rows.replace(name="strong")
    assert set(method(strong)) == {"soft"}
    close(method(strong)["soft"], want.detach())


def test_mlkd_on_a_policy() -> None:
    rows = random_rows(8, 6).replace(name="strong")
    on_policy = MLKD(hard=0.0, temperatures=(2.0, 4.0), temperature=Standardized(2.0, scale="tau"))
    want = sum(KD(soft=0.9, hard=0.0, temperature=Standardized(t, scale="tau"))(rows)["soft"] for t in (2.0, 4.0))
    close(on_policy(rows)["soft"], want)


def test_dist_ignores_scale_and_offset_of_probabilities() -> None:
    p = torch.rand(5, 7, dtype=torch.float64) + 0.5
    p = p / p.sum(1, keepdim=True)
    mixed = 0.4 * p + 0.6 / 7  # another distribution, a linear function of the first
    rows = Rows(mixed.log().requires_grad_(), p.log())
    terms = DIST(hard=0.0, temperature=Static(1.0))(rows)
    assert all(bool((term.abs() < 1e-14).all()) for term in terms.values())
    loss = total(DIST(hard=0.0, temperature=Static(4.0))(rows), rows)
    loss.backward()
    assert float(loss.detach()) > 1e-9


def test_unlikeness_of_lines_without_direction() -> None:
    a = Lines(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.1], [1.0, 1.0, 1.0]]), torch.zeros(3, 1))
    b = Lines(torch.tensor([[1.0, 0.2, 0.3], [1.0, 0.5, 0.1], [0.5, 0.5, 0.5]]), torch.zeros(3, 1))
    counted = torch.ones(3, 3, dtype=torch.bool)
    assert correlation_distance(a, b, counted, 1, centered=True).tolist() == [1.0, 0.0, 0.0]
    assert correlation_distance(a, b, counted, 1, centered=True, eps=1e-8)[0] == 1.0


def test_classes_that_underflow_keep_their_line() -> None:
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    far = torch.tensor([0.0, -3000.0, 0.0, 0.0], dtype=torch.float64)
    rows = Rows((student + far).requires_grad_(), teacher + far)
    method = R2KD(hard=0.0, order=0.0, temperature=Static(1.0))
    loss = loss_of(method, rows, "classes")
    loss.backward()
    assert rows.student.grad is not None and rows.student.grad.isfinite().all()
    assert float(rows.student.grad[:, 1].abs().min()) > 1e-6, "exp(-3000) is 0, and its class still teaches"


RELATIONAL = [
    DIST(),
    CSKD(gram=1.0),
    R2KD(),
    R2KD(rank="published"),
    MLKD(),
    MLKD(published=True),
    USKD(),
    LSKD(DIST(hard=0.0)),
]


@pytest.mark.parametrize("method", RELATIONAL, ids=lambda m: type(m).__name__)
def test_relational_methods_do_not_know_the_order_of_rows(method: Method) -> None:
    assert method.is_batch_dependent()
    rows = random_rows(9, 6, weighted=True)
    order = torch.randperm(9)

    def found(made: Rows) -> tuple[Tensor, Tensor]:
        leaf = made.student.clone().requires_grad_()
        made = made.replace(student=leaf)
        loss = loss_of(method, made)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    assert rows.target is not None and rows.weight is not None
    moved = Rows(rows.student[order], rows.teacher[order], rows.target[order], rows.weight[order])
    (loss, gradient), (again, turned) = found(rows), found(moved)
    close(again, loss)
    close(turned, gradient[order])


# the others need finite logits, as KD does
BLANKING = [method for method in RELATIONAL if not isinstance(method, USKD | LSKD)]


@pytest.mark.parametrize("method", BLANKING, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e300])
def test_rows_of_weight_zero_may_hold_anything(method: Method, garbage: float) -> None:
    rows = random_rows(6, 5)
    rows.student[2], rows.teacher[4] = garbage, garbage
    weight = torch.ones(6, dtype=torch.float64)
    weight[[2, 4]] = 0.0
    rows = rows.replace(weight=weight, student=rows.student.requires_grad_())
    kept = [0, 1, 3, 5]
    assert rows.target is not None
    fewer = Rows(rows.student[kept].detach(), rows.teacher[kept], rows.target[kept])
    # the labels' term alone is not blanked: it is a row's own
    soft = [name for name in method(fewer) if name != "hard"]
    loss = loss_of(method, rows, *soft)
    close(loss, loss_of(method, fewer, *soft))
    loss.backward()
    assert rows.student.grad is not None and rows.student.grad[kept].isfinite().all()
    assert (rows.student.grad[[2, 4]] == 0).all()


# ranks


def spearman(a: Tensor, b: Tensor) -> Tensor:
    counted = torch.ones_like(a, dtype=torch.bool)
    n = a.shape[1]
    return 1.0 - 6.0 * (hard_ranks(a, counted) - hard_ranks(b, counted)).square().sum(1) / (n * (n**2 - 1))


def test_soft_ranks_have_a_gradient_and_order_like_spearman() -> None:
    rows = random_rows(200, 20)
    # from unrelated to nearly equal
    mixed = torch.lerp(rows.student, rows.teacher, torch.linspace(0.0, 1.0, 200, dtype=torch.float64)[:, None])
    rows = rows.replace(student=mixed.requires_grad_())
    want = spearman(mixed.detach(), rows.teacher)
    term = R2KD(value=0.0, order=1.0, hard=0.0)(rows)["order"]
    ordered = spearman((1.0 - term.detach())[None], want[None])
    assert float(ordered) > 0.995
    (gradient,) = torch.autograd.grad(term.sum(), rows.student)
    assert gradient.isfinite().all() and float(gradient[:-1].abs().amax(1).min()) > 1e-4
    close((gradient * mixed.detach()).sum(1), torch.zeros(200, dtype=torch.float64), atol=1e-8)  # no say in the scale
    sharp = R2KD(value=0.0, order=1.0, hard=0.0, softness=1e-6)(rows)["order"]
    close(1.0 - sharp, want, rtol=0.0, atol=1e-4)
    published = R2KD(value=0.0, order=1.0, hard=0.0, rank="published", temperature=Static(1.0))(rows)["order"]
    close(1.0 - published, want, rtol=0.0, atol=1e-9)
    assert not published.requires_grad


def test_training_by_ranks_alone_orders_the_classes() -> None:
    rows = random_rows(16, 10)
    student = rows.student.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    method = R2KD(value=0.0, order=1.0, hard=0.0)
    before = spearman(student.detach(), rows.teacher).mean()
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(method, rows.replace(student=student)).backward()
        optimizer.step()
    assert float(before) < 0.2 and float(spearman(student.detach(), rows.teacher).mean()) > 0.8


def test_soft_ranks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    counted = torch.ones(7, 5, dtype=torch.bool)
    counted[2, 3] = False

    def found() -> tuple[Tensor, Tensor]:
        ranks = soft_ranks(z, counted, 0.1)
        return ranks.detach(), torch.autograd.grad((ranks * torch.arange(5.0)).sum(), z)[0]

    whole = found()
    monkeypatch.setattr(r2kd_module, "PAIRS", 50)
    for got, want in zip(found(), whole, strict=True):
        close(got, want)
    assert whole[0][2, 3] == 0 and whole[1][2, 3] == 0


# single methods


def test_ttm_is_kd_with_a_renyi_entropy() -> None:
    """Equation 15 of the paper: D(p_T || q) = T D(p_T || q_T) - (T - 1) H_1/T(q) + (T - 1) H(p_T)."""
    rows, T = random_rows(5, 6), 3.0
    plain = kl(rows, Static(T)(rows)) / T**2
    q = rows.student.softmax(1)
    renyi = (q ** (1.0 / T)).sum(1).log() / (1.0 - 1.0 / T)
    got = TTM(soft=1.0, hard=0.0, temperature=Static(T))(rows)["soft"]
    close(got, T * plain - (T - 1.0) * renyi + (T - 1.0) * entropy(rows.teacher / T))
    weighed = WTTM(soft=1.0, hard=0.0, temperature=Static(T))(rows)["soft"]
    close(weighed, got * (rows.teacher.softmax(1) ** (1.0 / T)).sum(1))
    assert "soft" in TTM()(rows.replace(student=rows.student + 7.0)) and TTM(warmup=0.5)(rows, 0.25)["soft"].equal(
        TTM()(rows)["soft"] * 0.5
    )


def test_lskd_is_kd_at_standardized_temperatures_with_another_gradient() -> None:
    rows = random_rows(5, 6)
    rows.student.requires_grad_()
    ours, policy = LSKD(eps=0.0), KD(soft=9.0, hard=0.1, temperature=Standardized(2.0, scale="tau"))
    close(loss_of(ours, rows), loss_of(policy, rows).detach())
    (gradient,) = torch.autograd.grad(loss_of(LSKD(hard=0.0), rows), rows.student)
    along = (gradient * rows.student.detach()).sum(1)
    assert float(along.abs().max()) < 1e-6 < float(gradient.abs().max()), "no say in the row's scale"
    (held,) = torch.autograd.grad(loss_of(policy, rows, "soft"), rows.student)
    assert float((held * rows.student.detach()).sum(1).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"LSKD: KD\(hard=0.1\) would apply its hard term to standardized logits"):
        LSKD(KD())
    with pytest.raises(TypeError, match="LSKD needs a method over rows"):
        LSKD(Static(2.0))  # pyright: ignore[reportArgumentType]
    assert not LSKD(TTM(hard=0.0)).zero_when_equal and LSKD().zero_when_equal


def test_nkd_leaves_its_minimum_at_the_teacher() -> None:
    rows = random_rows(6, 5)
    student = rows.teacher.clone().requires_grad_()
    agreeing = rows.replace(student=student)
    loss_of(NKD(hard=0.0, target=0.0), agreeing, "non_target").backward()
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-12
    assert rows.target is not None
    is_label = one_hot(rows.target, rows.teacher)
    own = drop_classes(rows.teacher, is_label)
    close(NKD(non_target=1.0)(agreeing)["non_target"], soft_cross_entropy(own, own))
    two = Rows(torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, IGNORE_INDEX]))
    assert NKD()(two)["non_target"].tolist() == [0.0, 0.0, 0.0]


def test_rld_leaves_out_what_a_wrong_teacher_says() -> None:
    teacher = torch.tensor([[1.0, 4.0, 0.5, 0.2]], dtype=torch.float64)  # sure of class 1, and the label is 0
    student = torch.tensor([[3.0, 1.0, 0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    rows = Rows(student, teacher, torch.tensor([0]))
    terms = RLD(sample=1.0, masked=1.0, hard=0.0, warmup=0.0, temperature=Static(1.0))(rows)
    pair_t, pair_s = teacher.softmax(1)[0, 1], student.softmax(1)[0, 0]
    want = pair_t * (pair_t / pair_s).log() + (1 - pair_t) * ((1 - pair_t) / (1 - pair_s)).log()
    close(terms["sample"], want.detach()[None])
    below = Rows(student[:, 2:], teacher[:, 2:])
    close(terms["masked"], kl(below, Static(1.0)(below)).detach())
    total(terms, rows).backward()
    lowest = Rows(student.detach(), -teacher, torch.tensor([1]))
    assert float(RLD()(lowest)["masked"]) == 0.0, "nothing is below the label"


def test_ats_softens_the_label_more() -> None:
    rows = random_rows(4, 5)
    assert rows.target is not None
    student = rows.student.requires_grad_()
    scale = torch.full_like(rows.teacher, 2.0)
    scale[torch.arange(4), rows.target] = 4.0
    p = (rows.teacher / scale).softmax(1)
    released = 0.5 * -(p * student.log_softmax(1)).sum(1).mean() + 0.5 * cross_entropy(rows).mean()
    loss = loss_of(ATS(centered=False), rows)
    close(loss, (released + 0.5 * (p * p.log()).sum(1).mean()).detach())
    (want,), (got,) = torch.autograd.grad(released, student), torch.autograd.grad(loss, student)
    close(got, want)
    moved = rows.replace(teacher=rows.teacher + 5.0)
    assert abs(float(loss_of(ATS(centered=False), moved).detach()) - float(loss.detach())) > 1e-3
    close(loss_of(ATS(), moved), loss_of(ATS(), rows).detach())
    at_three = ATS(centered=False, temperature=Static(3.0))(rows)["soft"]
    q = (student / 3.0).log_softmax(1)
    close(at_three, (4.5 * (p * (p.log() - q)).sum(1)).detach())  # the policy is the student's


def test_erkd_weighs_by_the_teachers_entropy() -> None:
    rows = random_rows(5, 6)
    T = Sharpness(4.0)
    want = entropy(rows.teacher / 4.0) * KD(soft=0.9, hard=0.0, temperature=T)(rows)["soft"]
    close(ERKD(temperature=T)(rows)["soft"], want)


# USKD


def test_uskd_by_hand() -> None:
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    rows = Rows(student, student.detach(), torch.tensor([0, 1]))
    p = student.detach().softmax(1)
    sure = torch.stack((p[0, 0], p[1, 1])).square()
    terms = USKD(target=1.0, non_target=1.0)(rows)
    close(terms["target"], -(sure + 1.0 - sure.mean()) * torch.stack((p[0, 0], p[1, 1])).log())
    zipf = torch.tensor([1.0, 1 / 2, 1 / 3], dtype=torch.float64)
    zipf = zipf / zipf.sum()
    others = student.detach()[:, [1, 2, 3]][0].log_softmax(0), student.detach()[1, [3, 2, 0]].log_softmax(0)
    close(terms["non_target"], -torch.stack([(zipf * x).sum() for x in others]))
    published = torch.tensor([1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    published = published / published.sum()  # the label takes the first rank
    want = -torch.stack([(published * x).sum() for x in others])
    close(USKD(non_target=1.0, ranks="published")(rows)["non_target"], want)
    total(terms, rows).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_uskd_weak_head() -> None:
    rows = random_rows(6, 5, dtype=torch.float32)
    feature = torch.randn(6, 4, 3, 3, requires_grad=True)
    rows = rows.replace(features={"early": (feature, feature.detach())}, student=rows.student.requires_grad_())
    method = USKD(names=["early"], weak=0.1)
    with pytest.raises(RuntimeError, match=r"call method.setup\(rows\) with a first block"):
        method(rows)
    assert not method.param_groups()
    method.setup(rows)
    assert len(method.param_groups()[0]["params"]) == 2
    terms = method(rows)
    assert set(terms) == {"target", "non_target", "weak", "hard"}
    total(terms, rows).backward()
    assert method.head is not None and feature.grad is not None
    assert float(method.head.weight.grad.abs().max()) > 0 and float(feature.grad.abs().max()) > 0  # pyright: ignore
    # its prediction changes the ranks, and only the head's own loss teaches it
    (gradient,) = torch.autograd.grad(
        total({"non_target": method(rows)["non_target"]}, rows), method.head.weight, allow_unused=True
    )
    assert gradient is None
    with pytest.raises(ValueError, match=r"reads the feature 'late', and Rows\(name='logits'\) has \['early'\]"):
        USKD(names=["late"]).setup(rows)
    with pytest.raises(ValueError, match="USKD reads one feature at most"):
        USKD(names=["a", "b"])


def test_uskd_needs_no_teacher() -> None:
    from tempering import distill

    torch.manual_seed(0)
    x = torch.randn(64, 6)
    batches = [(x[i : i + 16], (x[i : i + 16, :3]).argmax(1)) for i in range(0, 64, 16)]
    student = torch.nn.Linear(6, 3)
    run = distill(
        student,
        None,
        batches,
        method=USKD(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        epochs=8,
        validation=batches,
        quiet=True,
    )
    accuracy = [epoch["validation"]["accuracy"] for epoch in run.epochs]
    assert accuracy[-1] > 0.85 > accuracy[0] - 0.3


# words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DIST(inter=-1.0), "DIST needs inter >= 0 and finite; got -1.0"),
        (lambda: TTM(warmup=20.0), "TTM needs warmup in \\[0, 1\\], the share of the run"),
        (lambda: WTTM(soft=-2.0), "WTTM needs soft >= 0"),
        (lambda: R2KD(rank="hard"), "R2KD needs rank 'soft' or 'published'; got 'hard'"),  # pyright: ignore
        (lambda: R2KD(softness=0.0), "R2KD needs softness > 0"),
        (lambda: USKD(ranks="mine"), "USKD needs ranks 'mended' or 'published'; got 'mine'"),  # pyright: ignore
        (lambda: MLKD(temperatures=()), "MLKD needs at least one of temperatures"),
        (lambda: ATS(correct=0.0), "ATS needs correct > 0"),
        (lambda: RLD(tau=-1.0), "RLD needs tau > 0"),
    ],
)
def test_what_constructors_refuse(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_row_unlikeness_is_one_less_the_cosine() -> None:
    rows = random_rows(5, 6)
    kept, counted = counted_entries(rows)
    both = soften(kept, counted, Static(2.0)(rows))
    p, q = (rows.student / 2.0).softmax(1), (rows.teacher / 2.0).softmax(1)
    close(row_distance(both, centered=False, eps=0.0), 1.0 - torch.cosine_similarity(p, q))


@pytest.mark.parametrize("progress", [0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_dtkd_at_one_temperature_is_kd_at_its_total_weights(tau: float, progress: float) -> None:
    """The control of every table: DTKD with both temperatures forced to tau, loss and gradient, warm-up included."""
    found = []
    for method in (
        DTKD(temperature=Static(tau)),
        KD(soft=4.0, hard=1.0, warmup=20 / 240, temperature=Static(tau)),
    ):
        rows = random_rows(30, 10, weighted=True)
        student = rows.student.clone().requires_grad_()
        rows = rows.replace(student=student)
        loss = total(method(rows, progress), rows)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert found[0][1].abs().max() > 0
