"""The fast paths, held to the plain loss: values, gradients, masks, weights, half precision, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.kernels import chunked, linear, linear_loss
from tempering.kernels import compiled as compiling
from tempering.methods import DIST, DKD, DTKD, KD, KDIGA, LSKD, MGD, Method, Sum, Swing
from tempering.objectives import kl
from tempering.rows import Rows, total
from tempering.teachers.outputs import Head
from tempering.temperature import Capped, Cosine, Curriculum, Entropy, Sharpness, Standardized, Static
from tests.conftest import random_rows
from tests.contract import CASES, block, copied, leaves, on_each, same
from tests.forked import run_parts
from tests.paths import ROOT

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)"),
    pytest.mark.filterwarnings(r"ignore:Curriculum's temperature is at a bound"),
]
# MGD draws its masks a call, and chunks are several calls: another draw of the same loss
ROW_WISE = [(name, part) for name, part in CASES if not part.is_batch_dependent() and not isinstance(part, MGD)]
METHODS = [
    KD(temperature=Sharpness(4.0)),
    KD(hard=0.0, temperature=Standardized(scale="tau")),
    DTKD(warmup=0.0),
    DTKD(warmup=0.0, temperature=Sharpness(3.0, solve="published")),
    Sum(KD(hard=0.0), DKD()),
]
FIRST = list({type(part): (name, part) for name, part in reversed(ROW_WISE)}.values())  # of each method
ids = [f"{type(m).__name__}{i}" for i, m in enumerate(METHODS)]


def one_row(rows: Rows) -> int:
    return 8 * rows.student.shape[1] * 8 * 2  # bytes of two rows' copies in float64


def plain(method: Method, rows: Rows, progress: float = 1.0, **whole: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, slopes in the rows' leaves, slopes in what the method trains."""
    rows, wanted = leaves(rows)
    loss = total(method(rows, progress), rows, **whole)
    return loss.detach(), *gradients(loss, method, wanted)


def in_chunks(
    method: Method, rows: Rows, progress: float = 1.0, **how: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rows, wanted = leaves(rows)
    how.setdefault("memory", one_row(rows))
    loss = chunked(method, rows, progress, **how).loss
    return loss.detach(), *gradients(loss, method, wanted)


def gradients(loss: Tensor, method: Method, wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    trained = [p for p in method.parameters() if p.requires_grad]
    found = torch.autograd.grad(3.0 * loss, [*wanted, *trained], allow_unused=True, materialize_grads=True)
    return list(found[: len(wanted)]), list(found[len(wanted) :])


@on_each("method", ROW_WISE, lambda method: method)
def test_every_row_wise_method_and_policy(method: Method) -> None:
    rows = block(7, weighted=True)
    check_chunks(method, rows.replace(weight=rows.weight * torch.tensor([1.0, 0, 1, 1, 0, 0, 1]).double()))


@on_each(
    "method", list({type(part): (name, part) for name, part in reversed(ROW_WISE)}.values()), lambda method: method
)
def test_every_row_wise_method_without_weights(method: Method) -> None:
    check_chunks(method, block(7))


def check_chunks(method: Method, rows: Rows) -> None:
    """Loss, gradients in logits, features and parameters, terms, and what the policy says of itself."""
    method.setup(rows)
    method.double()
    again = copied(method)
    found = []
    for made, run in ((again, partial(chunked, memory=one_row(rows))), (method, whole)):
        leaf, wanted = leaves(rows)
        result = run(made, leaf, 0.3)
        slopes = gradients(result.loss, made, wanted)
        terms = {name: term.detach() for name, term in result.terms.items()}
        found.append((result.loss.detach(), *slopes, terms))
    same(found[0], found[1], 1e-10, 1e-12)
    same(dict(again.state_dict()), dict(method.state_dict()))
    for name, policy in method.policies().items():
        if policy.last is not None:
            same(tuple(again.policies()[name].last or ()), tuple(policy.last))
        same(again.policies()[name].report(), policy.report())


def whole(method: Method, rows: Rows, progress: float) -> Any:
    terms = method(rows, progress)
    return SimpleNamespace(loss=total(terms, rows), terms=terms)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_masks_padding_constants_and_large_logits(method: Method) -> None:
    rows = random_rows(9, 11, weighted=True, scale=3.0)
    student, teacher = rows.student.clone(), rows.teacher.clone()
    for z in (student, teacher):
        z[:, 8:] = -torch.inf  # a padded vocabulary
        z[2, :4] = -torch.inf
        z[3] = -torch.inf
        z[4, :8] = 1.0
        z[5] *= 1e4 / 3
        z[6, 1:8] = -torch.inf
    target = torch.tensor([0, -100, 5, 1, 2, 3, 0, -1, 7])
    made = rows.replace(student=student, teacher=teacher, target=target)
    got, want = in_chunks(method, made), plain(method, made)
    same(got, want, 1e-9, 1e-11)
    assert all(g.isfinite().all() for g in got[1])


def test_the_kl_itself() -> None:
    """objectives.kl + total, to the last bits, with one temperature and with one a row and side."""
    rows = random_rows(50, 30, weighted=True)
    rows = rows.replace(weight=rows.weight * (torch.arange(50) % 3 > 0))  # pyright: ignore
    for policy in (Static(2.0), Sharpness(4.0), Standardized(), Entropy(), Capped(Sharpness(4.0))):
        made, wanted = leaves(rows)
        loss = total({"soft": kl(made, policy(made, 1.0).detached())}, made)
        slope = torch.autograd.grad(loss, wanted)
        got = in_chunks(KD(soft=1.0, hard=0.0, temperature=policy), rows)
        same(got[0], loss.detach(), 1e-13, 1e-14)
        same(got[1][0], 3.0 * slope[0], 1e-12, 1e-14)
        assert not got[1][0][rows.weight == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS[:3], ids=ids[:3])
def test_half_precision_is_computed_in_float32(method: Method, dtype: torch.dtype) -> None:
    """As the same numbers in float32; the gradient is rounded once, tails included."""
    rows = random_rows(40, 1000, dtype=dtype, scale=6.0)
    wide = rows.replace(student=rows.student.float(), teacher=rows.teacher.float())
    loss, (slope,), _ = in_chunks(method, rows, memory=2**16)
    want, (exact,), _ = in_chunks(method, wide, memory=2**16)
    same(loss, want, 1e-6, 0.0)
    assert slope.dtype == dtype
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert bool(((slope.double() - exact.double()).abs() <= 2 * eps * exact.double().abs() + tiny).all())
    value, (dense,), _ = plain(method, wide)
    same((want, exact), (value, dense), 1e-4, 1e-7)


def test_rows_of_weight_0_may_hold_anything() -> None:
    rows = random_rows(6, 5, weighted=True)
    student, weight = rows.student.clone(), rows.weight.clone()  # pyright: ignore
    student[2], student[4], weight[2], weight[4] = torch.nan, torch.inf, 0.0, 0.0
    got = in_chunks(DTKD(temperature=Static(4.0)), rows.replace(student=student, weight=weight))
    kept = in_chunks(DTKD(temperature=Static(4.0)), rows.replace(weight=weight))
    same(got, kept)
    nothing = in_chunks(KD(), rows.replace(weight=torch.zeros(6).double()))
    assert nothing[0] == 0.0 and not nothing[1][0].any()


@pytest.mark.parametrize(("n", "classes"), [(0, 5), (1, 1), (3, 1), (1, 7)])
def test_small_shapes(n: int, classes: int) -> None:
    rows = random_rows(n, classes)
    for memory in (1, 2**20):
        same(
            in_chunks(KD(temperature=Sharpness(4.0)), rows, memory=memory), plain(KD(temperature=Sharpness(4.0)), rows)
        )


def test_the_parts_of_a_step_add_up() -> None:
    rows = random_rows(8, 5, weighted=True)
    whole = plain(DTKD(), rows)
    halves = [
        in_chunks(
            DTKD(),
            Rows(*(x[p] for x in (rows.student, rows.teacher, rows.target, rows.weight))),
            normalizer=rows.total_weight,
        )
        for p in (slice(0, 3), slice(3, 8))
    ]
    same(sum(h[0] for h in halves), whole[0])
    same(torch.cat([h[1][0] for h in halves]), whole[1][0])


def test_which_path_ran() -> None:
    rows = random_rows(10, 100)
    path = chunked(DTKD(), rows, memory=4 * 8 * 100 * 8).path
    assert (path.chunks, path.rows, path.compiled) == (3, 4, "")
    assert path.analytic == ("cross_entropy", "kl") and path.autograd == () and "fewer than" in path.why
    learned = chunked(KD(temperature=Curriculum()), rows).path
    assert learned.autograd == ("kl",) and learned.analytic == ("cross_entropy",)
    assert chunked(LSKD(), rows).path.analytic == ("cross_entropy", "kl")


def test_what_is_refused() -> None:
    rows = random_rows(4, 5)
    with pytest.raises(ValueError, match="DIST compares rows with each other"):
        chunked(DIST(), rows)
    with pytest.raises(ValueError, match="Cosine compares rows"):
        chunked(KD(temperature=Cosine()), rows)
    with pytest.raises(ValueError, match="KDIGA owns its step"):
        chunked(KDIGA.example(), rows)
    with pytest.raises(ValueError, match="memory is bytes"):
        chunked(KD(), rows, memory=0)
    with pytest.raises(ValueError, match="needs labels"):
        chunked(KD(), random_rows(4, 5, labels=False))
    made, (student, *_) = leaves(rows)
    loss = chunked(KD(), made).loss
    loss.backward(retain_graph=True)
    assert student.grad is not None
    with pytest.raises(RuntimeError, match="backward of a chunked loss runs once"):
        loss.backward()


def test_no_gradient_is_made_unasked() -> None:
    rows = random_rows(4, 5)
    assert not chunked(DTKD(), rows).loss.requires_grad
    made, _ = leaves(rows)
    with torch.no_grad():
        loss = chunked(DTKD(), made).loss
    same(loss, total(DTKD()(rows), rows))
    assert not loss.requires_grad


def test_nothing_stands_in_outside_the_chunks() -> None:
    """The plain loss keeps its second derivative, also after a chunk has failed."""
    with pytest.raises(ValueError, match="needs labels"):
        chunked(KD(), random_rows(4, 5, labels=False))
    made, (student, *_) = leaves(random_rows(4, 5))
    (slope,) = torch.autograd.grad(total(KD()(made), made), student, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), student)
    assert bool(second.abs().max() > 0)


# compiled


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """None goes without and says so; True says what is missing."""
    from torch._inductor.exc import InvalidCxxCompiler

    monkeypatch.setattr(compiling, "LARGE", {"cpu": 1})
    monkeypatch.setattr(compiling, "_inductor", lambda device: ({}, InvalidCxxCompiler()))
    rows = random_rows(4, 5)
    result = chunked(KD(), rows)
    assert not result.path.compiled and "InvalidCxxCompiler" in result.path.why
    same(result.loss, total(KD()(rows), rows))
    with pytest.raises(RuntimeError, match=r"compile=True, but inductor cannot compile for 'cpu'"):
        chunked(KD(), rows, compile=True)


LOSS = """
import torch
from tempering.kernels import chunked
from tempering.methods import DTKD
from tempering.rows import Rows, total
torch.set_num_threads(1)
u, v = (torch.randn(23, 50) * 4).bfloat16(), (torch.randn(23, 50) * 3).bfloat16()
u[:, -3:] = v[:, -3:] = -torch.inf
y, w = torch.randint(-1, 30, (23,)), (torch.arange(23) % 4).float()
a, b = v.clone().requires_grad_(), v.float().requires_grad_()
rows = Rows(b, u, y, w)
want = total(DTKD()(rows), rows)
want.backward()
got = chunked(DTKD(), Rows(a, u, y, w), memory=8 * 4 * 50 * 5, compile=True)
got.loss.backward()
assert got.path.compiled == "inductor" and got.path.analytic == ("cross_entropy", "kl", "temperature"), got.path
torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=0.0)
torch.testing.assert_close(a.grad.float(), b.grad, rtol=1e-2, atol=1e-6)
print("equal")
"""

RUN = """
import torch
torch.set_num_threads(1)
from tests.runs import *
from tempering.teachers import Live
x = points(16)[0]
taught = [Live(teacher_net(), compile=how)(x) for how in (False, True, "reduce-overhead")]
torch.testing.assert_close(taught[1:], taught[:1] * 2)
plain = go(cut(points(64), 16), steps=6, selfcheck=False)
for how in (True, "reduce-overhead"):
    fast = go(cut(points(64), 16), steps=6, compile=how, selfcheck=False, validation=cut(points(32, seed=9), 16))
    assert isinstance(fast.student, nn.Sequential), type(fast.student)
    assert list(fast.student.state_dict()) == list(student_net().state_dict())
    torch.testing.assert_close(weights(fast.student), weights(plain.student), rtol=0.0, atol=1e-5)
print("compiled")
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[int, str, str]]:
    """What both print, in a process of its own, without the shape checks, which Dynamo cannot trace."""
    if subprocess.run(["g++", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    if " " in torch.__file__:
        pytest.skip("torch.compile cannot link against a torch whose path has a space")
    slow = ["lightning_fabric", "torch._dynamo", "torch._inductor.compile_fx"]
    # no pool of compile workers, and no programs built to probe the CPU
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    return run_parts({"loss": LOSS, "run": RUN}, slow, **env)


def test_compiled(compiled: dict[str, tuple[int, str, str]]) -> None:
    """Equal to the plain loss."""
    code, out, err = compiled["loss"]
    assert (code, out.strip()) == (0, "equal"), err[-3000:]


def test_a_compiled_run(compiled: dict[str, tuple[int, str, str]]) -> None:
    """Student and teacher, in both modes: the weights of the plain run."""
    code, out, err = compiled["run"]
    assert (code, out.strip()) == (0, "compiled"), err[-4000:]


# from hidden states


class Heads:
    """Hidden states and heads of both sides."""

    def __init__(self, n: int = 13, classes: int = 17, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        generator = torch.Generator().manual_seed(0)
        self.student, self.teacher = nn.Linear(6, classes, bias=bias), nn.Linear(8, classes, bias=bias)
        self.student.to(dtype), self.teacher.to(dtype)
        for p in [*self.student.parameters(), *self.teacher.parameters()]:
            p.data = normal(*p.shape)
        self.hs, self.ht = normal(n, 6).requires_grad_(), normal(n, 8)
        self.target = torch.randint(-1, 5, (n,), generator=generator)
        self.weight = torch.rand(n, generator=generator) * (torch.arange(n) % 4 > 0)

    @property
    def trained(self) -> list[Tensor]:
        return [self.hs, *self.student.parameters()]

    def fused(self, method: Method, **how: Any) -> tuple[Tensor, list[Tensor]]:
        how = {"memory": 17 * 8 * 2 * 4, "target": self.target, "weight": self.weight} | how
        loss = linear_loss(method, self.hs, self.student, self.ht, self.teacher, **how).loss
        return loss.detach(), self.slopes(loss)

    def dense(
        self, method: Method, classes: int | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        v, u = self.student(self.hs)[:, :classes], self.teacher(self.ht).detach()[:, :classes]
        if allowed is not None:
            v, u = v.masked_fill(~allowed, -torch.inf), u.masked_fill(~allowed, -torch.inf)
        rows = Rows(v, u, self.target, self.weight)
        loss = total(method(rows, 1.0), rows)
        return loss.detach(), self.slopes(loss)

    def slopes(self, loss: Tensor) -> list[Tensor]:
        wanted = [x for x in self.trained if x.requires_grad]
        return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_is_the_dense_loss(method: Method, dtype: torch.dtype) -> None:
    """To 1e-12 in float64; to 1e-6 of the largest entry in float32, in which both are as far from the exact one.

    Entry by entry float32 cannot promise that: a product of matrices sums in another order for another number of rows,
    and an entry that cancels to nearly nothing keeps the rounding of its summands.
    """
    made, allowed = Heads(dtype=dtype), torch.arange(17) != 9
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    for how in ({}, {"classes": 15}, {"allowed": allowed}):
        (loss, slopes), (want, dense) = made.fused(method, **how), made.dense(method, **how)
        same(loss, want, exact, 0.0)
        for got, slope in zip(slopes, dense, strict=True):
            same(got, slope, 0.0, exact * float(slope.abs().max()))


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("cap", [None, 0.7])
def test_linear_with_logit_scale_and_soft_cap(method: Method, cap: float | None) -> None:
    """The student's as the teacher's, each side its own; a cap that bites, and columns that are masked behind it."""
    made, allowed = Heads(), torch.arange(17) != 9
    student = Head(made.student.weight, made.student.bias, scale=0.3, cap=cap)
    teacher = Head(made.teacher.weight.detach(), made.teacher.bias.detach(), scale=0.7, cap=3.0)
    v, u = (head(x).masked_fill(~allowed, -torch.inf) for head, x in ((student, made.hs), (teacher, made.ht)))
    assert cap is None or float((v[:, allowed].abs() > 0.9 * cap).double().mean().detach()) > 0.1
    rows = Rows(v, u, made.target, made.weight)
    want = total(method(rows, 1.0), rows)
    how: dict[str, Any] = {"target": made.target, "weight": made.weight, "allowed": allowed, "memory": 17 * 8 * 2 * 4}
    got = linear_loss(method, made.hs, student, made.ht, teacher, **how).loss
    same(got.detach(), want.detach(), 1e-12, 0.0)
    for a, b in zip(made.slopes(got), made.slopes(want), strict=True):
        assert b.abs().max() > 1e-4
        same(a, b, 0.0, 1e-12 * float(b.abs().max()))


def test_a_capped_student_is_exact_beside_a_teacher_of_less_precision() -> None:
    made, method = Heads(), KD(hard=0.0)
    student, told = Head(made.student.weight, made.student.bias, cap=2.0), made.teacher.float()
    rows = Rows(student(made.hs), told(made.ht.float()).detach())
    want = made.slopes(total(method(rows, 1.0), rows))
    got = made.slopes(linear_loss(method, made.hs, student, made.ht.float(), told).loss)
    for a, b in zip(got, want, strict=True):
        same(a, b, 0.0, 1e-12 * float(b.abs().max()))


def test_private_rows_swing_as_in_the_plain_loss() -> None:
    """What a row is, beside its label and its weight, is cut with the logits: noise by place, heat by privacy."""
    x = Heads(classes=11)
    rows = Rows(
        x.student(x.hs),
        x.teacher(x.ht).detach(),
        x.target,
        ids=torch.arange(13) // 4,
        positions=torch.arange(13) % 4,
        privacy_score=(torch.arange(13) % 3 / 2).double(),
    )
    method = Swing(noise=2.0)
    want = total(method(rows), rows)
    slopes = torch.autograd.grad(want, x.trained)
    told = {name: getattr(rows, name) for name in ("ids", "positions", "privacy_score")}
    got = linear_loss(method, x.hs, x.student, x.ht, x.teacher, target=x.target, memory=11 * 8 * 2 * 3, **told).loss
    same((got.detach(), torch.autograd.grad(got, x.trained)), (want.detach(), slopes), 1e-10, 1e-12)
    public = linear_loss(method, x.hs, x.student, x.ht, x.teacher, target=x.target).loss
    assert abs(float((got - public).detach())) > 1e-3


def test_linear_with_frozen_parts_and_bare_weights() -> None:
    made = Heads(bias=False)
    made.student.weight.requires_grad_(False)
    same(made.fused(DTKD()), made.dense(DTKD()), 1e-12, 1e-12)
    made.student.weight.requires_grad_(True)
    made.hs.requires_grad_(False)
    same(made.fused(DTKD()), made.dense(DTKD()), 1e-12, 1e-12)
    loss = linear_loss(KD(hard=0.0), made.hs, made.student.weight, made.ht, made.teacher.weight).loss
    assert loss.requires_grad and loss.ndim == 0
    made.student.weight.requires_grad_(False)
    assert not linear_loss(KD(hard=0.0), made.hs, made.student, made.ht, made.teacher).loss.requires_grad


@pytest.mark.parametrize("sizes", [(1, 3, 8), (5, 300, 64), (70, 5000, 33), (256, 129, 1024)], ids=str)
@pytest.mark.parametrize("fine", [True, False], ids=["two products", "one in float32"])
def test_logits_of_bfloat16_are_as_good_as_float32(
    sizes: tuple[int, int, int], fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fine and not linear._subtracts_first():
        pytest.skip("this CPU's library rounds before it subtracts")
    monkeypatch.setattr(linear, "_subtracts_first", lambda: fine)
    n, C, H = sizes
    x, head = torch.randn(n, H).bfloat16(), torch.randn(C, H).bfloat16()
    monkeypatch.setattr(linear, "_multiplies", lambda dtype, device: True)
    side = linear._Side(x, head, None)
    found = side.logits(slice(0, n), None, side.buffer(n), upcast=True)
    exact = x.double() @ head.double().T
    assert found.dtype == torch.float32
    assert (found - exact).norm() < (2e-5 if fine else 1e-6) * exact.norm()
    assert ((x @ head.T).double() - exact).norm() > 20 * (found - exact).norm()


@pytest.mark.parametrize("native", [True, False], ids=["with instructions", "without"])
def test_linear_in_half_precision(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default makes logits in float32: near the float64 gradient, and nearer than rounded logits."""
    monkeypatch.setattr(linear, "_multiplies", lambda dtype, device: native)
    made = Heads(64, 300, torch.bfloat16)
    method = DTKD(warmup=0.0)
    got, rounded = made.fused(method, memory=2**16)[1], made.fused(method, memory=2**16, upcast=False)[1]
    exact = Heads(64, 300, torch.bfloat16)
    for part in (exact.student, exact.teacher):
        part.double()
    exact.hs, exact.ht = exact.hs.detach().double().requires_grad_(), exact.ht.double()
    for a, b, want in zip(got, rounded, exact.dense(method)[1], strict=True):
        off = [float((x.double() - want).norm() / want.norm()) for x in (a, b)]
        assert a.dtype == torch.bfloat16 and off[0] < 0.01 and off[0] < off[1]
    half = Heads(64, 300, torch.float16)
    assert all(g.dtype == torch.float16 and g.isfinite().all() for g in half.fused(method, memory=2**16)[1])


def test_rounded_logits_have_no_bounded_error() -> None:
    """Logits that differ little from a large common part lose their differences with upcast=False alone."""
    errors: list[float] = []
    for wide in (True, False):
        made = Heads(32, 50, torch.bfloat16)
        for head in (made.student, made.teacher):
            head.weight.data *= 0.25
            head.weight.data[:, 0] = 16.0
        made.hs.data[:, 0], made.ht[:, 0] = 16.0, 16.0
        fused = made.fused(DTKD(warmup=0.0), upcast=wide)[1][0].double()[:, 1:]
        made.student.double(), made.teacher.double()
        made.hs, made.ht = made.hs.detach().double().requires_grad_(), made.ht.double()
        want = made.dense(DTKD(warmup=0.0))[1][0][:, 1:]
        errors.append(float((fused - want).norm() / want.norm()))
    assert errors[0] < 0.01 and errors[1] > 0.12


def test_linear_trains_a_policy_too() -> None:
    made, policy = Heads(), Curriculum(lambda_first=-1.0).double()
    method = KD(temperature=policy)
    loss = linear_loss(method, made.hs, made.student, made.ht, made.teacher, target=made.target, memory=1).loss
    rows = Rows(made.student(made.hs), made.teacher(made.ht).detach(), made.target)
    want = torch.autograd.grad(total(method(rows, 1.0), rows), policy.raw)  # pyright: ignore
    same(torch.autograd.grad(loss, policy.raw), want)  # pyright: ignore


def test_linear_refuses() -> None:
    made = Heads()

    def call(**changes: Any) -> None:
        kept = {"hidden_student": made.hs, "head_student": made.student, "hidden_teacher": made.ht}
        linear_loss(KD(), **({**kept, "head_teacher": made.teacher, "target": made.target} | changes))

    with pytest.raises(ValueError, match=r"A padded vocabulary\? Set classes=16"):
        call(head_teacher=nn.Linear(8, 16).double())
    with pytest.raises(ValueError, match="would be trained"):
        call(hidden_teacher=made.ht.clone().requires_grad_())
    with pytest.raises(ValueError, match="one dtype"):
        call(hidden_student=made.hs.float())
    with pytest.raises(ValueError, match=r"\(N, H\) and a head \(C, H\)"):
        call(hidden_student=made.hs.unsqueeze(0))
    with pytest.raises(ValueError, match=r"needs target of shape \(N,\) = \(13,\)"):
        call(target=made.target[:5])
    with pytest.raises(ValueError, match=r"allowed of shape \(C,\) = \(17,\)"):
        call(allowed=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="classes must be from 1 to 17"):
        call(classes=18)


PEAK = """
import torch
from tempering.teachers.outputs import Head
from tempering.kernels import linear_loss, chunked
from tempering.methods import DTKD
from tempering.rows import Rows, total
torch.set_num_threads(1)
method = DTKD(warmup=0.0)
def step(how, n, V, H=16):
    hs, ht = torch.randn(n, H).requires_grad_(), torch.randn(n, H)
    ws, wt = torch.randn(V, H).requires_grad_(), torch.randn(V, H)
    y = torch.randint(V, (n,))
    if how in ("fused", "capped"):
        ws, wt = (Head(w, cap=30.0) if how == "capped" else w for w in (ws, wt))
        return linear_loss(method, hs, ws, ht, wt, target=y, memory=2**19).loss.backward()
    rows = Rows(hs @ ws.T, ht @ wt.T, y)
    loss = chunked(method, rows, memory=2**19).loss if how == "chunked" else total(method(rows), rows)
    loss.backward()
def held(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return 1024 * int(line.split()[1])
for how in ("fused", "capped", "chunked", "plain"):
    step(how, 64, 2048)
before = held("VmRSS")
for how in ("fused", "capped", "chunked", "plain"):  # each has the larger peak
    step(how, 1024, 2048)
    print((held("VmHWM") - before) / (1024 * 2048 * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_memory() -> None:
    """Peaks in units of one (N, V) tensor: fused, in chunks (two logits and one gradient are held), and plain."""
    # blocks are mapped, and so given back when freed: what the allocator keeps would hide or add a peak
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert not done.returncode, done.stderr
    fused, capped, chunks, dense = map(float, done.stdout.split())
    assert fused < 0.9 and capped < fused + 0.03 and chunks < 3.9 and dense > 7.0
