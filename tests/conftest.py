"""What every test gets: one thread, fixed seeds, shapes checked in the numerical core, and random rows."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest import unraisableexception
from torch.testing import _comparison

from tempering.rows import Rows
from tests import shapes
from tests.cases import seed

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # it notes the caller's traceback for each kind of device that may be there later: a millisecond
    torch.manual_seed = torch.default_generator.manual_seed  # pyright: ignore
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # Fabric reads them for each run
_comparison._HAS_DTENSOR = False  # assert_close imports DTensor, and so sympy and Dynamo, to see that it got none

# rows.py is left out: Rows and total() look at shapes themselves, and their errors are tested. Dynamo cannot trace the
# checks: a test that compiles a loss (not a model) does so in a process of its own.
shapes.install(["tempering.objectives", "tempering.temperature", "tempering.methods"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker: what its tests share is made once, what it imports is loaded once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage once at the end and not five times, each time through all that was ever imported."""
    if iterations := getattr(unraisableexception, "gc_collect_iterations_key", None):  # from pytest 8.4 on
        config.stash[iterations] = 1


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, alone or in a crowd."""
    seed()


def random_rows(
    n: int = 6,
    classes: int = 7,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 3.0,
    seed: int = 0,
    labels: bool = True,
    weighted: bool = False,
) -> Rows:
    """n rows of normal logits, the teacher's a little sharper; the weights, where wanted, in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale * 1.5
    target = torch.randint(classes, (n,), generator=generator) if labels else None
    weight = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64) if weighted else None
    return Rows(student.to(dtype), teacher.to(dtype), target, weight)


@pytest.fixture
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with the recipe ``FAKE`` of the test's module."""
    path = tmp_path / "fake.py"
    path.write_text(request.module.FAKE)
    return path


@pytest.fixture
def forked_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of grids and searches are forked, see ``tests/forked_jobs.py``."""
    from tests import forked_jobs

    forked_jobs.install(monkeypatch)


@pytest.fixture
def rows() -> Rows:
    """Six rows of seven classes in float64, labeled and not weighted."""
    return random_rows()
