"""Several teachers, and teachers made of students, on two gloo processes: as on one with the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import ROOT
from tests.two_teachers import KINDS, one


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    known = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in known}
    command = [sys.executable, "-m", "tests.two_teachers", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind: str, two: Path, tmp_path: Path) -> None:
    """Student and teacher; and the teachers of both processes are the same to the bit."""
    one(kind, tmp_path)
    ours, alone = (load_file(folder / "student.safetensors") for folder in (two / kind, tmp_path))
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)
    first, second, wanted = (
        torch.load(path, weights_only=True)
        for path in (*(two / kind / f"teacher-{rank}.pt" for rank in range(2)), tmp_path / "teacher-0.pt")
    )
    for a, b, c in zip(first, second, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
