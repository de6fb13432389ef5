"""Short runs of a tiny detector; ``python -m tests.detection_runs OUT`` is one of them on two gloo processes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tempering.data.shapes import shapes
from tempering.engine import distill
from tempering.methods import DTKD, Sum, Supervised
from tempering.models.fcos import FCOS
from tempering.settings import Run
from tempering.tasks.detection import Detection

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def net(width: float = 0.5, *, seed: int = 1, **more: Any) -> FCOS:
    """A detector of three classes; with norm="group" images do not see each other."""
    torch.manual_seed(seed)
    return FCOS(3, width=width, neck=16, **more)


def go(out: Path, **more: Any) -> Run:
    """Six steps of four images, two epochs of 12."""
    data = shapes(size=32, train=12, test=4, batch_size=4)
    double = more.get("precision") == "64-true"
    student, teacher = net(bins=5, norm="group"), net(1.0, seed=2, bins=5, norm="group")
    wanted: dict[str, Any] = {"epochs": 2, "checkpoint_every": 1, "selfcheck": False, "quiet": True, "log_every": 1}
    return distill(
        student,
        teacher.double() if double else teacher,
        data.train,
        method=Sum(Supervised(), DTKD(hard=0.0)),
        task=Detection(keep=20),
        optimizer=ADAMW,
        test=data.test,
        out=out,
        **(wanted | more),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    go(Path(sys.argv[1]), precision="64-true", devices=2, strategy="ddp")
