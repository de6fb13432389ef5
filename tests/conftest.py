"""What every test gets: one thread, fixed seeds, shapes checked in the numerical core, and random rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.rows import Rows
from tests import shapes
from tests.cases import seed

torch.set_num_threads(1)


# rows.py is left out: Rows and total() look at shapes themselves, and their errors are tested. Dynamo cannot trace the
# checks: a test that compiles a loss (not a model) does so in a process of its own.
shapes.install(["tempering.objectives", "tempering.temperature", "tempering.methods"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker: what its tests share is made once, what it imports is loaded once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


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
def rows() -> Rows:
    """Six rows of seven classes in float64, labeled and not weighted."""
    return random_rows()
