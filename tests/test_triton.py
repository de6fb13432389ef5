"""Triton's kernels: run by its interpreter against the plain loss, and compiled for a device that need not be here."""

from __future__ import annotations

import json

import pytest
import torch

from tempering.kernels import chunked
from tempering.kernels import compiled as compiling
from tempering.methods import DTKD, KD
from tempering.rows import total
from tempering.temperature.sharpness import LOOKS
from tests.binaries import Needs, needs
from tests.conftest import random_rows
from tests.contract import same
from tests.forked import run_parts
from tests.paths import ROOT

# run by the interpreter

LOSS = """
import torch
from tempering.kernels import chunked, linear_loss
from tempering.methods import DTKD, KD, Divergence
from tempering.rows import Rows, total
from tempering.temperature import Sharpness
torch.set_num_threads(1)
torch.manual_seed(0)
for classes in (50, 4097):
    for dtype in (torch.float32, torch.bfloat16):
        u, v = (torch.randn(14, classes) * 4).to(dtype), (torch.randn(14, classes) * 3).to(dtype)
        u[:, -3:] = v[:, -3:] = -torch.inf
        u[1], v[2], u[3, 1:], v[3, 1:] = 1.0, -2.0, -torch.inf, -torch.inf
        v[4] *= 1e4
        u[5], v[5] = -torch.inf, -torch.inf
        u[6, 0], v[6, 0] = 40.0, 40.0
        y, w = torch.randint(-1, 30, (14,)), (torch.arange(14) % 4).float()
        y[3:6] = -100
        for method in (DTKD(warmup=0.0), DTKD(temperature=Sharpness(4.0, solve="std")), KD()):
            a, b = v.clone().requires_grad_(), v.float().clone().requires_grad_()
            want = total(method(Rows(b, u, y, w)), Rows(b, u, y, w))
            want.backward()
            got = chunked(method, Rows(a, u, y, w), memory=8 * 4 * classes * 9, compile="triton")
            got.loss.backward()
            assert got.path.compiled == "triton" and got.path.autograd == (), got.path
            if getattr(method.temperature, "solve", "") == "exact":
                assert "temperature" in got.path.analytic, got.path
            torch.testing.assert_close(got.loss, want, rtol=2e-5, atol=1e-6)
            near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
            torch.testing.assert_close(a.grad.float(), b.grad, **near)
            assert not a.grad[w == 0].any()
u, v = torch.randn(3, 20).double(), torch.randn(3, 20).double().requires_grad_()
wide = chunked(DTKD(hard=0.0), Rows(v, u), compile="triton").loss
torch.testing.assert_close(wide, total(DTKD(hard=0.0)(Rows(v, u)), Rows(v, u)), rtol=1e-12, atol=0.0)
print("equal")
"""

SOLVER = """
import torch
from tempering.kernels.triton_rows import exact
from tempering.temperature.sharpness import solve_delta
torch.set_num_threads(1)
torch.manual_seed(1)
for classes, by in ((2, 1.0), (11, 3.0), (5000, 2.0)):
    u, v = torch.randn(20, classes) * by, torch.randn(20, classes) * torch.logspace(-3, 3, 20)[:, None]
    u[0], v[1], u[2, 0] = 3.0, 0.0, -torch.inf
    v[2, 0] = -torch.inf
    got, want = exact(u, v, 4.0, 0.9), solve_delta(u, v, tau=4.0, solve="exact", reach=0.9)
    torch.testing.assert_close(got.delta, want.delta, rtol=0.0, atol=2e-2)
    wide = solve_delta(u.double(), v.double(), tau=4.0, solve="exact", reach=0.9)
    ordinary = slice(8, None)  # nearly flat rows carry few digits in float32, as Sharpness says
    torch.testing.assert_close(got.delta[ordinary].double(), wide.delta[ordinary], rtol=0.0, atol=1e-3)
    assert torch.equal(got.fallback, want.fallback) and torch.equal(got.clamped, want.clamped)
    assert got.clamped.any() or classes == 2
# logits whose sharpness is log C up to its last digits: a good start is a root by its noise, and its step still counts
u, v = torch.randn(2, 8, 11) * 0.1
got, want, wide = (
    solution.delta.double()
    for solution in (
        exact(u, v, 4.0, 0.9),
        solve_delta(u, v, tau=4.0, solve="exact", reach=0.9),
        solve_delta(u.double(), v.double(), tau=4.0, solve="exact", reach=0.9),
    )
)
assert (got - wide).abs().max() <= 2.5 * (want - wide).abs().max(), (got - wide, want - wide)
print("equal")
"""

WRONG = """
import torch
from tempering.kernels import compiled, triton_rows
torch.set_num_threads(1)
right = triton_rows.divergence_and_slope
triton_rows.divergence_and_slope = lambda *args: tuple(1.01 * x for x in right(*args))
made, error = compiled._triton("cpu")
assert not made and isinstance(error, ArithmeticError), error
try:
    compiled.fast_versions("triton", torch.device("cpu"), 1)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[int, str, str]]:
    """What the three print, in a process of its own: the interpreter is chosen when triton is first imported."""
    pytest.importorskip("triton", reason="triton is not installed; pip install triton runs these")
    parts = {"loss": LOSS, "solver": SOLVER, "wrong": WRONG}
    return run_parts(parts, ["tempering.kernels", "tempering.methods", "triton"], TRITON_INTERPRET="1")


def said(done: tuple[int, str, str]) -> str:
    code, out, err = done
    assert not code, err[-3000:]
    return out.strip()


def test_the_interpreter_equals_the_plain_loss(interpreted: dict[str, tuple[int, str, str]]) -> None:
    """Value and gradient of DTKD and of CE, with masks, padding, constants, large logits, bf16 tails, rows left out."""
    assert said(interpreted["loss"]) == "equal"


def test_the_solver_itself(interpreted: dict[str, tuple[int, str, str]]) -> None:
    """delta, the rows that fell back and the rows that were held are the plain solver's."""
    assert said(interpreted["solver"]) == "equal"


# compiled for devices that need not be here

BUDGET = json.loads((ROOT / "tests" / "kernel_budget.json").read_text(encoding="utf-8"))
TYPES = {
    "_kl_rows": ["*z", "*z", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "i32"],
    "_label_rows": ["*z", "*i64", "*fp32", "*fp32", "i32"],
    "_exact_rows": ["*z", "*z", "*fp32", "*i8", "*i8", "i32", "fp32", "fp32", "fp32"],
}
# NVIDIA's compute capability or AMD's architecture, and the type of the logits
TARGETS = [("80", "bf16"), ("90", "bf16"), ("90", "fp32"), ("100", "bf16"), ("gfx942", "bf16")]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize(("target", "logits"), TARGETS, ids=lambda x: x)
@pytest.mark.parametrize("name", TYPES)
def test_registers_and_memory_of_a_kernel(name: str, target: str, logits: str) -> None:
    """Its binary stays within tests/kernel_budget.json: registers, bytes in local memory, bytes of shared memory."""
    pytest.importorskip("triton", reason="triton is not installed; pip install triton runs these")
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource, compile  # pyright: ignore[reportMissingImports]

    from tempering.kernels import triton_rows

    kernel = getattr(triton_rows, name)
    types = [kind.replace("*z", f"*{logits}") for kind in TYPES[name]]
    fixed = {"LOOKS": LOOKS, "BLOCK": triton_rows.LARGEST}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(fixed)], strict=True))
    device = GPUTarget("cuda", int(target), 32) if target.isdigit() else GPUTarget("hip", target, 64)
    made = compile(ASTSource(kernel, signature, fixed), target=device, options={"num_warps": 8})
    found, allowed = needs(made), Needs(*BUDGET[name][target])
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), f"{found} is above {allowed}"
    assert found.registers > 16, "read from the wrong place"


def test_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that is none is refused; Triton is refused where it cannot run, and gone without where nobody insists."""
    rows = random_rows(4, 5)
    with pytest.raises(ValueError, match=r"compile must be True, False, None, 'triton' or 'inductor'; got 'cuda'"):
        chunked(KD(), rows, compile="cuda")  # pyright: ignore
    monkeypatch.setattr(compiling, "_triton", lambda device: ({}, ImportError("no triton here")))
    with pytest.raises(RuntimeError, match=r"compile='triton', but triton cannot compile for 'cpu' here \(ImportError"):
        chunked(KD(), rows, compile="triton")
    monkeypatch.setattr(compiling, "_inductor", lambda device: ({}, ImportError("no compiler either")))
    found = compiling.fast_versions(None, torch.device("cuda"), 2**30)
    assert (
        not found.compiler and found.why == "no triton (ImportError: no triton here); ImportError: no compiler either"
    )
    same(chunked(DTKD(), rows).loss, total(DTKD()(rows), rows))


def test_a_kernel_with_wrong_numbers_is_not_used(interpreted: dict[str, tuple[int, str, str]]) -> None:
    assert "kl differs by" in said(interpreted["wrong"])
