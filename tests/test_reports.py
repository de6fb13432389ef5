"""The report: records are read or refused by name, and the page shows them, alone, offline and the same every time."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from tempering.cli import main as cli
from tempering.reports import figures, page
from tempering.reports.charts import Series, lines, tag
from tempering.reports.compare import compare, display_name
from tempering.reports.page import render, write_page
from tempering.reports.records import RunRecord, find_runs, load_run
from tempering.reports.table import cells
from tempering.utils.text import printable
from tests.cases import each
from tests.records_made import RECORDED, make_run, make_set

SECTIONS = ("result", "table", "learning", "temperatures", "terms", "agreement", "calibration", "classes")
SECTIONS += ("confusions", "runs")
NO_END = {"meta", "input", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and texts by element and by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.path: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.section = "header"
        self.feed(html)
        self.close()
        assert not self.path, f"not closed: {self.path}"
        self.svgs = {
            svg.attrib["aria-labelledby"].removesuffix("-t"): svg
            for svg in map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", html, re.DOTALL))
        }

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in NO_END:
            self.path.append(name)
        if name == "section":
            self.section = dict(attrs)["id"] or ""
        if name == "tr":
            self.rows.setdefault(self.section, []).append([])
        if name in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.path.pop() == name

    def handle_data(self, text: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + text
        if "td" in self.path or "th" in self.path:
            self.rows[self.section][-1][-1] += text

    def told(self, key: str) -> str:
        """What a chart tells those who cannot see it."""
        return next(part.text or "" for part in self.svgs[key] if part.tag == "desc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five methods of three seeds."""
    root = tmp_path_factory.mktemp("reports") / "made"
    make_set(root)
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[RunRecord]:
    return [load_run(path) for path in find_runs([folder])]


@pytest.fixture(scope="module")
def html(runs: list[RunRecord]) -> str:
    return render(runs)


@pytest.fixture(scope="module")
def read(html: str) -> Page:
    return Page(html)


def one(folder: Path, label: str = "KD", **facts: Any) -> RunRecord:
    return load_run(make_run(folder, label, 0, like="DTKD exact", epochs=4, **facts))


# the page as a file


def test_the_page_loads_nothing_and_runs_nothing(html: str, read: Page) -> None:
    assert len(html.encode()) < 500_000
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {name for name, _ in read.elements}
    for name, attributes in read.elements:
        assert not {"src", "srcset", "background"} & set(attributes)
        assert not [key for key in attributes if key.startswith("on")]
        if "href" in attributes:
            assert name == "a" and (attributes["href"] or "").startswith("https://arxiv.org/")
    assert "@import" not in html and "url(" not in html
    policy = next(a["content"] for name, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'", "a browser would refuse the rest"
    assert html.isascii() or 'charset="utf-8"' in html


def test_every_name_on_the_page_is_given_once_and_is_there(html: str, read: Page) -> None:
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in read.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert key not in attributes or attributes[key] in ids
    shown = {a["id"] for name, a in read.elements if name == "input"}
    assert set(re.findall(r"#(show-\w+):not", html)) == shown == {f"show-a{i}" for i in range(5)}


def test_every_figure_is_there(read: Page) -> None:
    assert [a["id"] for name, a in read.elements if name == "section"] == list(SECTIONS)
    wanted = {"each-seed", "versus-0", "versus-1", "score", "score-late", "loss-scored", "loss-train", "top5"}
    wanted |= {"temperature-3", "temperature-4", "difficulty-3", "difficulty-4", "gap", "fallback"}
    wanted |= {"term-0", "term-1", "term-2", "agreement", "classes-all", "classes-gap"}
    wanted |= {"rate", "a1-terms", "a2-terms", "a3-terms", "a4-terms"}
    assert set(read.svgs) == wanted | {f"calibration-{i}" for i in range(5)}
    for key, svg in read.svgs.items():
        numbers = [v for part in svg.iter() for k, v in part.attrib.items() if k in ("d", "x1", "y1", "cx", "cy", "r")]
        assert numbers and not [v for v in numbers if "nan" in v or "inf" in v], key
        assert read.told(key)
    assert "missing" not in {a.get("class") for _, a in read.elements}


def test_the_same_records_give_the_same_bytes_in_any_order(runs: list[RunRecord], html: str, tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(runs, len(runs))
    assert write_page(shuffled, tmp_path / "deep" / "report.html").read_bytes() == html.encode()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


# what it says


def test_the_table_on_the_page_is_the_comparisons(runs: list[RunRecord], read: Page) -> None:
    found = compare(runs)
    own = [[text for text, _ in cells(found, group).values()] for group in found.groups]
    shown = [[text.replace("\u00a0", " ") for text in row] for row in read.rows["table"]]
    assert shown == [list(cells(found, found.groups[0])), *own]
    strong = sum(bold for group in found.groups for _, bold in cells(found, group).values())
    assert sum(name == "strong" for name, _ in read.elements) == strong > 0


def test_curves_end_where_the_records_end(folder: Path, read: Page) -> None:
    """Computed again from the raw lines."""
    for label in RECORDED:
        order, name = list(RECORDED).index(label), display_name(label)
        epochs = [_lines(folder / f"{order}-{seed}" / "epochs.jsonl") for seed in range(3)]
        accuracy = 100 * np.mean([lines[-1]["test"]["accuracy"] for lines in epochs])
        assert f"{name} ends at {accuracy:.4g}" in read.told("score")
        if label != "student alone":
            agreement = 100 * np.mean([lines[-1]["test"]["agreement"] for lines in epochs])
            assert f"{name} ends at {agreement:.4g}" in read.told("agreement")
        if not label.startswith("DTKD"):
            continue
        steps = [_lines(folder / f"{order}-{seed}" / "steps.jsonl") for seed in range(3)]
        first, last = (np.mean([lines[i]["T_teacher"]["mean"] for lines in steps]) for i in (0, -1))
        assert f"teacher from {first:.2f} to {last:.2f}" in read.told(f"temperature-{order}")
        fell = sum(line["policy"]["fallback"] for lines in steps for line in lines)
        assert (f"{fell} rows fell back" in read.texts["temperatures"]) == (label == "DTKD published")
        assert f"{name} ends at {np.mean([lines[-1]['logsumexp_gap'] for lines in steps]):.4g}" in read.told("gap")
    assert "No row fell back to the reference temperature" in read.texts["temperatures"]
    assert "Constant: KD at 4; KD, equal weights at 4." in read.texts["temperatures"]


def test_bands_hold_the_5_and_95_percent_of_rows(read: Page) -> None:
    """The teacher's band at the first step: its edges lie as far from the mean as the record says."""
    svg = read.svgs["temperature-4"]
    group = next(g for g in svg if g.attrib.get("class") == "teacher")
    band, line = (next(p.attrib["d"] for p in group if p.attrib.get("class") == name) for name in ("band", "line"))
    outline = [tuple(map(float, pair.split(","))) for pair in band.strip("MZ").split()]
    mean = [tuple(map(float, pair.strip("M").split(","))) for pair in line.split()]
    upper, lower = outline[0], outline[-1]
    assert upper[0] == lower[0] == mean[0][0]
    assert upper[1] < mean[0][1] < lower[1], "95 % above the mean, 5 % below, y downwards"
    assert lower[1] - mean[0][1] == pytest.approx(mean[0][1] - upper[1], abs=0.2)


def test_calibration_and_confusions_are_those_of_the_records(folder: Path, read: Page) -> None:
    analyses = [json.loads((folder / f"4-{seed}" / "analysis.json").read_text()) for seed in range(3)]
    ece = {side: 100 * np.mean([a["ece"][side] for a in analyses]) for side in ("student", "teacher")}
    assert f"student {ece['student']:.2f} %, teacher {ece['teacher']:.2f} %" in read.told("calibration-4")
    pooled = sum(a["reliability"]["student"][14]["count"] for a in analyses)
    said = [part.text or "" for part in read.svgs["calibration-4"].iter("title")]
    assert any(f"{pooled} rows" in text for text in said), "seeds are pooled"
    single = analyses[0]["reliability"]["teacher"][14]["count"]
    assert any(text.startswith("DTKD exact: teacher") and f"{single} rows" in text for text in said), (
        "one teacher, once"
    )
    head = ["true", "predicted", "student", "teacher", "gap"]
    first = read.rows["confusions"].index(head)
    true, predicted, student, teacher, gap = read.rows["confusions"][first + 1]
    counts = [
        (p["student"], p["teacher"])
        for order in ("1-0", "1-1", "1-2")
        for p in json.loads((folder / order / "analysis.json").read_text())["confusions"]
        if (f"class {p['true']}", f"class {p['predicted']}") == (true, predicted)
    ]
    mean = np.mean(counts, axis=0)
    assert (student, teacher, gap) == (f"{mean[0]:.1f}", f"{mean[1]:.1f}", f"{mean[0] - mean[1]:+.1f}")


def test_what_it_takes_to_run_it_again_is_there(read: Page) -> None:
    said = read.texts["runs"]
    assert said.count("tempering run recipes/digits.py --method=dtkd --seed=2") == 2
    for text in ("torch 2.13.0", "Example CPU 3000", "0123456789abcdef0123456789abcdef01234567", "self-check ok"):
        assert said.count(text) == 15
    assert [said.count(f"seed {seed}") for seed in range(3)] == [5, 5, 5]


def test_words_and_numbers_of_others_are_escaped(tmp_path: Path) -> None:
    bad = '<script>alert("1")</script>&'
    run = one(tmp_path / "a", bad, error=bad, command=["run", bad], data={"name": bad}, reported={"value": 1})
    analysis = {"class_names": [bad] * 10, "per_class": {"student": [0.5] * 10}}
    html = render([RunRecord(run.source, run.facts, run.epochs, [{"step": 1, "terms": {bad: 1.0}}], analysis)])
    assert "<script" not in html and "alert(&#34;1&#34;)" in html
    assert bad in Page(html).texts["runs"]


@pytest.mark.parametrize("sign", ["\x1b[2J", "\x9b2J", "\r", "\u202e"])
def test_control_characters_of_records_do_not_reach_the_terminal(
    sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("student alone", f"KD{sign}done"):
        folder = make_run(tmp_path / str(len(label)), label, 0, like="KD")
        (folder / "facts.json").write_text(
            (folder / "facts.json").read_text().replace('"digits"', json.dumps(f"d{sign}"))
        )
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    assert cli.main(["report", str(tmp_path / f"none{sign}")]) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err, (tmp_path / "r.html").read_text(encoding="utf-8")):
        assert sign not in text and ascii(sign)[1:-1] in text.replace("\n", "")
    assert printable(f"a\n\tb{sign}") == f"a\n\tb{ascii(sign)[1:-1]}"


def test_an_arm_that_differs_in_everything_keeps_a_color_and_a_switch(tmp_path: Path) -> None:
    many = [one(tmp_path / str(i), f"method {i}") for i in range(20)]
    html = render(many)
    said = re.findall(r"\.(a\d+) { --c: var\(--c(\d)\); --dashes: ([\d ]+|none) }", html)
    assert len(said) == len({name for name, *_ in said}) == len({(color, dashes) for _, color, dashes in said}) == 20


def test_charts_leave_out_another_network(tmp_path: Path) -> None:
    runs = [one(tmp_path / str(i), f"method {i}") for i in range(2)]
    read = Page(render([*runs, one(tmp_path / "big", "large one", student={"name": "large"})]))
    assert "large one" in read.texts["table"] and "large one" not in read.told("score")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# what is not there


def test_sections_say_what_is_missing(tmp_path: Path) -> None:
    read = Page(render([RunRecord(tmp_path / "x", one(tmp_path / "y", status="running").facts)]))
    for section, text in {
        "result": "No run has finished.",
        "learning": "No epoch was evaluated",
        "temperatures": "No method of these runs has a temperature.",
        "terms": "No step was logged.",
        "agreement": "No run was evaluated with a teacher.",
        "calibration": "No run wrote an analysis.",
        "classes": "No run wrote an analysis.",
        "confusions": "No run with a teacher wrote confusions.",
    }.items():
        assert text in read.texts[section]
    assert "nothing to compare yet" in read.texts["header"]


def test_a_run_of_one_epoch_and_one_step_has_a_page(tmp_path: Path) -> None:
    run = one(tmp_path / "a")
    read = Page(render([RunRecord(run.source, run.facts, run.epochs[:1], run.steps[:1], run.analysis)]))
    assert {"score", "gap", "term-0"} <= set(read.svgs)


@pytest.mark.parametrize(
    ("package", "text"),
    [("jinja2", "the HTML report needs jinja2: pip install"), ("scipy.stats", "intervals need scipy: pip install")],
)
def test_a_missing_extra_is_named(
    runs: list[RunRecord], monkeypatch: pytest.MonkeyPatch, package: str, text: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{text} 'tempering\\[report\\]'"):
        render(runs)


def test_charts_need_no_plotting_library(runs: list[RunRecord], html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert render(runs) == html


def test_a_page_of_many_runs_is_a_summary_with_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(RECORDED)
    labels = [*names, *(f"{names[i % 5]} v{i}" for i in range(5, 20))]
    folders = [
        make_run(tmp_path / "runs" / f"{i} #{seed}", label, seed, like=names[i % 5], order=i, epochs=4)
        for i, label in enumerate(labels)
        for seed in range(2)
    ]
    runs = [load_run(folder) for folder in folders]
    out = tmp_path / "pages" / "report.html"
    sizes = [len(render(runs, extent=extent, folder=out.parent).encode()) for extent in page.EXTENTS]
    for limit, links, charted in ((sizes[0], 0, 20), (sizes[0] - 1, 40, 20), (sizes[1] - 1, 40, 12), (1000, 1, 12)):
        monkeypatch.setattr(page, "LIMIT", limit)
        read = Page(text := write_page(runs, out).read_text(encoding="utf-8"))
        addresses = [str(a["href"]) for name, a in read.elements if name == "a" and "/runs" in str(a["href"])]
        assert len(addresses) == links and all((out.parent / unquote(to)).is_dir() for to in addresses), addresses
        assert ("This page is a summary" in text) == bool(links) and len(read.rows["table"]) == 21
        assert text.count('type="checkbox"') == charted
        assert len(text.encode()) <= limit or limit == 1000
    few = Page(render(runs, extent=page.Extent(charts=2, rows=3, runs="folders")))
    assert [row[0] for row in few.rows["table"][1:3]] == ["student alone", "KD, equal weights"], "the controls stay"


def test_no_chart_is_enlarged_much(html: str) -> None:
    sizes = re.findall(r'viewBox="0 0 (\S+) \S+" style="max-width: (\S+)px"', html)
    assert len(sizes) == html.count("<svg") and all(float(most) <= 1.25 * float(width) for width, most in sizes)


# curves


def test_seeds_that_were_scored_at_other_steps_are_averaged_where_both_are() -> None:
    def run(points: dict[int, object]) -> RunRecord:
        return RunRecord(Path("x"), {}, [{"epoch": x, "loss": y} for x, y in points.items()])

    both = [run({1: 1.0, 3: 3.0, 5: float("nan")}), run({2: 4.0, 3: 5.0, 4: None})]
    found = figures.curve(both, "epochs", "epoch", figures.inside("loss"))
    assert found is not None and found.seeds == 2
    assert (found.x, found.y) == ([1, 2, 3], [1.0, 3.0, 4.0])
    assert (found.low, found.high) == ([1.0, 2.0, 3.0], [1.0, 4.0, 5.0])
    assert figures.curve([run({})], "epochs", "epoch", figures.inside("loss")) is None


@pytest.mark.parametrize("y", [[1.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, None, 2.0], [5.0, 5.0]])
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_stays_in_its_box(y: list[float | None], log: bool) -> None:
    svg = lines("k", "t", "d", [Series("a1", "n", range(len(y)), y)], x_label="x", y_label="y", log=log)
    drawn = ElementTree.fromstring(svg)
    path = next(p.attrib["d"] for p in drawn.iter("path"))
    for x, at in (map(float, pair.strip("M").split(",")) for pair in path.split()):
        assert 0 <= x <= 480 and 0 <= at <= 270
    assert path.count("M") == 1 + y.count(None)


def test_a_tag_escapes_what_is_no_markup() -> None:
    assert tag("text", "<b>", tag("i"), class_='"', x=1.26) == '<text class="&quot;" x="1.3">&lt;b&gt;<i/></text>'


@each(
    "unknown, said",
    [
        (
            {},
            ["All runs share data, networks, settings, versions and kind of host; only the method differs."],
        ),
        (
            {"data": {"identity": None}},
            [
                "All runs share networks, settings, versions and kind of host.",
                "Not recorded in all runs, so not compared: data.",
            ],
        ),
        (
            {"data": {}, "host": {}, "versions": {}, "commit": None},
            [
                "All runs share networks and settings.",
                "Not recorded in all runs, so not compared: data, versions, kind of host.",
            ],
        ),
        (
            {"student": {}, "optimizer": None},
            [
                "All runs share data, versions and kind of host.",
                "Not recorded in all runs, so not compared: networks, settings.",
            ],
        ),
    ],
)
def test_what_is_not_recorded_is_not_said_to_be_shared(
    unknown: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    runs = [load_run(make_run(tmp_path / label, label, 0, **unknown)) for label in list(RECORDED)[:2]]
    notes = compare(runs).notes
    for sentence in said:
        assert sentence in notes
    assert sum(note.startswith(("All runs share", "Not recorded")) for note in notes) == len(said)


def test_labels_of_lines_that_end_near_each_other_are_apart_and_above_the_axis() -> None:
    series = [Series("s", name, [0, 1], [1, end], text=name) for name, end in (("a", 3.7), ("b", 0.02), ("c", 0.3))]
    drawn = lines("k", "t", "d", series, x_label="epoch", y_label="mean", y_range=(0.0, 10.0))
    texts = [t for t in ElementTree.fromstring(drawn).iter("text") if "said" in t.attrib["class"]]
    places = [float(t.attrib["y"]) for t in texts]
    axis = float(re.search(r'class="axis"[^>]* y1="([\d.]+)"', drawn)[1])  # pyright: ignore[reportOptionalSubscript]
    assert [t.text for t in texts] == ["a", "c", "b"], "from the top"
    assert min(b - a for a, b in pairwise(places)) >= 12.9 and places[-1] < axis, places
