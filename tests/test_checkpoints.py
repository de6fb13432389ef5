"""Checkpoints are whole or not there; a broken one, another run's, or a full disk is said in words."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tempering.methods import DTKD, KD
from tempering.temperature import Static
from tempering.training import checkpoint
from tempering.training.checkpoint import CorruptCheckpointError, list_steps, load, save, save_weights
from tempering.utils.files import write_file
from tests.runs import ADAMW, SGD, cut, go, identical, points, student_net

STATE = {
    "numbers": {"a": torch.randn(3, dtype=torch.float64), "b": torch.arange(4), "empty": torch.zeros(0)},
    "halves": [torch.ones(2, dtype=torch.bfloat16), torch.tensor(True), torch.zeros((), dtype=torch.uint8)],
    "plain": {0: "integer keys", "float": 0.1 + 0.2, "none": None, "nested": [[1, 2.5], {"x": True}]},
}


def altered(step: int) -> dict[str, Any]:
    return {**STATE, "step": step}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert load(tmp_path) is None and load(tmp_path / "nowhere") is None
    place = save(tmp_path, 12, STATE)
    assert place.name == "step-00000012" and sorted(p.name for p in place.iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]
    back = load(tmp_path)
    assert back is not None and identical(back, STATE)
    assert list(back["plain"]) == [0, "float", "none", "nested"]


def test_only_tensors_and_plain_values(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a checkpoint holds tensors and plain values; got Linear at /student/net"):
        save(tmp_path, 1, {"student": {"net": nn.Linear(1, 1)}})
    assert not list_steps(tmp_path)


def test_keep(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, altered(step), keep=3)
    assert sorted(list_steps(tmp_path)) == [3, 4, 5]
    save(tmp_path, 5, altered(50), keep=1)
    assert list_steps(tmp_path) == [5] and [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert load(tmp_path)["step"] == 50  # pyright: ignore[reportOptionalSubscript]


def test_steps_are_counted_not_spelled(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, altered(step))
    assert load(tmp_path)["step"] == 100_000_000  # pyright: ignore[reportOptionalSubscript]


# broken


def truncate(place: Path) -> None:
    file = place / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def flip(place: Path) -> None:
    file = place / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit(place: Path) -> None:
    file = place / "state.json"
    file.write_text(file.read_text().replace("0.30000000000000004", "0.5"))


def unhash(place: Path) -> None:
    file = place / "state.json"
    record = json.loads(file.read_text())
    del record["sha256"]
    file.write_text(json.dumps(record))


def other_format(place: Path) -> None:
    file = place / "state.json"
    record = json.loads(file.read_text())
    del record["sha256"]
    record["format"] = 99
    file.write_text(json.dumps({**record, "sha256": checkpoint._digest(record)}))


BROKEN = {
    "truncated": (truncate, r"tensors\.safetensors is not as it was written \(truncated or edited\)"),
    "a bit flipped": (flip, r"tensors\.safetensors is not as it was written"),
    "edited": (edit, r"state\.json is not as it was written \(edited\)"),
    "no hash": (unhash, r"'sha256'"),
    "another format": (other_format, r"its format is 99, and this version reads 1"),
    "cut state": (lambda place: (place / "state.json").write_text('{"format": 1, "st'), r"Unterminated string"),
    "no object": (lambda place: (place / "state.json").write_text("[1]"), r"is broken"),
    "no tensors": (lambda place: (place / "tensors.safetensors").unlink(), r"No such file"),
    "empty": (lambda place: [p.write_bytes(b"") for p in place.iterdir()], r"is broken"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_one_is_named(how: str, tmp_path: Path) -> None:
    breaks, reason = BROKEN[how]
    save(tmp_path, 7, altered(7))
    breaks(save(tmp_path, 9, altered(9)))
    with pytest.raises(CorruptCheckpointError, match=reason) as caught:
        load(tmp_path)
    said = str(caught.value)
    assert f"the checkpoint {tmp_path / 'step-00000009'} is broken: " in said
    assert said.endswith("Remove that folder to resume from step 7.")
    shutil.rmtree(tmp_path / "step-00000009")
    assert load(tmp_path)["step"] == 7  # pyright: ignore[reportOptionalSubscript]
    breaks(tmp_path / "step-00000007")
    with pytest.raises(CorruptCheckpointError, match=r"to resume from the start: there is no older one\.$"):
        load(tmp_path)


def test_what_a_kill_leaves_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 7, altered(7))
    beside = tmp_path / "step-00000009.partial"
    beside.mkdir()
    (beside / "tensors.safetensors").write_bytes(b"half")
    assert load(tmp_path)["step"] == 7  # pyright: ignore[reportOptionalSubscript]
    save(tmp_path, 8, altered(8))
    assert not beside.exists()
    # killed between the two renames that put a newer checkpoint of one step in the older one's place
    (tmp_path / "step-00000008").rename(tmp_path / "step-00000008.replaced")
    assert load(tmp_path)["step"] == 8  # pyright: ignore[reportOptionalSubscript]
    save(tmp_path, 8, altered(80), keep=1)
    assert load(tmp_path)["step"] == 80  # pyright: ignore[reportOptionalSubscript]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"]


# no space


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Writes fail half-way once the list's number has been counted down."""
    left = [10**9]
    write = write_file

    def writing(path: Path, data: bytes, *, fsync: bool = True) -> None:
        left[0] -= fsync  # checkpoints and weights, not the run's facts
        if fsync and left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, fsync=fsync)

    monkeypatch.setattr("tempering.utils.files.write_file", writing)
    return left


@pytest.mark.parametrize("writes", [0, 1], ids=["tensors", "state"])
@pytest.mark.parametrize("step", [9, 7], ids=["new", "again"])
def test_no_space_for_a_checkpoint(writes: int, step: int, full: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 7, altered(7))
    before = files(folder)
    full[0] = writes
    with pytest.raises(OSError, match=r"^\[Errno 28\] cannot write the checkpoint of step") as caught:
        save(folder, step, altered(step), keep=1)
    assert caught.value.errno == errno.ENOSPC
    for said in (f"step {step} (0.0 MB) under {folder}: No space left on device.", "older checkpoints are kept"):
        assert said in str(caught.value)
    assert files(folder) == before


def test_no_space_for_weights(full: list[int], tmp_path: Path) -> None:
    save_weights(tmp_path / "best.safetensors", {"w": torch.ones(3)})
    before, full[0] = files(tmp_path), 0
    with pytest.raises(
        OSError, match=r"cannot write the weights best\.safetensors \(0\.0 MB\) under .*: No space left"
    ):
        save_weights(tmp_path / "best.safetensors", {"w": torch.zeros(3)})
    assert files(tmp_path) == before


def test_a_run_that_finds_the_disk_full_goes_on_later(full: list[int], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "checkpoint_every": 2, "selfcheck": False}
    go(cut(points(64), 8), out=tmp_path / "whole", **settings)
    full[0] = 5  # two checkpoints and half of the third
    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 6 .* Free some space there"):
        go(cut(points(64), 8), out=tmp_path / "full", **settings)
    facts = json.loads((tmp_path / "full" / "facts.json").read_text())
    assert facts["status"] == "failed" and "No space left on device" in facts["error"]
    full[0] = 10**9
    run = go(cut(points(64), 8), out=tmp_path / "full", **settings)
    assert run.facts["resumed"] == [4] and run.facts["status"] == "done"
    both = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("full", "whole")]
    assert both[0] == both[1]


# another run


def first_run(out: Path, **more: Any) -> Any:
    wanted = {"method": KD(), "steps": 2, "selfcheck": False} | more
    return go(cut(points(32), 8), out=out, **wanted)


DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "method": ("method", {"method": DTKD()}),
    "temperature": ("method", {"method": KD(temperature=Static(2.0))}),
    "teacher": ("teacher", {"teacher": nn.Linear(6, 5)}),
    "student": ("student", {"student": nn.Linear(6, 5)}),
    "optimizer": ("optimizer", {"optimizer": ADAMW}),
    "length": ("total_steps", {"steps": 3}),
    "seed": ("seed", {"seed": 1}),
    "clip": ("clip", {"max_grad_norm": 1.0}),
    "precision": ("precision", {"precision": "64-true"}),
    "accumulate": ("accumulate", {"accumulate": 2}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_run_in_the_folder(what: str, tmp_path: Path) -> None:
    first_run(tmp_path)
    before = files(tmp_path)
    named, more = DIFFERENT[what]
    with pytest.raises(ValueError, match=rf"holds another run: its {named} was .*, now it is .*\. Give another out="):
        first_run(tmp_path, **more)
    assert files(tmp_path) == before, "nothing of the earlier run is touched"
    run = first_run(tmp_path, resume=False, **more)
    assert run.facts["status"] == "done" and "resumed" not in run.facts


def test_resume_false_begins_again(tmp_path: Path) -> None:
    told: list[int] = []
    first_run(tmp_path, validation=cut(points(8, seed=3), 8))
    (tmp_path / "mine.txt").write_text("not the run's")
    first_run(tmp_path, resume=False, on_step=lambda number, loss: told.append(number))
    assert told == [0, 1]
    assert not (tmp_path / "best.safetensors").exists(), "no score chose one"
    assert (tmp_path / "mine.txt").exists()
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 2


def test_a_broken_checkpoint_stops_the_run_and_can_be_removed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "checkpoint_every": 1, "optimizer": SGD}
    first_run(tmp_path, **settings)
    truncate(tmp_path / "checkpoints" / "step-00000004")
    whole = (tmp_path / "student.safetensors").read_bytes()
    with pytest.raises(CorruptCheckpointError, match=r"step-00000004 is broken: .* to resume from step 3\.$"):
        first_run(tmp_path, **settings)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    assert first_run(tmp_path, **settings).facts["resumed"] == [3]
    assert (tmp_path / "student.safetensors").read_bytes() == whole


def test_no_teacher_is_saved(tmp_path: Path) -> None:
    """What is trained and its momentum, and nothing else."""
    first_run(tmp_path)
    state = load(tmp_path / "checkpoints")
    assert state is not None and set(state) == {"key", "at", "ranks", "precision", "student", "method", "optimizer"}
    assert set(state["student"]) == set(student_net().state_dict()) and not state["method"]
    shapes = sorted(tuple(p.shape) for p in student_net().parameters())
    assert sorted(tuple(s["momentum_buffer"].shape) for s in state["optimizer"]["state"].values()) == shapes
