"""Two gloo processes give what one gives with the same global batch, under DDP and under FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tempering.training import checkpoint
from tests import dense_runs, embedding_runs
from tests.cases import each
from tests.detection_runs import KINDS, go, one_student
from tests.lazy_modules import needs
from tests.paths import ROOT
from tests.runs import STEPS, identical, left, student_net
from tests.two_ranks import RUNS, SAMPLED, aligned, attending, detecting, one, pictures

CLOSE = {"weights": 1e-12, "accumulated": 1e-12, "own parameters": 1e-6}
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what tests/two_ranks.py made."""
    folder = tmp_path_factory.mktemp("two")
    known = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in known}
    command = [sys.executable, "-m", "tests.two_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        one(name, folder / name)
    pictures(folder / "pictures")
    aligned(folder / "aligned")
    attending(folder / "attending")
    for name in ("fgd", "inconsistent"):
        detecting(name, folder / name)
    return folder


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(tensors.items())])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(name: str, strategy: str, two: Path, alone: Path) -> None:
    """Also the optimizer's state, the method's own parameters, and the loss that is written down."""
    ours, theirs = two / strategy / name, alone / name
    a, b = (load_file(out / "student.safetensors") for out in (ours, theirs))
    assert list(a) == list(b) and not torch.allclose(flat(a), flat(dict(student_net().state_dict())), atol=1e-2)
    torch.testing.assert_close(flat(a), flat(b), rtol=0.0, atol=CLOSE[name])
    states = [checkpoint.load(out / "checkpoints") for out in (ours, theirs)]
    assert states[0] is not None and states[1] is not None
    assert states[0]["at"]["step"] == states[1]["at"]["step"] > 0
    if name == "own parameters":
        torch.testing.assert_close(flat(states[0]["method"]), flat(states[1]["method"]), rtol=0.0, atol=CLOSE[name])
        assert abs(float(states[0]["method"]["scale"]) - 1.0) > 1e-3
    for file, count in (("steps.jsonl", states[0]["at"]["step"]), ("epochs.jsonl", None)):
        losses = [_column(out / file, "loss") for out in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and (count is None or len(losses[0]) == count)


@pytest.mark.parametrize(("name", "close"), [("pictures", 1e-6), ("aligned", 1e-12), ("attending", 1e-12)])
def test_shares_of_images_and_a_second_backward(name: str, close: float, two: Path, alone: Path) -> None:
    a, b = (load_file(out / "student.safetensors") for out in (two / "ddp" / name, alone / name))
    torch.testing.assert_close(flat(a), flat(b), rtol=0.0, atol=close)


# an attack goes by the signs of slopes, of which those near 0 are rounding, which differs with the batch
@pytest.mark.parametrize(("name", "close"), [("fgd", 1e-6), ("inconsistent", 1e-4)])
def test_detectors_on_two_processes(name: str, close: float, two: Path, alone: Path) -> None:
    ours, theirs = two / "ddp" / name, alone / name
    a, b = (load_file(out / "student.safetensors") for out in (ours, theirs))
    torch.testing.assert_close(flat(a), flat(b), rtol=0.0, atol=close)
    losses = [_column(out / "steps.jsonl", "loss") for out in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


@pytest.mark.parametrize(
    ("kind", "runs", "name"),
    [(kind, runs, n) for kind, runs in (("dense", dense_runs), ("embeddings", embedding_runs)) for n in runs.CASES],
)
def test_tasks_on_two_processes(kind: str, runs: Any, name: str, two: Path, tmp_path: Path) -> None:
    """Each process has an unequal share of the samples, with another number of labels."""
    runs.run(name, tmp_path)
    a, b = (load_file(out / "student.safetensors") for out in (two / kind / name, tmp_path))
    torch.testing.assert_close(flat(a), flat(b), rtol=0.0, atol=1e-11)
    losses = [_column(out / "steps.jsonl", "loss") for out in (two / kind / name, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and len(losses[0]) == (8 if kind == "dense" else 6)


@needs("pycocotools")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_detector_s_step_are_on_two_processes(kind: str, two: Path, tmp_path: Path) -> None:
    """The masks of MGD and the draws of the attack too."""
    go(tmp_path, kind, precision="64-true")
    one_student(two / "boxes" / kind, tmp_path)
    losses = [_column(out / "steps.jsonl", "loss") for out in (two / "boxes" / kind, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and len(losses[0]) == 6


@pytest.mark.parametrize("name", ["shuffled", "sharded"], ids=["ddp", "fsdp"])
def test_stopped_and_resumed_bit_for_bit(name: str, two: Path) -> None:
    """A DataLoader's order and augmentation, dropout on each rank, sharded optimizer state."""
    whole, stopped = left(two / name / "whole"), left(two / name / "stopped")
    assert whole["state"]["at"]["step"] == STEPS and len(whole["state"]["ranks"]) == 2
    assert not identical(whole["state"]["ranks"][0], whole["state"]["ranks"][1]), "each rank draws its own numbers"
    assert "resumed" in (two / name / "stopped" / "facts.json").read_text()
    assert identical(whole, stopped)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_students_that_begin_apart_end_alike(strategy: str, two: Path, alone: Path) -> None:
    """Both processes have the first one's weights from the start (the worker asserts that both end with the same)."""
    a, b = (load_file(out / "student.safetensors") for out in (two / f"apart {strategy}", alone / "own parameters"))
    torch.testing.assert_close(flat(a), flat(b), rtol=0.0, atol=1e-6)


def test_what_a_split_would_change_is_refused(two: Path) -> None:
    relational, learning, unshared = (two / "refused.txt").read_text().splitlines()
    assert relational == (
        "DIST compares rows with each other, so its loss depends on how a step is split: devices=2 would change it. "
        "Use devices=1 and smaller batches, or a method over single rows."
    )
    assert learning == (
        "Grown learns from the effect of a step on the rows of its own process, so 2 processes would learn 2 different "
        "temperatures. Use devices=1, or another policy."
    )
    assert unshared == ("list cannot be split over 2 processes. Use a DataLoader, or give it shard(rank, world).")


REFUSED = {
    "not split": "Numbers yields the same samples in each of 2 processes",
    "apart": "Apart draws another order in each of 2 processes",
    "a batch too many": "33 samples in batches of 4 cannot be split over 2 processes: one would have 5 batches",
}


@each("name", SAMPLED)
def test_every_sample_is_seen_once_or_the_loader_is_refused(name: str, two: Path) -> None:
    seen = json.loads((two / "sampled.json").read_text())[name]
    if name in REFUSED:
        assert len(seen) == 1 and seen[0].startswith(REFUSED[name]), seen
        return
    orders = []
    for ranks in seen:
        assert len(ranks[0]) == len(ranks[1]) == 4, "all have the same number of batches"
        numbers = [n for batches in ranks for batch in batches for n in batch]
        assert len(set(numbers)) == len(numbers) == (31 if name == "an odd number" else 32)
        orders.append(numbers)
    ordered = name in ("in order", "split by itself", "a batch too many, dropped")
    assert (orders[0] == orders[1]) == ordered, "a random order is another in each epoch"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_self_check_decides_and_fails_in_all_processes(strategy: str, two: Path) -> None:
    """Though the teacher is right on all samples of one process, and seldom on those of the other."""
    first, second = json.loads((two / strategy / "checked.json").read_text())
    assert first[:3] == second[:3] and len(set(first[:3])) == 1 and first[0].startswith("ok (50.0 % on the first 3")
    assert len(list((two / strategy / "verdicts").glob("*.json"))) == 1
    label = "label 9 is out of range for 5 classes"
    assert first[3].startswith(f"process 1 of 2 stopped, SelfCheckError: {label}") and second[3].startswith(label)


def _column(path: Path, name: str) -> list[float]:
    from tempering.utils.files import read_json_lines

    return [line[name] for line in read_json_lines(path)]
