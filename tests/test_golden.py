"""Numbers of the authors' own code (KD, DKD, DTKD, NormKD, LSKD) and of an independent exact solution, reproduced.

Tolerances are those of ../shared/golden/README.md: float64 to 1e-9; gradients stored as float32 to their rounding;
results that the originals computed in float32 to 1e-5.
"""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tempering.methods import DKD, DTKD, KD, Method
from tempering.methods.base import linear_warmup
from tempering.objectives import cross_entropy, kl
from tempering.rows import Rows, total
from tempering.temperature import Sharpness, Standardized, Static, Temperatures
from tests.paths import SHARED, needs_shared

pytestmark = needs_shared


class Case:
    """One case of one file: its arrays by name, its settings, and its rows."""

    def __init__(self, file: str, name: str) -> None:
        arrays = archive(file)
        self.values = {k.split("__", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}__")}
        self.config = json.loads(str(self.values.pop("config")))
        self.seen: set[str] = set()

    def rows(self, dtype: torch.dtype = torch.float64, row: int | None = None) -> Rows:
        part = slice(None) if row is None else slice(row, row + 1)
        student, teacher = (torch.tensor(self.values[f"{who}_logits"][part]) for who in ("student", "teacher"))
        target = torch.tensor(self.values["labels"][part]) if "labels" in self.values else None
        return Rows(student.to(dtype).requires_grad_(), teacher.to(dtype), target)

    def agree(self, key: str, got: Tensor) -> None:
        """``got`` is the number stored under ``key``, as exactly as it was stored."""
        self.seen.add(key)
        want = torch.as_tensor(self.values[key])
        stored = want.dtype == torch.float32
        rtol, atol = (1e-5, 1e-6) if key.endswith("_f32") else (2e-6, 1e-7) if stored else (1e-9, 1e-11)
        torch.testing.assert_close(
            got.detach().squeeze(-1) if got.ndim > want.ndim else got.detach(),
            want,
            rtol=rtol,
            atol=atol,
            check_dtype=False,
            msg=lambda text: f"{key}: {text}",
        )

    def agree_with_gradient(self, key: str, grad: str, value: Tensor, rows: Rows) -> None:
        self.agree(key, value)
        if grad in self.values:  # the files of 1000 classes leave some out
            self.agree(grad, torch.autograd.grad(value, rows.student, retain_graph=True)[0])

    def all_seen(self, *others: str) -> None:
        """Every stored number was compared, but for ``others``: so a slip in a key cannot pass."""
        assert set(self.values) - self.seen - {"student_logits", "teacher_logits", "labels", *others} == set()


@cache
def archive(file: str) -> dict[str, np.ndarray]:
    with np.load(SHARED / "golden" / f"{file}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def cases(file: str, *names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param((file, name), id=name) for name in names], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def gap(rows: Rows, T: Temperatures) -> Tensor:
    """How much sharper the teacher still is, (N,): logsumexp(u / T_t) - logsumexp(v / T_s), centered."""
    u, v = centered(rows.teacher) / T.teacher, centered(rows.student) / T.student
    return torch.logsumexp(u, -1) - torch.logsumexp(v, -1)


def term(method: Method, rows: Rows, name: str, progress: float = 1.0) -> Tensor:
    return total({name: method(rows, progress)[name]}, rows)


def test_every_case_is_read() -> None:
    seen = {file: {k.split("__")[0] for k in archive(file)} - {"meta"} for file in ("kd", "dkd")}
    seen |= {file: {k.split("__")[0] for k in archive(file)} - {"meta"} for file in ("dtkd_published", "dtkd_exact")}
    assert seen == {
        "kd": set(KD_CASES),
        "dkd": {*DKD_CASES, "nan_region"},
        "dtkd_published": {*DTKD_CASES, "fail"},
        "dtkd_exact": set(EXACT_CASES),
    }


KD_CASES = ("c10_a", "c10_b", "c100_a", "c100_b", "c1000_a", "c1000_b")
DKD_CASES = ("c10", "c100", "c1000", "c100_T1", "tckd_only", "nckd_only")
DTKD_CASES = ("c10", "c100", "c1000", "c100_T1")
EXACT_CASES = ("c10", "c100", "c1000", "c100_T1", "c100_T8", "offset", "extreme")
IMPLICIT = {"grad_implicit", "ddelta_dstudent", "ddelta_dteacher", "fd_index", "fd_student", "fd_teacher"}
HELD = {"delta_rho", "loss_rho", "residual_rho"}


@cases("kd", *KD_CASES)
def test_kd(case: Case) -> None:
    c, rows = case.config, case.rows()
    T = Static(c["temperature"])
    method = KD(soft=c["kd_weight"], hard=c["ce_weight"], temperature=T)
    case.agree_with_gradient("kd_unweighted", "grad_kd_unweighted", total({"kl": kl(rows, T(rows))}, rows), rows)
    case.agree("loss_kd", term(method, rows, "soft"))
    case.agree("loss_ce", term(method, rows, "hard"))
    case.agree_with_gradient("loss", "grad", total(method(rows, 1.0), rows), rows)
    single = case.rows(torch.float32)
    case.agree("kd_unweighted_f32", total({"kl": kl(single, T(single))}, single))
    case.all_seen()


@cases("dkd", *DKD_CASES)
def test_dkd(case: Case) -> None:
    c, rows = case.config, case.rows()
    T = Static(c["temperature"])
    progress, warmup = c["epoch"] / 240, c["warmup_epochs"] / 240
    parts = DKD(target=1.0, non_target=1.0, hard=1.0, warmup=0.0, temperature=T)
    case.agree_with_gradient("tckd", "grad_tckd", term(parts, rows, "target"), rows)
    case.agree_with_gradient("nckd", "grad_nckd", term(parts, rows, "non_target"), rows)
    whole = DKD(target=c["alpha"], non_target=c["beta"], hard=0.0, warmup=0.0, temperature=T)
    case.agree_with_gradient("dkd", "grad_dkd", total(whole(rows, 1.0), rows), rows)
    warm = DKD(target=c["alpha"], non_target=c["beta"], hard=c["ce_weight"], warmup=warmup, temperature=T)
    soft = term(warm, rows, "target", progress) + term(warm, rows, "non_target", progress)
    case.agree("loss_dkd_warm", soft)
    # loss_ce is the weighted part: 0 where the weight is, and then the method has no such term at all
    assert ("hard" in warm(rows, progress)) == bool(c["ce_weight"])
    case.agree("loss_ce", c["ce_weight"] * total({"hard": cross_entropy(rows)}, rows))
    case.agree_with_gradient("loss", "grad", total(warm(rows, progress), rows), rows)
    single = case.rows(torch.float32)
    case.agree("dkd_f32", total(whole(single, 1.0), single))
    case.all_seen()


@cases("dkd", "nan_region")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_dkd_where_the_released_code_is_not_finite(case: Case, dtype: torch.dtype) -> None:
    """Margins over T of 60 to 1000: the released code ends in inf or NaN, in float32 from about 104 on."""
    c, rows = case.config, case.rows(dtype)
    method = DKD(target=c["alpha"], non_target=c["beta"], hard=0.0, warmup=0.0, temperature=Static(c["temperature"]))
    terms = method(rows, 1.0)
    loss = terms["target"] + terms["non_target"]
    (grad,) = torch.autograd.grad(loss.sum(), rows.student)
    released = case.values["loss" if dtype == torch.float64 else "loss_f32"]
    assert not np.isfinite(released).all(), "this case is about rows the released code cannot do"
    assert loss.isfinite().all() and grad.isfinite().all()
    wanted = {
        "loss": (loss, case.values["loss_stable"]),
        "grad": (grad, case.values["grad_stable"]),
        "target": (terms["target"], c["alpha"] * case.values["tckd_stable"]),
        "non_target": (terms["non_target"], case.values["nckd_stable"]),
    }
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (1e-5, 1e-6)
    for name, (got, want) in wanted.items():
        torch.testing.assert_close(
            got.detach().double(),
            torch.tensor(want),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@cases("dtkd_published", *DTKD_CASES)
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "detached"])
def test_dtkd_as_released(case: Case, attached: bool) -> None:
    c, rows = case.config, case.rows()
    progress, warmup = c["epoch"] / 240, c["warmup_epochs"] / 240
    assert linear_warmup(progress, warmup) == pytest.approx(c["warmup_factor"], rel=1e-12)
    policy = Sharpness(c["temperature"], solve="published", differentiable=attached, reach=1.0)
    T = policy(rows)
    case.agree("T_student", T.student)
    case.agree("T_teacher", T.teacher)
    assert T.student.requires_grad == T.teacher.requires_grad == attached
    case.agree("per_sample_kl", kl(rows, T) / T.scale)
    parts = DTKD(dynamic=1.0, soft=1.0, hard=1.0, warmup=0.0, temperature=policy)
    suffix = "" if attached else "_detached"
    case.agree_with_gradient("part_dtkd", f"grad_part_dtkd{suffix}", term(parts, rows, "dynamic"), rows)
    case.agree_with_gradient("part_kd", "grad_part_kd", term(parts, rows, "soft"), rows)
    case.agree_with_gradient("part_ce", "grad_part_ce", term(parts, rows, "hard"), rows)
    weights = {"dynamic": c["alpha"], "soft": c["beta"], "hard": c["ce_weight"]}
    method = DTKD(**weights, warmup=warmup, temperature=policy)
    case.agree_with_gradient("loss", f"grad{suffix}", total(method(rows, progress), rows), rows)
    single = case.rows(torch.float32)
    case.agree("part_dtkd_f32", term(parts, single, "dynamic"))
    case.agree("loss_f32", total(method(single, progress), single))
    case.all_seen(*(("grad", "grad_part_dtkd") if not attached else ("grad_detached", "grad_part_dtkd_detached")))
    assert int(policy.report()["fallback"]) == 0


@cases("dtkd_published", "fail")
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "detached"])
def test_dtkd_where_the_released_code_fails(case: Case, attached: bool) -> None:
    """Zero, negative and tiny maxima: ours is finite, positive, and says how many rows fell back to tau."""
    c = case.config
    for i, name in enumerate(c["names"]):
        rows = case.rows(row=i)
        policy = Sharpness(c["temperature"], solve="published", differentiable=attached)
        method = DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0, temperature=policy)
        T_s, T_t = (float(case.values[f"T_{who}"][i]) for who in ("student", "teacher"))
        # two rows of one sign, both negative: the released temperatures are positive and in the wrong order
        served = bool(rows.student.max() > 0) and bool(rows.teacher.max() > 0)
        if served:
            loss = total(method(rows, 1.0), rows)
        else:
            with pytest.warns(UserWarning, match="1 of 1 rows have a maximum logit that is not positive"):
                loss = total(method(rows, 1.0), rows)
        loss.backward()
        T = policy.last
        assert T is not None and rows.student.grad is not None, name
        assert loss.isfinite() and bool(loss >= 0) and rows.student.grad.isfinite().all(), name
        assert float(T.student) + float(T.teacher) == pytest.approx(2 * c["temperature"], rel=1e-12), name
        assert int(policy.report()["fallback"]) == (not served), name
        released = np.isfinite(case.values["loss"][i]) and case.values["loss"][i] >= 0 and T_s > 0 and T_t > 0
        if not released:
            assert not served, f"{name}: the released code fails here, so the row must have fallen back"
            assert float(T.student) == float(T.teacher) == c["temperature"], name
        held = min(T_s, T_t) < 0.1 * c["temperature"]
        assert int(policy.report()["clamped"]) == (served and held), name
        if served and not held:
            case_value = torch.tensor(case.values["loss"][i])
            torch.testing.assert_close(loss.detach(), case_value, rtol=1e-9, atol=1e-11)
            if attached:
                want = torch.tensor(case.values["grad"][i : i + 1])
                torch.testing.assert_close(rows.student.grad, want, rtol=1e-9, atol=1e-11)
    assert {"ordinary", "student_all_zero", "sum_zero", "student_max_negative"} <= set(c["names"])


@cases("dtkd_exact", *EXACT_CASES)
def test_dtkd_exact(case: Case) -> None:
    c, rows = case.config, case.rows()
    policy = Sharpness(c["tau"], reach=1.0)
    T = policy(rows)
    case.agree("delta", c["tau"] - T.student)
    case.agree("sharpness", torch.logsumexp(centered(rows.student) / T.student, -1))
    assert gap(rows, T).abs().max() < 1e-13
    case.agree("T_teacher", T.teacher)
    case.agree("T_student", T.student)
    assert not T.student.requires_grad
    case.agree("per_sample_kl", kl(rows, T) / T.scale)
    case.agree_with_gradient("loss", "grad_detached", total({"kl": kl(rows, T)}, rows), rows)
    assert {name: int(n) for name, n in policy.report().items()} == {"fallback": 0, "clamped": 0}
    case.agree("gap_at_delta0", gap(rows, Static(c["tau"])(rows)))
    case.all_seen("residual", "slope", *IMPLICIT, *HELD)


@cases("dtkd_exact", *EXACT_CASES)
def test_dtkd_exact_with_its_implicit_gradient(case: Case) -> None:
    c, rows = case.config, case.rows()
    T = Sharpness(c["tau"], reach=1.0, differentiable=True)(rows)
    case.agree_with_gradient("loss", "grad_implicit", total({"kl": kl(rows, T)}, rows), rows)
    # a row's delta depends on its own logits alone, so the sum's gradient is the rows' own
    (slope,) = torch.autograd.grad((T.teacher - c["tau"]).sum(), rows.student)
    case.agree("ddelta_dstudent", slope)
    for (row, column), want in zip(case.values["fd_index"], case.values["fd_student"], strict=True):
        assert float(slope[row, column]) == pytest.approx(float(want), rel=1e-6, abs=1e-9)
    assert case.seen - {"loss"} <= IMPLICIT


@cases("dtkd_exact", *EXACT_CASES)
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "detached"])
def test_dtkd_exact_held_at_its_reach(case: Case, attached: bool) -> None:
    c, rows = case.config, case.rows()
    policy = Sharpness(c["tau"], reach=c["rho"], differentiable=attached)
    T = policy(rows)
    case.agree("delta_rho", T.teacher - c["tau"])
    case.agree("loss_rho", total({"kl": kl(rows, T)}, rows))
    case.agree("residual_rho", gap(rows, T))
    beyond = np.abs(case.values["delta"]) > c["rho"] * c["tau"]
    assert int(policy.report()["clamped"]) == beyond.sum()
    if attached:
        (slope,) = torch.autograd.grad(T.teacher.sum(), rows.student)
        assert (slope[torch.tensor(beyond)] == 0).all(), "a delta that is held does not move"
        assert (slope[torch.tensor(~beyond)] != 0).any(-1).all()


@cases("logit_methods", "c10", "c100")
def test_standardized_temperatures(case: Case) -> None:
    """NormKD and logit standardization, alone and on DKD; NormKD's gradient flows through the student's deviation."""
    c, rows = case.config, case.rows()
    normal = Standardized(c["normkd_t"], scale="teacher", differentiable=True)
    T = normal(rows)
    case.agree("normkd_T_student", T.student)
    case.agree("normkd_T_teacher", T.teacher)
    dkd = {"target": c["dkd_alpha"], "non_target": c["dkd_beta"], "hard": 0.0, "warmup": 0.0}
    for name, method in (
        ("normkd", KD(soft=1.0, hard=0.0, temperature=normal)),
        ("normkd_dkd", DKD(**dkd, temperature=normal)),
    ):
        loss = total(method(rows), rows)
        case.agree(name, loss)
        case.agree(f"grad_{name}", torch.autograd.grad(loss, rows.student)[0])
    plain = Standardized(c["lskd_T"], scale="tau")
    loss = total(KD(soft=1.0, hard=0.0, temperature=plain)(rows), rows)
    loss.backward()
    # the released code divides by 1e-7 + std
    torch.testing.assert_close(loss.detach(), torch.tensor(case.values["lskd_kd"]), rtol=1e-6, atol=0.0)
    found = total(DKD(**dkd, temperature=plain)(rows), rows).detach()
    torch.testing.assert_close(found, torch.tensor(case.values["lskd_dkd"]), rtol=1e-6, atol=0.0)
    spreads = rows.student.detach().std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(Standardized(3.0, ddof=0)(rows).student, 3.0 * spreads)
