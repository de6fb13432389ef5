"""The table of other libraries' losses: current with its records, and made without network for a made-up library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from docs.tools.conformance_table import page
from tests.paths import ROOT

pytest.importorskip("hypothesis")

RUN = ROOT / "benchmarks" / "conformance" / "run.py"
RESULTS = ROOT / "benchmarks" / "results" / "conformance"
PEER = """
from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("made-up", "1.0")


@LIBRARY.loss("made_up.loss", kind="scores", promises=Promises(), documented="A mean of squares.")
def loss():
    import made_up

    return made_up.loss
"""


def records() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}


def test_page_is_current_with_the_records() -> None:
    made = (ROOT / "docs" / "conformance-table.md").read_text(encoding="utf-8")
    assert made == page(RESULTS), "make pages"


def test_every_loss_was_loaded_and_checked() -> None:
    current = {name: r for name, r in records().items() if name != "tempering" and not r["dated"]}
    losses = [(name, loss) for name, r in current.items() for loss in r["losses"]]
    assert len({name for name, _ in losses}) >= 16 and len(losses) >= 64
    assert not [(name, loss["path"]) for name, loss in losses if "not loaded" in loss]


def test_this_library_fails_nothing() -> None:
    failed = [
        (loss["path"], r["name"])
        for loss in records()["tempering"]["losses"]
        for r in loss["results"]
        if r["status"] in ("fail", "error")
    ]
    assert not failed


def test_records_are_of_the_losses_that_are_declared() -> None:
    folder = RUN.parent / "peers"
    script = (
        "import json, peers; "
        "print(json.dumps({n: [[x.path, x.documented] for x in peers.load(n).losses] for n in peers.names()}))"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder.parent), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    declared = json.loads(done.stdout)
    recorded = {n: [[x["path"], x["documented"]] for x in r["losses"]] for n, r in records().items()}
    assert recorded == declared, "make conformance"


def make_wheel(folder: Path) -> None:
    """A wheel of a package of one function."""
    with zipfile.ZipFile(folder / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up.py", "def loss(student, teacher):\n    return (student - teacher).square().mean()\n")
        wheel.writestr("made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        wheel.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("made_up-1.0.dist-info/RECORD", "")


def test_library_is_installed_checked_and_recorded_once(tmp_path: Path) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "made_up.py").write_text(PEER)
    make_wheel(tmp_path)
    command = [sys.executable, RUN, *(f"--{n}={tmp_path / n}" for n in ("peers", "environments", "results"))]
    environ = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    subprocess.run(command, check=True, env=environ)
    path = tmp_path / "results" / "made_up.json"
    record = json.loads(path.read_text())
    (loss,) = record["losses"]
    assert (record["library"], record["version"], loss["path"]) == ("made-up", "1.0", "made_up.loss")
    assert {r["status"] for r in loss["results"]} >= {"pass"} and not any(
        r["status"] == "fail" for r in loss["results"]
    )
    assert "made_up.loss" in page(tmp_path / "results")
    before = path.stat().st_mtime_ns
    subprocess.run(command, check=True, env=environ)  # the record is there
    assert path.stat().st_mtime_ns == before
