"""What a run writes: facts, steps and epochs that a kill may cut anywhere and a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempering as kd
from tempering.cli.main import main
from tempering.reports.records import load_run, pack, without_private
from tempering.training import checkpoint
from tempering.training import run_records as records
from tempering.training.run_records import Recorder, surroundings
from tempering.utils.files import read_json_lines, write_atomic
from tests.cases import each
from tests.runs import cut, go, points, stop_at


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


# damage


def interrupted(out: Path, **more: Any) -> None:
    settings: dict[str, Any] = {"epochs": 3, "selfcheck": False, "checkpoint_every": 1} | more
    with pytest.raises(KeyboardInterrupt):
        go(cut(points(32), 8), out=out, validation=cut(points(8, seed=3), 8), on_step=stop_at(9), **settings)


def again(out: Path) -> Any:
    return go(cut(points(32), 8), out=out, validation=cut(points(8, seed=3), 8), epochs=3, selfcheck=False)


def replaced(number: int, line: str | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        lines[number - 1 : number] = [] if line is None else [line]
        path.write_text("".join(lines))

    return change


def cut_to(size: int) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b'"loss": ') + 10] ^= 1
    path.write_bytes(data)


# file, what is done to it -> what the error says; of a run that was interrupted, and of a finished one
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "facts cut": ("facts.json", cut_to(100), r"facts\.json, line \d+, (is damaged|is not the JSON)"),
    "facts empty": ("facts.json", cut_to(0), r"facts\.json, line 1, (is damaged|is not the JSON)"),
    "facts a list": ("facts.json", lambda path: path.write_text("[]"), r"facts\.json, line 1, .*got list"),
    "facts changed": (
        "facts.json",
        lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 7')),
        r"facts\.json is not as it was written: a value was changed",
    ),
    "a line is no object": (
        "steps.jsonl",
        replaced(3, "5\n"),
        r"steps\.jsonl is not as it was written|has lost lines.*line 3",
    ),
    "a line is cut": ("steps.jsonl", replaced(2, '{"step": 2, "lo\n'), r"steps\.jsonl has lost lines: .*\(line 2: "),
    "a line is lost": (
        "steps.jsonl",
        replaced(4, None),
        r"steps\.jsonl has lost lines: [\d,]+ bytes .* and it has [\d,]+",
    ),
    "lines are swapped": (
        "steps.jsonl",
        lambda path: path.write_text("".join((x := path.read_text().splitlines(True))[:1] + x[2:3] + x[1:2] + x[3:])),
        r"steps\.jsonl is not as it was written: .*\(line 3: step 2 after step 3\)",
    ),
    "a number is changed": (
        "steps.jsonl",
        flipped,
        r"steps\.jsonl is not as it was written: lines were changed or lost",
    ),
    "an epoch is lost": ("epochs.jsonl", replaced(1, None), r"epochs\.jsonl (has lost lines|is not as it was written)"),
    "an epoch is changed": ("epochs.jsonl", flipped, r"epochs\.jsonl is not as it was written"),
    "a file is lost": ("steps.jsonl", Path.unlink, r"steps\.jsonl has lost lines: [\d,]+ bytes .* and it has 0"),
}


@each("what", DAMAGES)
def test_damaged_records_are_named_by_resume_and_report(what: str, tmp_path: Path) -> None:
    name, damage, said = DAMAGES[what]
    for status in ("interrupted", "done"):
        out = tmp_path / status
        interrupted(out)
        if status == "done":
            again(out)
        damage(out / name)
        with pytest.raises(ValueError, match=said):
            load_run(out)
        with pytest.raises(ValueError, match=said):
            again(out)


def test_an_analysis_that_was_changed_is_named(tmp_path: Path) -> None:
    interrupted(tmp_path)
    again(tmp_path)
    path = tmp_path / "analysis.json"
    text = path.read_text()
    for damage in (lambda: path.write_text(text.replace("0", "1", 1)), path.unlink):
        damage()
        with pytest.raises(ValueError, match=r"analysis\.json is missing or not as it was written"):
            load_run(tmp_path)


@pytest.mark.parametrize("other", ["sha25v", "rha256"])
@pytest.mark.parametrize("done", [False, True])
def test_a_hash_whose_name_is_damaged_is_noticed(done: bool, other: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    if done:
        again(tmp_path)
    head, name, tail = (tmp_path / "facts.json").read_text().rpartition('"sha256"')
    assert name and tail.count('"') == 2, "the hash is the last value"
    (tmp_path / "facts.json").write_text(f'{head}"{other}"{tail}')
    for use in (load_run, again) if done else (load_run,):  # a run that resumes writes its facts anew
        with pytest.raises(ValueError, match=r"facts\.json is not as it was written"):
            use(tmp_path)


def test_records_of_an_earlier_version_are_read_and_cut(tmp_path: Path) -> None:
    """Its checkpoints hold no sizes and hashes; odd lines are named all the same."""
    interrupted(tmp_path)
    facts_ = facts(tmp_path)
    del facts_["records"], facts_["sha256"]
    (tmp_path / "facts.json").write_text(json.dumps(facts_))
    state = checkpoint.load(tmp_path / "checkpoints")
    assert state is not None
    checkpoint.save(tmp_path / "checkpoints", 9, state)
    assert len(load_run(tmp_path).steps) == 9
    lines = (tmp_path / "steps.jsonl").read_text()
    for line, said in (("5", "must be an object; got int"), ('{"a": 1}', "needs 'step', a whole number; got None")):
        replaced(3, f"{line}\n")(tmp_path / "steps.jsonl")
        with pytest.raises(ValueError, match=rf"steps\.jsonl, line 3, {said}"):
            again(tmp_path)
        (tmp_path / "steps.jsonl").write_text(lines)
    assert again(tmp_path).how == "resumed"
    assert [line["step"] for line in read_json_lines(tmp_path / "steps.jsonl")] == list(range(1, 13))


def test_long_records_are_resumed_and_read_in_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bisection where the position is not known, else by the hash of what comes before."""
    line = {"loss": 1.0, "terms": {"soft": 0.5, "hard": 0.5}, "note": "x" * 20}
    text = "".join(json.dumps({"step": step} | line) + "\n" for step in range(1, 50_001))
    assert len(text) > records.SMALL
    (tmp_path / "steps.jsonl").write_text(text)
    parsed: list[int] = []
    parse = records.parse_line
    monkeypatch.setattr(records, "parse_line", lambda *a: parsed.append(0) or parse(*a))
    for upto in (49_990, 30_000, 123, 1):
        recorder = Recorder(tmp_path)
        recorder.begin({"label": "a", "seed": 3}, upto=upto, epochs=0)
        end = len("".join(json.dumps({"step": step} | line) + "\n" for step in range(1, upto + 1)))
        assert (tmp_path / "steps.jsonl").stat().st_size == recorder.positions["steps.jsonl"]["bytes"] == end
        if upto > 30_000:
            position, whole = recorder.positions, (tmp_path / "steps.jsonl").read_bytes()
            before = len(parsed)
            Recorder(tmp_path).begin({"label": "a", "seed": 3}, upto=upto, epochs=0, positions=position)
            assert len(parsed) == before and (tmp_path / "steps.jsonl").read_bytes() == whole
            read = load_run(tmp_path).steps
            assert len(read) <= 20_001 and (read[0]["step"], read[-1]["step"]) == (1, upto)
    assert len(parsed) < 4 * 40


@each("name", ["student.safetensors", "best.safetensors"])
def test_weights_carry_a_checksum(name: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    run = again(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in (len(data) - 1, (header + len(data)) // 2, len(data) - 40):
        data[place] ^= 4
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is damaged: its weights do not have the checksum"):
            kd.models.load(run.student, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            again(tmp_path)
        data[place] ^= 4
    (tmp_path / name).write_bytes(data)
    assert again(tmp_path).how == "finished"


# secrets


def test_no_secret_is_written_into_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("sk-abcdef123456", "hunter2hunter2", "AKIAABCDEFGHIJKLMNOP", "s3cr3tpass")
    argv = ["tempering", "run", "--api-key", secrets[0], f"--password={secrets[1]}", f"s3://{secrets[2]}:x/y@bucket/a"]
    monkeypatch.setattr("sys.argv", argv)

    def fail(step: int, loss: Any) -> None:
        raise RuntimeError(f"401 from https://user:{secrets[3]}@host/v1?token={secrets[0]}")

    with pytest.raises(RuntimeError):
        go(
            cut(points(16), 8),
            out=tmp_path,
            epochs=1,
            facts={"api_key": secrets[1], "n": {"url": argv[-1]}},
            on_step=fail,
        )
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not any(secret.encode() in path.read_bytes() for secret in secrets), path
    said = facts(tmp_path)
    assert said["command"][:4] == ["tempering", "run", "--api-key", "***"] and said["status"] == "failed"


PRIVATE = {
    "posix": ("/home/jane/data/x.bin", "x.bin"),
    "with spaces": ("/home/jane doe/my data/x.bin", "x.bin"),
    "a flag": ("--data=/home/jane doe/my data", "--data=my data"),
    "in a text": ("cannot read '/home/jane doe/a b/x.bin': no", "cannot read 'x.bin': no"),
    "home": ("~jane/data/x.bin", "x.bin"),
    "windows": ("C:\\Users\\Jane Doe\\x.bin", "x.bin"),
    "share": ("\\\\server\\jane\\x.bin", "x.bin"),
    "file": ("file:///home/jane/x.bin", "x.bin"),
    "host": ("http://node17.cluster:8000/v1", "http://***:8000/v1"),
    "relative": ("runs/first/x.bin", "runs/first/x.bin"),
    "address": ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
}


def test_what_is_published_has_no_private_paths(tmp_path: Path) -> None:
    recorder = written(tmp_path / "jane", 4)
    host = {"name": "node17.cluster", "cpu": "c"}
    recorder.update(host=host, error={name: text for name, (text, _) in PRIVATE.items()})
    recorder.end("done", result={"last": {"epoch": 2, "test": {"accuracy": 0.4}}})
    wanted = {name: text for name, (_, text) in PRIVATE.items()}
    run = load_run(tmp_path / "jane")
    assert without_private(run).facts["error"] == pack(tmp_path / "jane")["facts"]["error"] == wanted
    for published in (json.dumps(pack(tmp_path / "jane")), repr(without_private(run).facts)):
        assert "node17" not in published
    assert run.facts["error"]["posix"] == PRIVATE["posix"][0], "the run's own records say where its data is"
    pytest.importorskip("jinja2")
    for public, names in ((True, 0), (False, 1)):
        flags = ["--public"] if public else []
        assert main(["report", str(tmp_path / "jane"), "--out", str(tmp_path / "page.html"), *flags]) == 0
        page = (tmp_path / "page.html").read_text()
        assert min(page.count("node17.cluster"), 1) == names and str(tmp_path) not in page
