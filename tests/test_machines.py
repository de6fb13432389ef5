"""Runs over several machines, as launchers start them; here the machines are processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempering.methods import DTKD
from tempering.training.fabric import launched_processes, resolve_devices
from tests.paths import ROOT
from tests.runs import Shared, cut, go, points

SET = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "train"}


def started_by(monkeypatch: pytest.MonkeyPatch, **environ: str) -> None:
    for name in {*SET, "MASTER_ADDR", "LSB_JOBID", *(n for n in os.environ if n.startswith("OMPI_"))}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_launchers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch)
    assert launched_processes() is None and resolve_devices("auto", "auto") == ("auto", 1)
    with pytest.raises(ValueError, match=r"num_nodes=3 needs a launcher .* torchrun --nnodes 3"):
        resolve_devices(2, 3)  # it would wait for the others
    monkeypatch.setenv("MASTER_ADDR", "first.machine")
    assert resolve_devices(2, 3) == (2, 3), "without a launcher, Fabric starts the processes of this machine"
    started_by(monkeypatch, **TORCHRUN)
    assert launched_processes() == ("torchrun", 2, 2)
    assert resolve_devices("auto", "auto") == resolve_devices(2, 2) == resolve_devices(-1, "auto") == (2, 2)
    assert resolve_devices("0,1", "auto") == ("0,1", 2)
    started_by(monkeypatch, **SRUN)
    assert launched_processes() == ("srun", 3, 2)
    started_by(monkeypatch, **SRUN, **TORCHRUN)
    assert launched_processes() == ("torchrun", 2, 2), "in a job of SLURM, whose tasks are torchrun's agents"
    started_by(monkeypatch, **SRUN | {"SLURM_JOB_NAME": "bash"})
    assert launched_processes() is None, "a shell on a cluster's machine"
    started_by(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert launched_processes() is None, "what Fabric sets for processes that it starts itself"


def test_other_numbers_than_the_launcher_s_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, **TORCHRUN)
    said = 'torchrun started 2 processes on this machine, and devices is 1. Give devices="auto" or devices=2'
    with pytest.raises(ValueError, match=said):
        resolve_devices(1, "auto")
    with pytest.raises(ValueError, match=r"torchrun started 2 machines, and num_nodes is 4. .* \(--num-nodes 2\)"):
        resolve_devices(2, 4)
    started_by(monkeypatch, **SRUN | {"SLURM_NTASKS": "7"})
    with pytest.raises(ValueError, match="srun started 7 processes, 2 on this machine"):
        resolve_devices("auto", "auto")
    started_by(monkeypatch, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2")
    monkeypatch.setattr("tempering.training.fabric.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install mpi4py"):
        resolve_devices(2, "auto")


CODE = """
import sys
from pathlib import Path
from tests.test_machines import train
train(Path(sys.argv[1]), "ddp")
"""


def train(out: Path, strategy: str) -> None:
    """Four steps of DTKD in float64, each on 24 samples."""
    batches = Shared(cut(points(96, dtype=torch.float64), 24))
    run = go(batches, method=DTKD(), steps=4, strategy=strategy, precision="64-true", out=out, selfcheck=False)
    assert run.folder == out


def test_two_machines_are_one(tmp_path: Path) -> None:
    """One process on each, with devices=1, as torchrun --nnodes 2 --nproc-per-node 1 starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path / "two")],
            cwd=ROOT,
            env=os.environ | common | {"RANK": rank, "GROUP_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(errors)[-3000:]
    train(tmp_path / "one", "auto")
    two, one = (load_file(tmp_path / name / "student.safetensors") for name in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0.0, atol=1e-12)
