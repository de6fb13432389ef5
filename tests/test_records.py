"""What a run writes: facts, steps and epochs that a kill may cut anywhere and a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempering as kd
from tempering.training import recorder as records
from tempering.training.recorder import Recorder, surroundings
from tempering.utils.files import read_json_lines, write_atomic


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def written(folder: Path, steps: int, per_epoch: int = 2) -> Recorder:
    recorder = Recorder(folder)
    recorder.begin({"label": "a", "seed": 3}, upto=0, epochs=0)
    for step in range(1, steps + 1):
        recorder.step({"step": step, "loss": 1.0 / step})
        if step % per_epoch == 0:
            recorder.epoch({"epoch": step // per_epoch, "test": {"accuracy": step / 10}})
    return recorder


def test_facts_say_how_it_began_and_how_it_ended(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "deep" / "run")
    recorder.begin({"label": "a", "data": tmp_path}, upto=0, epochs=0)
    said = facts(tmp_path / "deep" / "run")
    assert (said["format"], said["status"], said["finished"], said["result"]) == (1, "running", None, None)
    assert said["label"] == "a" and said["data"] == str(tmp_path), "what JSON cannot say is said as text"
    assert said["started"].endswith("+00:00") and "resumed" not in said
    recorder.update(selfcheck={"line": "ok"})
    recorder.end("done", result={"steps": 4})
    said = facts(tmp_path / "deep" / "run")
    assert (said["status"], said["result"], said["selfcheck"]) == ("done", {"steps": 4}, {"line": "ok"})
    assert said["finished"] >= said["started"] and recorder.facts == said | {"data": tmp_path}


def test_steps_and_epochs_are_lines_that_can_be_read_while_it_runs(tmp_path: Path) -> None:
    recorder = written(tmp_path, 4)
    assert [line["step"] for line in read_json_lines(tmp_path / "steps.jsonl")] == [1, 2, 3, 4]
    assert read_json_lines(tmp_path / "epochs.jsonl") == recorder.epochs
    recorder.analysis({"ece": 0.1})
    assert json.loads((tmp_path / "analysis.json").read_text()) == {"ece": 0.1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis.json", "epochs.jsonl", "facts.json", "steps.jsonl"]


def test_what_is_done_again_after_a_kill_is_cut(tmp_path: Path) -> None:
    """The checkpoint is of step 3 in epoch 2, and the kill came in step 6."""
    written(tmp_path, 5).analysis({"stale": True})
    began = facts(tmp_path)["started"]
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    again = Recorder(tmp_path)
    again.begin({"label": "a", "seed": 3}, upto=3, epochs=1)
    assert [line["step"] for line in read_json_lines(tmp_path / "steps.jsonl")] == [1, 2, 3]
    assert again.epochs == read_json_lines(tmp_path / "epochs.jsonl") == [{"epoch": 1, "test": {"accuracy": 0.2}}]
    assert not (tmp_path / "analysis.json").exists(), "it was of an end that did not happen"
    again.step({"step": 4})
    assert [line["step"] for line in read_json_lines(tmp_path / "steps.jsonl")] == [1, 2, 3, 4]
    said = facts(tmp_path)
    assert (said["started"], said["resumed"], said["status"]) == (began, [3], "running")
    third = Recorder(tmp_path)
    third.begin({}, upto=4, epochs=1)
    assert facts(tmp_path)["resumed"] == [3, 4]


def test_a_run_that_begins_again_keeps_nothing(tmp_path: Path) -> None:
    written(tmp_path, 4)
    again = Recorder(tmp_path)
    again.begin({}, upto=0, epochs=0)
    assert read_json_lines(tmp_path / "steps.jsonl") == read_json_lines(tmp_path / "epochs.jsonl") == again.epochs == []
    assert "resumed" not in facts(tmp_path)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(None)
    recorder.begin({"label": "a"}, upto=0, epochs=0)
    recorder.step({"step": 1})
    recorder.epoch({"epoch": 1})
    recorder.analysis({})
    recorder.end("done")
    assert recorder.epochs == [{"epoch": 1}] and recorder.facts["status"] == "done" and not list(tmp_path.iterdir())


def test_a_line_that_is_cut_is_left_out_and_one_that_is_edited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"steps.jsonl, line 2, is not JSON: .*Was it edited by hand\?"):
        read_json_lines(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    write_atomic(path, "old")
    write = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomic(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_surroundings_are_what_one_needs_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/tempering", "run", "x.py", "--seed=1"])
    said = surroundings()
    assert said["command"] == ["tempering", "run", "x.py", "--seed=1"]
    assert said["versions"]["torch"] == torch.__version__ and said["versions"]["tempering"] == kd.__version__
    assert said["host"].keys() >= {"name", "cpu", "cores", "gpu", "platform"}
    assert said["commit"] is None or len(said["commit"]) == 40
    json.dumps(said)
    monkeypatch.setattr(records.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no git")))
    assert (surroundings()["commit"], surroundings()["dirty"]) == (None, None)


def test_a_run_writes_the_temperatures_and_terms_of_its_steps(tmp_path: Path) -> None:
    x = torch.randn(32, 6)
    batches = [(x, x[:, :3].argmax(1))]
    teacher = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(6 * torch.eye(3, 6))
    run = kd.distill(
        nn.Linear(6, 3),
        teacher,
        batches,
        method=kd.methods.DTKD(),
        epochs=3,
        test=batches,
        out=tmp_path,
        log_every=2,
        quiet=True,
    )
    steps = read_json_lines(tmp_path / "steps.jsonl")
    assert [line["step"] for line in steps] == [1, 3] and steps[-1]["progress"] == 1.0
    for line in steps:
        assert line["terms"].keys() == {"dynamic", "soft", "hard"}
        assert line["loss"] == pytest.approx(sum(line["terms"].values()), rel=1e-5)
        means = line["T_teacher"]["mean"] + line["T_student"]["mean"]
        assert means == pytest.approx(8.0, rel=1e-6), "T_teacher + T_student = 2 tau"
        assert line["T_teacher"]["p5"] <= line["T_teacher"]["mean"] <= line["T_teacher"]["p95"]
        assert line["rows_per_second"] > 0 and line["lr"] == 0.05
    assert facts(tmp_path) == json.loads(json.dumps(run.facts, default=str))
    assert [line["epoch"] for line in read_json_lines(tmp_path / "epochs.jsonl")] == [1, 2, 3]
