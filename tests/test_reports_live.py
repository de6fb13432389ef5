"""Runs in progress, runs side by side, and the server of a page."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tempering.cli.main import main
from tempering.reports.compare import compare
from tempering.reports.page import LIMIT, render
from tempering.reports.pair import pair, side_by_side
from tempering.reports.records import load_run
from tempering.reports.serve import page_of, server
from tempering.utils.files import file_lock
from tests.records_made import make_run, make_set
from tests.test_reports import Page


def state(html: str) -> str:
    return Page(html).texts["header"]


# running, interrupted, finished


def test_a_page_says_whether_its_run_goes_on_and_reloads_while_it_does(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "KD", 0, status="running")
    with file_lock(folder / ".lock"):
        html = render([load_run(folder)])
        assert "Running: epoch 10 of 20, step 170" in state(html)
        assert '<meta http-equiv="refresh" content="15">' in html and "reloads every 15 s" in state(html)
    killed = render([load_run(folder)])
    assert "Interrupted: epoch 10 of 20" in state(killed), "no process holds its lock any more"
    (folder / ".lock").unlink()
    assert load_run(folder).status == "running", "a copy without its lock: not known"
    for status, text in (("interrupted", "Interrupted"), ("failed", "Failed"), ("done", "Finished")):
        html = render([load_run(make_run(tmp_path / status, "KD", 0, status=status))])
        assert text in state(html) and 'http-equiv="refresh"' not in html


def test_a_page_of_several_runs_counts_them_and_names_the_running_ones(tmp_path: Path) -> None:
    runs = [load_run(p) for p in make_set(tmp_path / "set", seeds=1, epochs=4)]
    runs.append(
        load_run(make_run(tmp_path / "more", "KD", 1, status="running", settings={"epochs": 20, "total_steps": 340}))
    )
    html = render(runs)
    assert "6 runs: 5 finished, 1 running. Running: KD, seed 1: epoch 10 of 20, step 170 of 340" in state(html)


# side by side


def test_two_runs_of_one_method_and_seed_are_told_apart(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", "KD", 0, end=0.9)
    b = make_run(tmp_path / "b", "KD", 0, end=0.95, settings={"epochs": 20, "seed": 0, "precision": "bf16-mixed"})
    runs = side_by_side([load_run(a), load_run(b)])
    assert [run.label for run in runs] == ["KD (a)", "KD (b)"]
    comparison = compare(runs)
    found = pair(comparison, {"KD (a)": "a1", "KD (b)": "a2"})
    assert found is not None
    assert ("settings.precision", "32-true", "bf16-mixed") in found.settings
    assert not [name for name, *_ in found.settings if "seed" in name or name.startswith(("host", "student"))]
    assert ("test accuracy", "90.00 %", "95.00 %", "+5.00 points", False) in found.scores
    page = Page(render(runs))
    assert ["settings.precision", "32-true", "bf16-mixed"] in page.rows["pair"]
    assert {"score", "rate"} <= set(page.svgs) and len(page.svgs["score"].findall("./g")) == 2, "curves over each other"


def test_two_methods_are_paired_by_seed(tmp_path: Path) -> None:
    runs = []
    for seed, (low, high) in enumerate([(0.90, 0.92), (0.91, 0.93), (0.93, 0.951)]):
        for order, (label, end) in enumerate((("KD", low), ("DTKD exact", high))):
            runs.append(load_run(make_run(tmp_path / f"{label}-{seed}", label, seed, order=order, end=end)))
    comparison = compare(runs)
    found = pair(comparison, {group.label: "a1" for group in comparison.groups})
    assert found is not None
    assert [name for name, _ in found.names] == ["KD", "DTKD exact"]
    row = next(row for row in found.scores if row[0] == "test accuracy")
    assert (
        row[:3] == ("test accuracy", "91.33 %", "93.37 %") and row[3].startswith("+2.03 points \u00b1 0.1") and row[4]
    )
    assert any(name.startswith("method.temperature") for name, *_ in found.settings)


def test_other_numbers_of_methods_have_no_such_section(tmp_path: Path) -> None:
    runs = [load_run(p) for p in make_set(tmp_path, seeds=1, epochs=2)]
    assert "pair" not in {a.get("id") for _, a in Page(render(runs)).elements}
    assert "pair" not in {a.get("id") for _, a in Page(render(runs[:1])).elements}


def test_names_and_settings_of_a_pair_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    a = make_run(tmp_path / "a", bad, 0, like="KD", settings={"x": bad})
    b = make_run(tmp_path / "b", bad, 0, like="KD", settings={"x": 1, bad: 2})
    html = render([load_run(a), load_run(b)])
    assert "<script" not in html and "&lt;script&gt;" in html


def test_the_command_compares_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make_run(tmp_path / name, "KD", 0, epochs=4) for name in "ab")
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    assert "KD (a)" in capsys.readouterr().out
    assert len((tmp_path / "page.html").read_bytes()) < LIMIT == 1_500_000


# the server


@contextlib.contextmanager
def serving(*paths: Path) -> Iterator[int]:
    with server(lambda: page_of(paths), port=0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert running.server_address[0] == "127.0.0.1"
            yield int(running.server_address[1])
        finally:
            running.shutdown()
            thread.join()


def get(port: int, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_server_shows_what_a_run_has_written_since(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with serving(folder) as port:
        status, text, _ = get(port, "/")
        assert status == 503 and "there is no record in" in text and "refresh" in text, "it waits for one"
        make_run(folder, "KD", 0, status="running")
        with file_lock(folder / ".lock"):
            status, text, headers = get(port, "/?again")
            assert status == 200 and "Running: epoch 10" in text
            assert headers["Cache-Control"] == "no-store" and headers["Content-Type"].startswith("text/html")
            with open(folder / "steps.jsonl", "a") as file:
                file.write(json.dumps({"step": 175, "epoch": 11, "loss": 1.0, "terms": {}}) + '\n{"step": 1')
            assert "Running: epoch 11 of 20, step 175" in get(port, "/")[1], "a line is being written"
        make_run(folder, "KD", 0)
        status, text, _ = get(port, "/")
        assert "Finished" in text and 'http-equiv="refresh"' not in text
        assert get(port, "/", method="HEAD")[1] == ""


@pytest.mark.parametrize(
    "path",
    [
        "/facts.json",
        "/../facts.json",
        "/%2e%2e/facts.json",
        "//etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/run/facts.json",
        "/.",
    ],
)
def test_the_server_has_no_files(tmp_path: Path, path: str) -> None:
    make_run(tmp_path / "run", "KD", 0, epochs=2)
    with serving(tmp_path / "run") as port:
        status, text, _ = get(port, path)
        assert status == 404 and "there is only one page" in text and "bench-1" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_the_server_answers_this_machine_only(tmp_path: Path, host: str) -> None:
    make_run(tmp_path / "run", "KD", 0, epochs=2)
    with serving(tmp_path / "run") as port:
        assert get(port, "/", host=host)[0] == 403
        assert get(port, "/", host=f"localhost:{port}")[0] == get(port, "/", host="127.0.0.1")[0] == 200
        assert get(port, "/", method="POST")[0] == 501


def test_an_error_of_a_record_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    with serving(folder) as port:
        status, text, _ = get(port, "/")
    assert status == 503 and "&lt;b&gt;run" in text and "<b>" not in text


def test_a_taken_port_is_an_error_for_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", "KD", 0, epochs=2)
    with serving(tmp_path / "run") as port:
        assert main(["report", str(tmp_path / "run"), "--serve", "--port", str(port)]) == 1
    assert "error:" in capsys.readouterr().err
