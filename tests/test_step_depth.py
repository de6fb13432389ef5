"""A training step stays readable: few functions of few files lie between its start and ``backward``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import tempering
from tempering import distill
from tempering.data import Batches
from tempering.methods import DTKD
from tempering.models import build
from tempering.training.trainer import Trainer

PACKAGE = str(Path(tempering.__file__).parent)
INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}  # not functions, and inlined by later Pythons


class ForwardProfile:
    """Records the functions of the package that a step calls before ``Fabric.backward``, as a context."""

    def __init__(self) -> None:
        from lightning_fabric import Fabric

        self.end = Fabric.backward.__code__
        self.steps: list[set[CodeType]] = []
        self.recording = False

    def __enter__(self) -> ForwardProfile:
        self.previous = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.previous)

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code is Trainer._step.__code__:
            self.steps.append(set())
            self.recording = True
        elif code is self.end:
            self.recording = False
        if self.recording and code.co_filename.startswith(PACKAGE) and code.co_name not in INLINED:
            self.steps[-1].add(code)


def test_a_step_calls_few_functions_before_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (32,), generator=generator)
    batches = Batches(images, labels, batch_size=8, mean=[0.5] * 3, std=[0.25] * 3, shuffle=True, crop=4, flip=True)
    student, teacher = build("resnet8", classes=10), build("resnet8", classes=10)
    with ForwardProfile() as profile:
        distill(student, teacher, batches, method=DTKD(), steps=3, selfcheck=False, quiet=True, accelerator="cpu")
    assert len(profile.steps) == 3
    for step in profile.steps:
        names = sorted(f"{Path(code.co_filename).name}: {code.co_qualname}" for code in step)
        files = {code.co_filename for code in step}
        assert any("Block.forward" in name for name in names) and any("DTKD.forward" in name for name in names)
        assert len(step) <= 40, "\n".join(names)
        assert len(files) <= 10, "\n".join(sorted(files))
