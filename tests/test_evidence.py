"""The page of evidence: its numbers and its headline are the records', open cells are open, its commands can be run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tempering.experiments import recipe as recipe_file
from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.presets import presets_from, with_controls
from tempering.reports.records import pack, write_cell
from tempering.utils.files import sealed
from tests.lazy_modules import LazyModule
from tests.paths import ROOT
from tests.records_made import RECORDED, make_run

stats = LazyModule("scipy.stats")

RECIPE = ROOT / "tempering" / "recipes" / "cifar100.py"
CORE = "supervised,kd,kd-matched,dtkd-published,dtkd"
FLAGS = ["--epochs=60", "--teacher=resnet14", "--student=resnet8", "--teacher-epochs=240"]
NETS = {
    "student": {"name": "resnet8"},
    "teacher": {"name": "resnet14", "identity": "5f" * 32, "scores": {"test": {"accuracy": 0.6712}}},
    "data": {"name": "cifar100", "identity": "ab" * 32},
}
# label -> accuracies of seeds
SCORES = {
    "student alone": (0.560, 0.571, 0.566),
    "KD": (0.562, 0.574, 0.565),
    "KD, weight-matched": (0.601, 0.612, 0.604),
    "DTKD published": (0.590, 0.604, 0.591),
    "DTKD exact": (0.600, 0.614, 0.603),
}
STAGES = ("teachers", "screen", "full", "ablations", "others", "resnet20", "short")


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import evidence  # pyright: ignore[reportMissingImports]

    return evidence


def grid(root: Path, scores: dict[str, tuple[float | None, ...]], methods: str = CORE, **options: Any) -> Path:
    """The folder of a comparison at that many seeds; a score of None leaves its cell open."""
    folder = root / options.get("name", "evidence-screen")
    presets = presets_from(methods, options.get("temperatures"))
    plan = compare_plan.plan_for(RECIPE, presets, range(options.get("seeds", 3)), FLAGS, options.get("control"))
    folder.mkdir(parents=True)
    compare_plan.write(folder, plan)
    for i, cell in enumerate(plan.cells):
        end = dict(enumerate(scores.get(cell.label, ()))).get(cell.seed)
        if end is None:
            continue
        like = cell.label if cell.label in RECORDED else "DTKD exact"
        nets = NETS | ({"teacher": None} if cell.label == "student alone" else {})
        made = root / "runs" / f"{folder.name}-{i}"
        make_run(made, cell.label, cell.seed, like=like, order=i, end=end, epochs=4, best_by="test/accuracy", **nets)
        write_cell(compare_plan.record_of(folder, cell), pack(made))
    return folder


def written(evidence: ModuleType, out: Path, *folders: Path) -> str:
    assert evidence.main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def row(text: str, begin: str) -> list[str]:
    return [c.strip() for c in next(x for x in text.splitlines() if x.startswith(f"| {begin} |")).strip("|").split("|")]


def test_the_numbers_are_those_of_the_records(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again with numpy and scipy alone."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    text = written(evidence, tmp_path / "page.md", grid(tmp_path, SCORES))
    for label, control in (("DTKD published", "KD, weight-matched"), ("DTKD exact", "DTKD published")):
        gaps = 100 * (np.array(SCORES[label]) - np.array(SCORES[control]))
        half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / np.sqrt(3)
        strong = "**" * bool(stats.ttest_1samp(gaps, 0.0).pvalue < 0.05)
        line = next(x for x in text.splitlines() if f"| {label} minus {control} |" in x)
        assert line.endswith(f"| 3 of 3 | {strong}{gaps.mean():+.2f} ± {half:.2f}{strong} | {half:.2f} | - |")
    own = 100 * np.array(SCORES["DTKD exact"])
    found = row(text, "DTKD exact")
    assert found[1:3] == ["3", f"{own.mean():.2f} ± {own.std(ddof=1):.2f}"]
    assert row(text, "DTKD published")[5] == "62.88" and row(text, "KD")[5] == "59.10", "the authors' beside ours"
    assert (
        "The comparison of the authors | DTKD published minus KD | 3 of 3 | **+2.80 ± 0.50** | 0.50 | +3.78 |" in text
    )
    assert row(text, "resnet14")[1:] == ["67.12", "-", "- of 240", "-"]


def test_it_is_made_from_the_records_alone_byte_for_byte(evidence: ModuleType, tmp_path: Path) -> None:
    folder = grid(tmp_path, SCORES)
    first = written(evidence, tmp_path / "page.md", folder)
    made = {path.name: path.read_bytes() for path in (tmp_path / "figures" / "evidence").iterdir()}
    assert sorted(made) == [f"screen-{kind}.svg" for kind in ("learning", "result", "temperatures")]
    for name, svg in made.items():
        assert f"(figures/evidence/{name})" in first
        assert ElementTree.fromstring(svg).tag.endswith("svg") and b"DTKD exact" in svg and b"nan" not in svg
    shutil.rmtree(tmp_path / "figures")
    (tmp_path / "page.md").unlink()
    shutil.rmtree(tmp_path / "runs")
    assert written(evidence, tmp_path / "page.md", folder) == first
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "figures" / "evidence").iterdir()}


def test_an_edited_record_is_refused(evidence: ModuleType, tmp_path: Path) -> None:
    folder = grid(tmp_path, SCORES)
    record = next((folder / "records").glob("dtkd-exact-s0*"))
    cell = json.loads(record.read_text())
    cell["facts"]["result"]["last"]["test"]["accuracy"] = 0.7
    record.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match=r"dtkd-exact-s0.* was edited"):
        written(evidence, tmp_path / "page.md", folder)


def test_open_cells_are_shown_as_open(evidence: ModuleType, tmp_path: Path) -> None:
    some = SCORES | {"DTKD exact": (0.600, 0.614, None), "DTKD published": (None, None, None)}
    text = written(evidence, tmp_path / "page.md", grid(tmp_path, some))
    assert "| `evidence-screen` | 60 epochs, resnet14 to resnet8 | 11 of 15 |" in text
    assert row(text, "DTKD published")[1:4] == ["0 of 3; open: 0, 1, 2", "-", "-"]
    assert row(text, "DTKD exact")[1] == "2 of 3; open: 2"
    assert "| DTKD published minus KD, weight-matched | 0 of 3 | open | - | - |" in text
    assert "**DTKD is not shown to beat KD at its own total weights (60 epochs, resnet14 to resnet8, so far).**" in text
    assert (
        "over 2 paired seeds so far, with an interval that includes zero; the smallest difference that they could have"
        in text
    )


def test_a_shorter_teacher_is_named_where_a_stage_is(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    folder = grid(tmp_path, SCORES)
    plan = json.loads((folder / "plan.json").read_text())
    plan["flags"] |= {"teacher_epochs": "12", "epochs": "8"}
    (folder / "plan.json").write_text(sealed({name: value for name, value in plan.items() if name != "sha256"}))
    text = written(evidence, tmp_path / "page.md", folder)
    assert "## screen: 8 epochs, resnet14 of 12 to resnet8\n" in text and "- of 12 |" in text


def test_before_anything_is_finished(evidence: ModuleType, tmp_path: Path) -> None:
    nothing = "**No run of any stage is finished yet.**"
    text = written(evidence, tmp_path / "page.md", tmp_path / "evidence-full-resnet14")
    assert nothing in text and "| `evidence-full-resnet14` | not started | - |" in text and "![" not in text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"make evidence-{stage} DATA=DIR" in text and f"\nevidence-{stage}:" in makefile
    planned = written(evidence, tmp_path / "page.md", grid(tmp_path, {}))
    assert nothing in planned and "| 0 of 15 |" in planned and "![" not in planned


@pytest.mark.parametrize(
    ("published", "exact", "said"),
    [
        ((0.62, 0.633, 0.625), (0.60, 0.614, 0.603), "DTKD published beats KD at DTKD's own total weights ("),
        (
            (0.62, 0.633, 0.625),
            (0.63, 0.643, 0.635),
            "DTKD published and DTKD exact beat KD at DTKD's own total weights (",
        ),
        (
            (0.58, 0.593, 0.585),
            (0.57, 0.583, 0.575),
            "DTKD does not beat KD at its own total weights: DTKD published and",
        ),
        (
            (0.58, 0.593, 0.585),
            (0.60, 0.614, 0.603),
            "DTKD is not shown to beat KD at its own total weights; DTKD published ends",
        ),
        ((0.60, 0.614, 0.603), (0.60, 0.614, 0.603), "DTKD is not shown to beat KD at its own total weights ("),
        (
            (0.62, None, None),
            (None, None, None),
            "Not decided yet: no DTKD method shares two finished seeds with KD, weight",
        ),
    ],
)
def test_the_headline(
    evidence: ModuleType, tmp_path: Path, published: tuple[Any, ...], exact: tuple[Any, ...], said: str
) -> None:
    scores = SCORES | {"DTKD published": published, "DTKD exact": exact}
    text = written(evidence, tmp_path / "page.md", grid(tmp_path, scores))
    assert f"\n**{said}" in text
    if None in published:
        assert (
            "DTKD published minus KD, weight-matched is +1.90 points over 1 paired seed so far, without an interval"
            in text
        )


def test_the_longest_stage_decides(evidence: ModuleType, tmp_path: Path) -> None:
    worse = grid(tmp_path / "a", SCORES | {"DTKD exact": (0.57, 0.583, 0.575), "DTKD published": (0.5, 0.51, 0.5)})
    better = grid(tmp_path / "b", SCORES | {"DTKD exact": (0.63, 0.643, 0.635)}, name="evidence-full-resnet14")
    assert "**DTKD exact beats KD" in written(evidence, tmp_path / "page.md", better, worse)
    assert "**DTKD does not beat KD" in written(evidence, tmp_path / "page.md", worse, better)


def test_exact_beside_the_best_fixed_temperature(evidence: ModuleType, tmp_path: Path) -> None:
    taus = {2: (0.57, 0.58), 4: (0.61, 0.60), 8: (0.59, None)}
    scores: dict[str, tuple[float | None, ...]] = {}
    for tau, (exact, fixed) in taus.items():
        scores |= {f"dtkd @ sharpness({tau})": (exact,), f"dtkd @ static({tau})": (fixed,)}
    options = {"temperatures": ",".join(f"{kind}({tau})" for kind in ("sharpness", "static") for tau in taus)}
    options |= {"methods": "dtkd", "seeds": 1, "control": "dtkd @ static(4)"}
    text = written(evidence, tmp_path / "page.md", grid(tmp_path / "open", scores, **options))
    assert (
        "| 3, 1, 1 | 4 | 61.00 | 60.00 | +1.00 | open |" in text
        and "the best fixed" not in text.split("| 3, 1, 1 |")[1]
    )
    assert "| 3, 1, 1 | 8 | 59.00 | open | open | open |" in text
    whole = grid(tmp_path / "whole", scores | {"dtkd @ static(8)": (0.585,)}, **options)
    text = written(evidence, tmp_path / "page.md", whole)
    assert "| 3, 1, 1 | 8 | 59.00 | 58.50 | +0.50 | -1.00 |" in text
    assert (
        "- With weights 3, 1, 1 the best fixed temperature is 4 (60.00 %, seed 0); exact is above it at tau 4." in text
    )


def test_kd_at_the_same_weights_is_a_fixed_temperature_over_the_common_seeds(
    evidence: ModuleType, tmp_path: Path
) -> None:
    methods = f"{CORE},dtkd(temperature=sharpness(8)),dtkd(temperature=static(8))"
    scores = SCORES | {"dtkd(temperature=sharpness(8))": (0.61,), "dtkd(temperature=static(8))": (0.59,)}
    text = written(evidence, tmp_path / "page.md", grid(tmp_path, scores, methods))
    assert "| 3, 1, 1 | 4 | 60.00 | 60.10 | -0.10 | -0.10 |" in text
    assert "| 3, 1, 1 | 8 | 61.00 | 59.00 | +2.00 | +0.90 |" in text
    assert "is 4 (60.10 %, seed 0); exact is above it at tau 8." in text
    alone = written(evidence, tmp_path / "alone.md", grid(tmp_path / "alone", SCORES))
    assert "minus the best fixed" not in alone  # one temperature chooses nothing


def test_teachers_are_packed_once_they_are_done(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    trained = {"student": {"name": "resnet20"}, "teacher": None, "data": NETS["data"]}
    for name, status in (("resnet20-aa", "done"), ("resnet56-bb", "running")):
        folder = tmp_path / "teachers" / name
        make_run(folder, f"teacher {name}", 0, like="student alone", end=0.69, epochs=4, status=status, **trained)
    assert evidence.main(["--teachers", str(tmp_path / "teachers"), "--out", str(tmp_path / "page.md")]) == 0
    records = sorted((tmp_path / "results" / "evidence-teachers" / "records").iterdir())
    assert [path.name for path in records] == ["resnet20-aa.json"]
    found = row((tmp_path / "page.md").read_text(encoding="utf-8"), "resnet20")
    assert found[1] == "69.00" and found[4] == "69.06 (TTM's README)"
    records[0].write_text(records[0].read_text().replace('"accuracy":0.69', '"accuracy":0.75'))
    with pytest.raises(ValueError, match="was edited"):
        evidence.main(["--out", str(tmp_path / "page.md")])


def test_notes_are_taken_over_as_they_are(evidence: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "evidence-notes.md").write_text("## In our words\n\n*What was learned*: <nothing> yet.\n")
    text = written(evidence, tmp_path / "page.md", tmp_path / "none")
    assert "\n\n## In our words\n\n*What was learned*: <nothing> yet.\n\n## Status" in text


def test_the_committed_page_is_up_to_date(evidence: ModuleType) -> None:
    docs, places = ROOT / "docs", Path("figures", "evidence")
    folders = [evidence.RESULTS / name for name in evidence.FOLDERS]
    text, svgs = evidence.page(folders, evidence.RESULTS / "evidence-teachers", places, docs / "evidence-notes.md")
    assert (docs / "evidence.md").read_text(encoding="utf-8") == text, "docs/evidence.md is out of date; make pages"
    for name, svg in svgs.items():
        assert (docs / places / name).read_text(encoding="utf-8") == svg, f"{name} is out of date; make pages"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_every_stage_can_be_run(evidence: ModuleType) -> None:
    """Flags and presets of the Makefile's commands are read as `compare` reads them; nothing is trained."""
    import evidence_tables as tables  # pyright: ignore[reportMissingImports]

    asked = [f"evidence-{stage}" for stage in STAGES]
    done = subprocess.run(["make", "-n", *asked, "DATA=DIR"], capture_output=True, text=True, cwd=ROOT, check=True)
    presets: dict[str, dict[str, set[int]]] = {}
    for line in done.stdout.replace("\\\n", "").splitlines():
        words = shlex.split(line) if " -m tempering " in line else []
        if "run" in words:
            recipe_file.check_flags(RECIPE, words[words.index("cifar100") + 1 :])
        if "compare" not in words:
            continue
        own, flags = words[: words.index("--")], words[words.index("--") + 1 :]
        given = dict(pairwise(own))
        recipe_file.check_flags(RECIPE, flags)
        found = presets_from(given["--methods"], given.get("--temperatures"))
        found = found if "--no-controls" in own else with_controls(found)[0]
        plan = compare_plan.plan_for(RECIPE, found, range(int(given["--seeds"])), flags)
        taught, epochs = plan.flags["teacher_epochs"], plan.flags["epochs"]
        assert (taught, epochs) in (("240", "60"), ("240", "240"), ("12", "8"))
        cells = presets.setdefault(Path(given["--out"]).name, {})
        for cell in plan.cells:
            cells.setdefault(cell.label, set()).add(cell.seed)
        assert given.get("--control") in (None, *cells)
    assert set(presets) == set(evidence.FOLDERS)
    wanted = {label for pair in tables.PLANNED for label in pair[:2]}
    assert wanted <= set(presets["evidence-screen"]) and len(presets["evidence-screen"]) == 19
    one = {name: {label for label, seeds in found.items() if len(seeds) == 1} for name, found in presets.items()}
    assert {len(seeds) for found in presets.values() for seeds in found.values()} == {1, 3}
    taus = {f"dtkd @ {kind}({tau})" for kind in ("static", "sharpness") for tau in (2, 8)}
    assert {name: found for name, found in one.items() if found} == {
        "evidence-ablations": set(presets["evidence-ablations"]),
        "evidence-short": taus,
    }
    assert len(presets["evidence-ablations"]) == 18
