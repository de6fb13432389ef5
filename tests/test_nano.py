"""recipes/nano.py is the library in one plain file: the same losses from one seed, and nothing of tempering in it."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch

import tempering as kd
from tempering.rows import Rows
from tests.lazy_modules import needs
from tests.paths import ROOT

pytestmark = needs("sklearn", "the recipe is on scikit-learn's digits")
PATH = ROOT / "tempering" / "recipes" / "nano.py"
STEPS, SEED, BATCH = 20, 3, 64


@pytest.fixture(scope="module")
def nano() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_imports_nothing_of_the_library() -> None:
    text = PATH.read_text()
    assert len(text.splitlines()) < 200
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            names.add(node.module.split(".")[0])
    assert names == {"argparse", "numpy", "torch", "sklearn"}
    assert "import_module" not in text and "__import__" not in text


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors and nets are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("solve", ["exact", "published"])
def test_twenty_steps_have_the_losses_of_the_library(nano: ModuleType, solve: str, float64: None) -> None:
    """In float64: in float32 twenty steps part by as much as a CPU's order of sums."""
    x, y, *_ = nano.load_data()
    x = x.double()
    teacher = nano.train_supervised(x, y, steps=60, seed=0, width=64)
    plain, want = nano.distill(teacher, x, y, steps=STEPS, seed=SEED, solve=solve)

    drawn = torch.Generator().manual_seed(SEED)
    batches = [(x[i], y[i]) for i in (torch.randint(len(x), (BATCH,), generator=drawn) for _ in range(STEPS))]
    torch.manual_seed(SEED)
    student, got = nano.build_net(8), []
    kd.distill(
        student,
        teacher,
        batches,
        method=kd.methods.DTKD(temperature=kd.temperature.Sharpness(4.0, solve=solve)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        steps=STEPS,
        precision="64-true",
        quiet=True,
        on_step=lambda step, loss: got.append(float(loss)),
    )
    assert len(set(want)) == STEPS
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)  # roots by Newton, and by halving


@pytest.mark.parametrize("solve", ["exact", "published"])
def test_its_temperatures_are_the_librarys(nano: ModuleType, solve: str) -> None:
    student, teacher = torch.randn(200, 10) * 3, torch.randn(200, 10) * 5
    student[0], teacher[1] = 1.5, -2.0  # rows without an answer: both fall back to tau
    student[2], teacher[3] = student[2] - 40.0, teacher[3] - 60.0
    with contextlib.nullcontext() if solve == "exact" else pytest.warns(UserWarning, match="3 of 200 rows"):
        T = kd.temperature.Sharpness(4.0, solve=solve)(Rows(student, teacher))
    got = nano.temperatures(student, teacher, 4.0, solve)
    torch.testing.assert_close(got[0], T.student, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], T.teacher, rtol=1e-5, atol=1e-6)


def test_it_runs_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PATH), "--steps", "30", "--solve", "published"],
        capture_output=True,
        text=True,
        cwd=PATH.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert said == ["teacher", "student", "student,"] and "(loss " in done.stdout
