"""Records: a run's folder or the file it is packed into is read, or refused by its name and place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempering.reports.records import RunRecord, canonical, find_runs, load_run, pack, read_cell, write_cell
from tempering.reports.table import compare, markdown
from tests.records_made import make_run, make_set


def one(folder: Path) -> RunRecord:
    return load_run(make_run(folder, "KD", 0, like="DTKD exact", epochs=4))


def test_a_packed_run_says_what_the_run_said(tmp_path: Path) -> None:
    folders, cells = sorted(make_set(tmp_path / "runs")), tmp_path / "cells"
    paths = [write_cell(cells / f"{run.name}.json", pack(run, max_steps=20)) for run in folders]
    runs, packed = [load_run(path) for path in folders], [load_run(path) for path in find_runs([cells])]
    assert [read_cell(path).facts["label"] for path in paths] == [run.label for run in packed]
    assert markdown(compare(packed)) == markdown(compare(runs))
    assert [len(run.steps) for run in packed] == [20] * 15
    assert (packed[0].steps[0], packed[0].steps[-1]) == (runs[0].steps[0], runs[0].steps[-1])
    assert "bench-1" not in "".join(path.read_text() for path in paths)


def _set(cell: dict[str, Any], *path: Any, value: object) -> None:
    for name in path[:-1]:
        cell = cell[name]
    cell[path[-1]] = value


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: _set(c, "facts", "result", "last", "test", "accuracy", value=0.99),
        lambda c: _set(c, "facts", "seed", value=7),
        lambda c: _set(c, "epochs", 0, "loss", value=0.1),
        lambda c: _set(c, "epochs", 0, "loss", value=float("nan")),
        lambda c: c["steps"].pop(),
        lambda c: _set(c, "analysis", "ece", "student", value=0.0),
        lambda c: c.pop("sha256"),
        lambda c: _set(c, "more", value=1),
    ],
)
def test_an_edited_record_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    cell = pack(one(tmp_path / "run").source)
    path = write_cell(tmp_path / "cell.json", cell)
    assert read_cell(path).label == "KD"
    edit(cell)
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match=rf"{path} was edited: its content has sha256 .* restore the file from git"):
        load_run(path)
    with pytest.raises(ValueError, match="was edited"):
        write_cell(tmp_path / "other.json", cell)


def test_whitespace_is_no_edit(tmp_path: Path) -> None:
    cell = pack(one(tmp_path / "run").source)
    (tmp_path / "cell.json").write_text(json.dumps(cell, indent=4, sort_keys=False))
    assert read_cell(tmp_path / "cell.json").seed == 0


def test_a_record_cut_short_is_named(tmp_path: Path) -> None:
    run = one(tmp_path / "run").source
    cell = write_cell(tmp_path / "cells" / "c.json", pack(run))
    cell.write_text(cell.read_text()[:-500])
    for ask in (lambda: load_run(cell), lambda: find_runs([tmp_path / "cells"])):
        with pytest.raises(ValueError, match=rf"{cell}, line 1, is not the JSON of a record: .* truncated"):
            ask()
    steps = run / "steps.jsonl"
    whole = steps.read_text()
    steps.write_text(whole[:-20])
    assert len(load_run(run).steps) == len(whole.splitlines()) - 1, "what a kill cut is left out"
    steps.write_text(whole.replace('{"step": 10', '{"step" 10', 1))
    with pytest.raises(ValueError, match=rf"{steps}, line 2, is not the JSON of a record"):
        load_run(run)
    (run / "facts.json").write_text("")
    with pytest.raises(ValueError, match=rf"{run}/facts.json, line 1, is not the JSON"):
        load_run(run)


@pytest.mark.parametrize(
    ("part", "path", "value", "text"),
    [
        ("facts", ("result", "best"), 3, "facts.result.best must be an object; got 3"),
        ("facts", ("optimizer",), True, "facts.optimizer must be a list; got True"),
        ("analysis", ("confusions", 0, "true"), "cat", r"confusions\[0\].true must be a whole number; got 'cat'"),
        ("analysis", ("reliability", "student", 2), {"low": 0.1}, r"student\[2\].count must be a number; got None"),
        ("analysis", ("per_class", "student", 1), "x", r"analysis.per_class.student\[1\] must be a number; got 'x'"),
    ],
)
def test_a_record_of_another_shape_is_named(
    tmp_path: Path, part: str, path: tuple[Any, ...], value: object, text: str
) -> None:
    file = one(tmp_path / "run").source / f"{part}.json"
    content = json.loads(file.read_text())
    _set(content, *path, value=value)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file.parent}: .*{text}. Was it edited by hand\?"):
        load_run(file.parent)


def test_numbers_that_are_not_finite_are_numbers_that_are_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "KD", 0, epochs=4)
    for name in ("facts.json", "analysis.json", "epochs.jsonl", "steps.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(re.sub(r"(?<=[ \[])\d\.\d+(e-\d+)?(?=[,}\]])", "NaN", text))
    assert load_run(run).score("test/accuracy") is None
    assert "No run has finished" in markdown(compare([load_run(run)]))
    assert "NaN" not in canonical(pack(run))


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Pass folders of runs"):
        find_runs([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="there is no record in"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"contains no run: there is no facts\.json"):
        load_run(tmp_path)
    for content, text in {
        '{"kind": "cell", "format": 9}': "has format 9; this version reads format 1",
        '{"a": 1}': "is not a packed run",
        "[]": "expected an object, got list",
        canonical({"kind": "cell", "format": 1, "sha256": "x"}): "was edited",
    }.items():
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            load_run(tmp_path / "x.json")
    for facts, text in {
        "{}": "has format None",
        '{"format": 1, "label": 3}': "needs 'label', str; got 3",
        '{"format": 1, "label": "a", "seed": "0"}': "needs 'seed', int; got '0'",
    }.items():
        (tmp_path / "facts.json").write_text(facts)
        with pytest.raises(ValueError, match=text):
            load_run(tmp_path)
