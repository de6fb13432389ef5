"""Tasks of encoders: small problems of them, and runs on one process or two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.methods import DTKD, EmbeddingKD, MarginMSE, Method
from tempering.tasks import Embeddings, Ranking, Task
from tempering.training.config import Run
from tests.runs import Shared, cut, go

N, K, F = 24, 4, 6
Part = tuple[Tensor, ...]


class Towers(nn.Module):
    """Scores (Q, K) of lists (Q, K + 1, F), the query first."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(F, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).tanh()
        return torch.einsum("qd,qkd->qk", z[:, 0], z[:, 1:])


def linear(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(F, 8), nn.Tanh(), nn.Linear(8, width))


def texts() -> Part:
    """Texts, no labels, and weights, some of them 0."""
    x = torch.randn(N, F, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.0, 2.0, N).double()
    weight[::7] = 0.0
    return x.double(), torch.full((N,), -100), weight


def lists() -> Part:
    """Queries with candidates, and labels, some of them unknown."""
    x = torch.randn(N, K + 1, F, generator=torch.Generator().manual_seed(0)).double()
    return x, torch.where(torch.arange(N) % 5 == 3, -100, torch.arange(N) % K)


class Case(NamedTuple):
    """A task, a method, both models, and a batch."""

    task: Callable[[], Task]
    method: Callable[[], Method]
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    data: Callable[[], Part]


CASES = {
    "projected": Case(
        Embeddings, partial(EmbeddingKD, cosine=0.5), partial(linear, 3, 1), partial(linear, 5, 2), texts
    ),
    "ranked": Case(Ranking, partial(DTKD, warmup=0.0), partial(Towers, 4, 1), partial(Towers, 6, 2), lists),
    "margins": Case(Ranking, partial(MarginMSE, hard=0.5), partial(Towers, 4, 1), partial(Towers, 6, 2), lists),
}


def run(name: str, out: Path | None, **more: Any) -> Run:
    """Six steps on two batches, an unequal share of each for either process."""
    case = CASES[name]
    torch.manual_seed(4)  # of the projection
    wanted: dict[str, Any] = {"steps": 6, "precision": "64-true", "selfcheck": False, "method": case.method()}
    wanted |= {"student": case.student().double(), "teacher": case.teacher().double(), "task": case.task()}
    return go(Shared(cut(case.data(), N // 2)), out=out, **(wanted | more))
