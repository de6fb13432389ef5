"""What every test gets: one thread, fixed seeds, shapes checked in the numerical core, and random rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from tempering.rows import Rows
from tests.cases import seed

torch.set_num_threads(1)


def shapes(function: Callable) -> Callable:
    """The function with its array annotations checked at each call, and no other ones.

    Scalars are left to the constructors: they say what they want in words, and tests want those words.
    """
    notes = function.__annotations__
    function.__annotations__ = {name: note for name, note in notes.items() if "jaxtyping" in repr(note)}
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


# rows.py is left out: Rows and total() look at shapes themselves, and their errors are tested. Dynamo cannot trace the
# checks: a test that compiles a loss (not a model) does so in a process of its own.
install_import_hook(["tempering.objectives", "tempering.temperature", "tempering.methods"], "tests.conftest.shapes")


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
def rows() -> Rows:
    """Six rows of seven classes in float64, labelled and not weighted."""
    return random_rows()
