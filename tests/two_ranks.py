"""The runs of test_distributed on two gloo processes: ``python -m tests.two_ranks OUT``.

Fabric starts the second process by the same command. All runs share the two, one after the other; each leaves its
folder, and what is asserted of both processes is asserted here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SubsetRandomSampler

from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.methods import DIST, DTKD, FGD, KD, KDIGA, Explainer, InconsistentDetection
from tempering.models.attention import attend
from tempering.models.fcos import FCOS
from tempering.rows import Rows
from tempering.tasks.detection import Detection
from tempering.temperature import AdaptivePolicy, Temperatures
from tempering.training import checkpoint
from tempering.training.config import VERDICTS, Run, SelfCheckError
from tempering.training.distributed import all_gather_objects
from tempering.training.fabric import fabric_for
from tempering.training.resumable_loader import ResumableLoader, reseed
from tests import dense_runs, detection_runs, embedding_runs
from tests.runs import (
    ADAMW,
    CLASSES,
    SGD,
    STEPS,
    Learned,
    Part,
    Shared,
    Weighted,
    cut,
    flattened,
    go,
    images,
    points,
    resumable,
    stop_at,
    student_net,
    teacher_net,
    weighted,
)


class Grown(AdaptivePolicy):
    """A policy that learns from what a step did."""

    paper = "none: a test's"
    tau = 4.0

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return Temperatures(*(torch.full((1, 1), self.tau),) * 2)

    def update(self, reward: Tensor | None) -> None:
        self.tau += 1.0


def unequal(dtype: torch.dtype = torch.float32) -> Shared:
    """Ten batches of 24, a third of each for rank 0; its weights are smaller, some are 0."""
    return Shared(cut(weighted(240, dtype=dtype), 24))


# name -> what to run; each also on one process, with the same global batch
RUNS: dict[str, dict[str, Any]] = {
    "weights": {"method": DTKD, "precision": "64-true"},
    "accumulated": {"method": DTKD, "precision": "64-true", "accumulate": 2, "max_grad_norm": 0.05, "steps": 10},
    "own parameters": {"method": Learned, "optimizer": ADAMW, "max_grad_norm": 0.5},
}


def one(name: str, out: Path | None, *, seed: int = 1, **more: Any) -> Run:
    """20 steps of one of RUNS; ``seed`` is of the student's weights."""
    wanted = {"steps": STEPS, "task": Weighted(), "selfcheck": False} | RUNS[name] | more
    dtype = torch.float64 if wanted.get("precision") == "64-true" else torch.float32
    student, teacher, batches = student_net(seed=seed), teacher_net(dtype), unequal(dtype)
    torch.manual_seed(77)  # of the method's projector
    return go(batches, student=student, teacher=teacher, out=out, **(wanted | {"method": wanted["method"]()}))


def pictures(out: Path | None, **more: Any) -> Run:
    """Augmented images in a random order, shared out by tempering.data."""
    net, taught = flattened(student_net()), flattened(teacher_net())
    return go(images(), student=net, teacher=taught, out=out, steps=STEPS, selfcheck=False, **more)


def aligned(out: Path | None, **more: Any) -> Run:
    """A loss of input gradients, whose backward is a second one through the wrapped student."""
    batches, teacher, method = unequal(torch.float64), teacher_net(torch.float64), KDIGA(align=2.0, warmup=0.5)
    wanted: dict[str, Any] = {"task": Weighted(), "steps": STEPS, "precision": "64-true", "selfcheck": False}
    return go(batches, teacher=teacher, method=method, out=out, **(wanted | more))


def attending(out: Path | None, **more: Any) -> Run:
    """A student that attends, whose entropy is a term: its parameters are met in the forward and outside of it."""
    torch.manual_seed(5)
    layers = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 1), nn.Tanh(), nn.Conv2d(8, 6, 1), nn.Flatten()]
    student = attend(nn.Sequential(*layers, nn.Linear(36, CLASSES)).double())
    batches, teacher, method = unequal(torch.float64), teacher_net(torch.float64), Explainer(entropy=0.5)
    wanted: dict[str, Any] = {"task": Weighted(), "steps": STEPS, "precision": "64-true", "selfcheck": False}
    return go(batches, student=student, teacher=teacher, method=method, out=out, **(wanted | more))


def detecting(name: str, out: Path | None, **more: Any) -> Run:
    """Images with boxes, and methods over necks; the adversaries are made on each process."""
    torch.manual_seed(7)
    student, teacher = (FCOS(3, width=0.5, neck=neck, norm="group") for neck in (16, 24))
    made = FGD() if name == "fgd" else InconsistentDetection(FGD(), adversarial=1e-4)
    splits = synthetic_shapes(size=64, train=8, test=4, batch_size=4)
    wanted: dict[str, Any] = {"task": Detection(class_rows=False), "steps": 3, "optimizer": partial(SGD, lr=0.01)}
    torch.manual_seed(78)  # of the method's own modules
    models = {"student": student, "teacher": teacher, "selfcheck": False}
    return go(splits.train, method=made, out=out, **(models | wanted | more))


def refusal(batches: Any = None, **more: Any) -> str:
    try:
        go(batches or unequal(), task=Weighted(), steps=1, **more)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def stopped_and_whole(out: Path, loader: str, **both: Any) -> None:
    """A run that nobody stops, and the same one stopped in mid-epoch and taken up again."""
    resumable(loader, out / "whole", **both)
    try:
        resumable(loader, out / "stopped", on_step=stop_at(4), **both)
        raise AssertionError("it was not stopped")
    except KeyboardInterrupt:
        pass
    resumable(loader, out / "stopped", **both)


class Known(Shared):
    """Batches of which rank 0 gets a teacher's easy samples, and rank 1 those that it decides slowly on."""

    def shard(self, rank: int, world: int) -> Shared:
        return Known(self.batches, rank, world)

    def __iter__(self) -> Iterator[Part]:
        for x, y in self.batches:
            yield (
                (x[::2], y[::2]) if self.rank == 0 else (x[1::2], torch.where(y[1::2] == 0, 0, (y[1::2] + 1) % CLASSES))
            )


def checked(out: Path, **both: Any) -> None:
    """Self-checks whose processes alone would take other numbers of batches, fail apart, or wait for a lock."""
    said: list[Any] = []
    batches, rank = cut(points(120), 8), torch.distributed.get_rank()
    for grid in (False, True):
        os.environ.update({VERDICTS: str(out / "verdicts")} if grid else {})
        for _ in range(1 + grid):  # the second reads the verdict
            student = student_net(norm=True)
            run = go(Known(batches), student=student, steps=2, out=out / f"checked {len(said)}", **both)
            said.append(run.facts["selfcheck"]["checks"]["above chance"])
    os.environ.pop(VERDICTS)
    student, bad = student_net(), [(x, y + CLASSES * (i == 0 and rank)) for i, (x, y) in enumerate(batches)]
    try:
        go(Shared(bad), student=student, steps=2, **both)
    except SelfCheckError as error:
        said.append(str(error))
    every = all_gather_objects(said, fabric_for(accelerator="cpu", devices=2, strategy="ddp", precision="32-true"))
    if not rank:
        (out / "checked.json").write_text(json.dumps(every))


class Numbers(IterableDataset[int]):
    """Numbers that know nothing of processes, or every other one."""

    def __init__(self, *, split: bool) -> None:
        self.split = split

    def __iter__(self) -> Iterator[int]:
        rank = torch.distributed.get_rank() if self.split else 0
        return iter(range(rank, 32, 2 if self.split else 1))


class Own(Sampler[int]):
    """A sampler whose order is drawn by Python's global generator."""

    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(32), 32))


class Apart(Own):
    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(torch.distributed.get_rank()).sample(range(32), 32))


def seeded(sampler: Any, seed: int = 3) -> Any:
    return sampler(generator=torch.Generator().manual_seed(seed))


# loaders of the numbers 0 to 31 (or as many as are named), four in a batch
SAMPLED: dict[str, Callable[[], Any]] = {
    "random": lambda: DataLoader(range(32), 4, shuffle=True),
    "in order": lambda: DataLoader(range(32), 4),
    "an odd number": lambda: DataLoader(range(31), 4, shuffle=True),
    "subset": lambda: DataLoader(range(64), 4, sampler=SubsetRandomSampler(range(32))),
    "subset, seeded": lambda: DataLoader(range(64), 4, sampler=seeded(partial(SubsetRandomSampler, range(32)))),
    "python": lambda: DataLoader(range(32), 4, sampler=Own()),
    "batch sampler": lambda: DataLoader(
        range(64), batch_sampler=BatchSampler(SubsetRandomSampler(range(32)), 4, drop_last=False)
    ),
    "workers": lambda: DataLoader(range(64), 4, sampler=SubsetRandomSampler(range(32)), num_workers=1),
    "split by itself": lambda: DataLoader(Numbers(split=True), 4),
    "not split": lambda: DataLoader(Numbers(split=False), 4),
    "apart": lambda: DataLoader(range(32), 4, sampler=Apart()),
    "a batch too many": lambda: DataLoader(range(33), 4),
    "a batch too many, dropped": lambda: DataLoader(range(33), 4, drop_last=True),
}


def sampled(out: Path) -> None:
    """What each process sees in two epochs, or why the loader is refused."""
    fabric = fabric_for(accelerator="cpu", devices=2, strategy="ddp", precision="32-true")
    seen: dict[str, Any] = {}
    for name, make in SAMPLED.items():
        torch.manual_seed(fabric.global_rank)
        random.seed(fabric.global_rank)
        epochs: list[Any] = []
        try:
            loader = ResumableLoader(make(), fabric, seed=5)
            for epoch in range(2):
                reseed(5, epoch, fabric.global_rank)
                epochs.append(all_gather_objects([batch.tolist() for batch in loader.epoch(epoch, 0)], fabric))
        except ValueError as error:
            epochs = [str(error)]
        seen[name] = epochs
    if fabric.is_global_zero:
        (out / "sampled.json").write_text(json.dumps(seen))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ddp = {"devices": 2, "strategy": "ddp"}
    for strategy in ("ddp", "fsdp"):
        both = ddp | {"strategy": strategy}
        for name in RUNS:
            one(name, out / strategy / name, **both)
    pictures(out / "ddp" / "pictures", **ddp)
    aligned(out / "ddp" / "aligned", **ddp)
    attending(out / "ddp" / "attending", **ddp)
    for name in ("fgd", "inconsistent"):
        detecting(name, out / "ddp" / name, **ddp)
    if importlib.util.find_spec("pycocotools") is not None:
        for kind in detection_runs.KINDS:
            detection_runs.go(out / "boxes" / kind, kind, precision="64-true", **ddp)
    for kind in dense_runs.CASES:
        dense_runs.run(kind, out / "dense" / kind, **ddp)
    for kind in embedding_runs.CASES:
        embedding_runs.run(kind, out / "embeddings" / kind, **ddp)
    stopped_and_whole(out / "shuffled", "shuffled", **ddp)
    stopped_and_whole(out / "sharded", "batches", **(ddp | {"strategy": "fsdp", "optimizer": SGD}))
    # each process begins with weights of its own, and both end with the first one's
    rank = torch.distributed.get_rank()
    for strategy in ("ddp", "fsdp"):
        both = ddp | {"strategy": strategy}
        run = one("own parameters", out / f"apart {strategy}", seed=1 + rank, **both)
        every = [None, None]
        state = checkpoint.gather(run.student, None, None)["student"]
        torch.distributed.all_gather_object(every, {name: value.tolist() for name, value in state.items()})
        assert every[0] == every[1], "the processes ended with other weights"
    said = [refusal(method=DIST(), **ddp), refusal(method=KD(temperature=Grown()), **ddp)]
    said.append(refusal(batches=cut(weighted(24), 8), method=KD(), **ddp))
    sampled(out)
    for strategy in ("ddp", "fsdp"):
        checked(out / strategy, **(ddp | {"strategy": strategy}))
    if not rank:
        (out / "refused.txt").write_text("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
