"""Short runs of a tiny detector, on one process or two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.methods import (
    CWD,
    DTKD,
    FGD,
    LD,
    MGD,
    PKD,
    Imitation,
    InconsistentDetection,
    Method,
    OnBlocks,
    Sum,
    Supervised,
)
from tempering.models.fcos import FCOS
from tempering.tasks.detection import Detection
from tempering.training.config import Run
from tempering.training.distill import distill

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def necks() -> Method:
    """Every method over a detector's neck and sides at once, and class logits."""
    rest = [
        CWD(hard=0.0),
        Imitation(hard=0.0),
        Imitation(hard=0.0, scored=True),
        PKD(hard=0.0, standardize_over="image"),
    ]
    return Sum(FGD(), MGD(hard=0.0, feature=1e-3), *rest, LD(hard=0.0), OnBlocks(DTKD(hard=0.0), blocks=["classes"]))


METHODS: dict[str, Callable[[], Method]] = {
    "classes": lambda: Sum(Supervised(), DTKD(hard=0.0)),
    "necks": necks,
    "inconsistent": lambda: InconsistentDetection(MGD(feature=1e-3), adversarial=1e-3),
}


def net(width: float = 0.5, *, seed: int = 1, **more: Any) -> FCOS:
    """A detector of three classes; with norm="group" images do not see each other."""
    torch.manual_seed(seed)
    return FCOS(3, width=width, neck=16, **more)


def go(out: Path, kind: str = "classes", batch_size: int = 4, **more: Any) -> Run:
    """Six steps of four images, two epochs of 12."""
    data = synthetic_shapes(size=32, train=12, test=4, batch_size=batch_size)
    double = more.get("precision") == "64-true"
    student, teacher = net(bins=5, norm="group"), net(1.0, seed=2, bins=5, norm="group")
    wanted: dict[str, Any] = {"epochs": 2, "checkpoint_every": 1, "selfcheck": False, "quiet": True, "log_every": 1}
    return distill(
        student,
        teacher.double() if double else teacher,
        data.train,
        method=METHODS[kind](),
        task=Detection(keep=20, class_rows=kind != "inconsistent"),
        optimizer=ADAMW,
        test=data.test,
        out=out,
        **(wanted | more),
    )


KINDS = ("necks", "inconsistent")  # whose steps do not depend on how they are split


def one_student(a: Path, b: Path) -> None:
    """Both runs ended with the same weights."""
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (a, b))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12)
