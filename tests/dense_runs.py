"""Tasks of pixels, labels and numbers: a small problem of each, and runs of it on one process or two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.methods import AT, DTKD, KD, Method, RegressionKD, Sum
from tempering.rows import total
from tempering.tasks import Binary, MultiLabel, Ordinal, Regression, Segmentation, Task
from tempering.training.config import Run
from tests.runs import Shared, cut, go

N = 24
Part = tuple[Tensor, ...]


class Case(NamedTuple):
    """A task, a method, the number of outputs, and labels of N samples, unlabeled ones among them."""

    task: Callable[..., Task]
    method: Callable[[], Method]
    outputs: int
    labels: Callable[[Tensor], Tensor]
    images: bool = False


def some(labels: Tensor, missing: float) -> Tensor:
    """The labels with ever more of them missing, none of the first sample and all of the last one."""
    count = labels[0].numel()
    flat = labels.reshape(len(labels), -1).clone()
    for i in range(len(flat)):
        flat[i, torch.randperm(count, generator=torch.Generator().manual_seed(i))[: count * i // (N - 1)]] = missing
    return flat.view(labels.shape)


def signs(x: Tensor) -> Tensor:
    return (x.flatten(1)[:, :3] > 0).long()


def above(x: Tensor) -> Tensor:
    return torch.bucketize(x.flatten(1)[:, 0].contiguous(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype))


def pixels(x: Tensor) -> Tensor:
    return (x > 0).sum(1).to(torch.uint8)


CASES = {
    "labels": Case(MultiLabel, partial(DTKD, warmup=0.0), 3, lambda x: some(signs(x), -1)),
    "soft labels": Case(MultiLabel, KD, 3, lambda x: some(x.flatten(1)[:, :3].sigmoid(), torch.nan)),
    "taught labels": Case(partial(MultiLabel, unlabeled="teach"), KD, 3, lambda x: some(signs(x), -100)),
    "binary": Case(Binary, KD, 1, lambda x: some(signs(x)[:, 0], -1)),
    "ordinal": Case(partial(Ordinal, 3), KD, 3, lambda x: some(above(x), -100)),
    "numbers": Case(Regression, RegressionKD, 2, lambda x: some(x.flatten(1)[:, :2], torch.nan)),
    "bounded": Case(Regression, partial(RegressionKD, bound=0.05), 2, lambda x: some(x.flatten(1)[:, :2], torch.nan)),
    "gaussian": Case(
        partial(Regression, uncertainty=True), RegressionKD, 4, lambda x: some(x.flatten(1)[:, :2], torch.nan)
    ),
    "taught numbers": Case(
        partial(Regression, unlabeled="teach"), RegressionKD, 2, lambda x: some(x.flatten(1)[:, :2], torch.nan)
    ),
    "depth": Case(partial(Regression, ignore=0.0), RegressionKD, 1, lambda x: some(x.sum(1), 0.0), images=True),
    "pixels": Case(Segmentation, partial(DTKD, warmup=0.0), 4, lambda x: some(pixels(x), 255), images=True),
    "sampled pixels": Case(partial(Segmentation, stride=3), KD, 4, lambda x: some(pixels(x), 255), images=True),
    "taught pixels": Case(partial(Segmentation, unlabeled="teach"), KD, 4, lambda x: some(pixels(x), 255), images=True),
    "pixels and maps": Case(
        partial(Segmentation, features={"maps": ("0", "0")}),
        lambda: Sum(KD(), AT(hard=0.0, names=["maps"])),
        4,
        lambda x: some(pixels(x), 255),
        images=True,
    ),
}


def data(name: str, n: int = N) -> Part:
    case = CASES[name]
    x = torch.randn(n, 3, *((8, 10) if case.images else (1, 1)), generator=torch.Generator().manual_seed(0))
    return x.double(), case.labels(x.double())


def net(name: str, width: int, seed: int, stride: int = 1) -> nn.Module:
    """Of images a convolutional net, whose output has the stride."""
    torch.manual_seed(seed)
    case = CASES[name]
    end: list[nn.Module] = [] if case.images else [nn.Flatten()]
    first = nn.Conv2d(3, width, 3 if case.images else 1, padding=1 if case.images else 0, stride=stride)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(width, case.outputs, 1), *end).double()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A student of stride 2, and a teacher."""
    return net(name, 5, 1, 2 if CASES[name].images else 1), net(name, 7, 2)


def loss(name: str, outputs: tuple[Tensor, Tensor], batch: Part, of: Part | None = None) -> Tensor:
    """The method's loss of the outputs of a batch, a part of a step whose batch is ``of``."""
    case = CASES[name]
    task = case.task()
    (rows,) = task.rows(outputs[0], outputs[1], batch)
    return total(case.method()(rows, 1.0), rows, normalizer=task.row_weights(batch if of is None else of)[rows.name])


def run(name: str, out: Path | None, **more: Any) -> Run:
    """Eight steps on two batches, an unequal share of each for either process."""
    student, teacher = pair(name)
    wanted: dict[str, Any] = {"steps": 8, "precision": "64-true", "selfcheck": False, "method": CASES[name].method()}
    wanted |= {"student": student, "teacher": teacher, "task": CASES[name].task()}
    return go(Shared(cut(data(name), N // 2)), out=out, **(wanted | more))
