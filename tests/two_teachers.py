"""Runs of test_teachers_distributed on two gloo processes: ``python -m tests.two_teachers OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tempering.methods import KD, Mutual
from tempering.teachers import Ensemble, MeanTeacher, Routed
from tempering.training.config import Run
from tempering.training.fabric import fabric_for
from tests.runs import flattened, go, images, student_net, teacher_net

KINDS = ("ensemble", "routed", "mean", "mutual")
ROUTE = torch.randint(2, (60,), generator=torch.Generator().manual_seed(4))


def one(kind: str, out: Path, **more: Any) -> Run:
    """Twelve steps in float64 on augmented images, whose batches are shared out."""
    nets = [flattened(net).double() for net in (teacher_net(torch.float64), student_net(seed=9))]
    teacher: Any = {
        "ensemble": lambda: Ensemble(nets, weights="confidence"),
        "routed": lambda: Routed(nets, by=ROUTE),
        "mean": lambda: MeanTeacher(0.9),
        "mutual": lambda: nets[1],
    }[kind]()
    method = Mutual() if kind == "mutual" else KD()
    settings: dict[str, Any] = {"steps": 12, "precision": "64-true", "selfcheck": False, "method": method} | more
    run = go(images(), student=flattened(student_net()), teacher=teacher, out=out, **settings)
    other = method.peer if isinstance(method, Mutual) else teacher.models[0]
    rank = torch.distributed.get_rank() if more else 0
    torch.save([p.detach() for p in other.parameters()], out / f"teacher-{rank}.pt")
    return run


if __name__ == "__main__":
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    fabric_for(accelerator="cpu", precision="32-true", **both)
    for name in KINDS:
        one(name, Path(sys.argv[1]) / name, **both)
