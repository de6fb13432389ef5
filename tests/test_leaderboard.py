"""The leaderboard: what chooses its control, what its p-values are, and that its page is made from the records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks import leaderboard as leaderboard_page
from tempering.experiments.compare import plan as compare_plan
from tempering.reports.intervals import difference, holm, pairs_needed
from tempering.reports.leaderboard import cells, leaderboard, reading
from tempering.reports.records import RunRecord, load_run
from tests.lazy_modules import LazyModule
from tests.paths import ROOT
from tests.records_made import make_run

stats = LazyModule("scipy.stats")
ARENA = ROOT / "benchmarks" / "results" / "arena16"


def kd(tau: float, **weights: float) -> dict[str, object]:
    weights = {"soft": 4.0, "hard": 1.0, "warmup": 1 / 12} | weights
    return {"name": "KD", **weights, "temperature": {"name": "Static", "tau": tau}}


def runs_of(
    root: Path, label: str, test: list[float], validation: float, method: Mapping[str, object]
) -> list[RunRecord]:
    found = []
    for seed, end in enumerate(test):
        run = load_run(make_run(root / f"{label}-{seed}", label, seed, like="KD", end=end, epochs=2, method=method))
        run.facts["result"]["last"]["validation"]["accuracy"] = validation + 0.001 * seed
        run.facts["result"]["last"]["test"]["accuracy"] = end
        found.append(run)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecord]:
    dynamic = {"name": "KD", "temperature": {"name": "Cosine", "tau": 4.0}}
    return [
        *runs_of(tmp_path, "tau 2", [0.50, 0.51, 0.53], 0.60, kd(2.0)),
        *runs_of(tmp_path, "tau 4", [0.60, 0.62, 0.61], 0.55, kd(4.0)),  # better on the test split alone
        *runs_of(tmp_path, "as in tables", [0.40, 0.41, 0.40], 0.90, kd(4.0, soft=0.9, hard=0.1)),  # other weights
        *runs_of(tmp_path, "cosine", [0.55, 0.57, 0.58], 0.50, dynamic),
        *runs_of(tmp_path, "worse", [0.45, 0.44, 0.47], 0.50, dynamic),
    ]


def test_the_control_is_chosen_on_the_validation_split_among_equal_weights(runs: list[RunRecord]) -> None:
    board = leaderboard(runs)
    assert board.best == "tau 2" and set(board.fixed) == {"tau 2", "tau 4"}
    assert set(board.p) == {"as in tables", "cosine", "worse"}, "fixed temperatures are no rivals"
    for run in runs:  # no score of the test split can change the choice
        run.facts["result"]["last"]["test"]["accuracy"] = 1.0 - run.facts["result"]["last"]["test"]["accuracy"]
    assert leaderboard(runs).best == "tau 2"
    for run in runs:
        if run.label == "tau 4":
            run.facts["result"]["last"]["validation"]["accuracy"] += 0.2
    assert leaderboard(runs).best == "tau 4"


def test_a_seed_that_one_fixed_temperature_lacks_does_not_count_for_the_others(runs: list[RunRecord]) -> None:
    for run in runs:
        if run.label == "tau 2":
            run.facts["result"]["last"]["validation"]["accuracy"] = 0.0 if run.seed == 2 else 0.6
    assert leaderboard(runs).best == "tau 4"
    assert leaderboard([run for run in runs if (run.label, run.seed) != ("tau 4", 2)]).best == "tau 2"


def test_the_table_has_places_paired_differences_and_corrected_p_values(runs: list[RunRecord]) -> None:
    board = leaderboard(runs)
    rows = {row["method"]: row for row in cells(board, {"cosine"})}
    assert list(rows) == ["tau 4", "cosine (yours)", "tau 2", "worse", "as in tables"]
    gaps = np.array([0.05, 0.06, 0.05])
    half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / 3**0.5
    assert rows["cosine (yours)"]["vs tau 2"] == f"+{100 * gaps.mean():.2f} ± {100 * half:.2f}"
    raw = {
        name: stats.ttest_rel([r.score("test/accuracy") for r in runs if r.label == name], [0.50, 0.51, 0.53]).pvalue
        for name in board.p
    }
    assert board.p == pytest.approx(holm(raw))
    assert [rows[name]["verdict"] for name in ("cosine (yours)", "tau 2", "as in tables")] == ["better", "", "worse"]
    assert rows["tau 4"]["verdict"] == "not compared", "a fixed temperature that validation did not choose"
    said = " ".join(reading(board))
    assert "chosen on the validation split: tau 2 60.10, tau 4 55.10" in said and "Holm for 3 methods" in said
    each = [
        stats.tstd(
            [
                (r.score("test/accuracy") or 0.0) - c
                for r, c in zip([r for r in runs if r.label == n], (0.50, 0.51, 0.53), strict=True)
            ]
        )
        for n in board.p
    ]
    assert board.spread == pytest.approx(float(np.mean(np.square(each))) ** 0.5)


def test_without_a_validation_split_the_usual_control_is_taken_and_without_any_it_is_an_error(tmp_path: Path) -> None:
    sgd = {"name": "DKD"}
    alone = runs_of(tmp_path, "student alone", [0.5, 0.6], 0.5, {"name": "Supervised"})
    assert leaderboard([*alone, *runs_of(tmp_path, "x", [0.5, 0.7], 0.5, sgd)]).best == "student alone"
    with pytest.raises(ValueError, match="a leaderboard needs finished runs of a control"):
        leaderboard(runs_of(tmp_path, "x", [0.5, 0.7], 0.5, sgd))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_p_is_scipys(n: int) -> None:
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found = difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found is not None and found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_holm_by_hand() -> None:
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(values) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


@pytest.mark.parametrize(("effect", "spread"), [(0.5, 0.31), (-0.25, 0.31), (1.0, 0.2)])
def test_the_pairs_needed_have_the_power_and_one_fewer_has_not(effect: float, spread: float) -> None:
    def power(n: int) -> float:
        edge, shift = stats.t.ppf(0.975, n - 1), abs(effect) / spread * n**0.5
        return float(stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift))

    n = pairs_needed(effect, spread)
    assert power(n) >= 0.8 - 1e-6 and (n == 2 or power(n - 1) < 0.8)
    assert pairs_needed(0.1, 0.0) == 2


# the page and the plan


def test_the_page_is_current() -> None:
    made = leaderboard_page.page(ROOT)
    assert made == (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8"), "made again: make pages"


def test_the_numbers_of_the_plan_are_those_of_the_records() -> None:
    plan = (ROOT / "docs" / "decisions" / "arena-16.md").read_text()
    by_label: dict[str, dict[int, float]] = {}
    for path in sorted((ROOT / "benchmarks" / "results" / "evidence-short" / "records").glob("*.json")):
        run = load_run(path)
        by_label.setdefault(run.label, {})[run.seed] = 100 * (run.score("test/accuracy") or 0.0)
    control = by_label["KD, weight-matched"]
    rivals = [label for label, each in by_label.items() if len(each) == 3 and label.startswith("DTKD")]
    gaps = {label: [by_label[label][seed] - control[seed] for seed in control] for label in rivals}
    spread = float(np.mean([np.var(each, ddof=1) for each in gaps.values()])) ** 0.5
    low, high = (f([np.std(each, ddof=1) for each in gaps.values()]) for f in (min, max))
    assert (
        f"deviation of {spread:.2f} points, pooled over four methods\nof three pairs (from {low:.2f} to {high:.2f})"
        in plan
    )
    table = {
        float(points): int(pairs) for points, pairs in re.findall(r"^\| (0\.\d+) \| (\d+) \|$", plan, re.MULTILINE)
    }
    assert table == {effect: pairs_needed(effect, round(spread, 2)) for effect in (0.5, 0.25, 0.2, 0.1)}
    seen = difference(by_label["DTKD, T_t and T_s alone"], control)
    assert (
        seen is not None and seen.half is not None and f"was {seen.mean:.2f} ± {seen.half:.2f} points above KD" in plan
    )
    assert f"half of what was seen before, need {pairs_needed(seen.mean / 2, spread)} pairs" in plan


def test_no_plan_chooses_anything_on_a_test_split() -> None:
    """Grids that hold no images out choose nothing: no page of theirs says that a value was tuned or chosen on test."""
    chooses = re.compile(
        r"\b(tuned|chosen|selected|picked|chooses?|searche[sd])\b[^.|]*\b(test (split|images|accuracy))", re.I
    )
    denied = re.compile(r"\b(no|not|nothing|none|never|without)\b", re.I)
    results = ROOT / "benchmarks" / "results"
    pages = [*(ROOT / "docs" / "decisions").glob("*.md"), *results.rglob("README.md"), ROOT / "docs" / "leaderboard.md"]
    for path in pages:
        for sentence in re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8")):
            match = chooses.search(sentence)
            assert match is None or denied.search(sentence) or "test split itself, so it is too high" in sentence, (
                path,
                sentence,
            )
    for path in results.rglob("study*.json"):
        assert '"test/' not in path.read_text(encoding="utf-8"), path
    for folder in (path.parent for path in ARENA.rglob("plan.json")):
        assert int(compare_plan.read(folder).flags["validation"]) > 0, folder


def test_runs_of_the_arena_are_pairs() -> None:
    """One seed: the same data, first cross entropy and augmentation, whatever the method."""
    first: dict[tuple[str, int], object] = {}
    for path in sorted(ARENA.glob("*/records/*.json")):
        facts, steps = (json.loads(path.read_text())[name] for name in ("facts", "steps"))
        hard = steps[0]["terms"]["hard"] / facts["method"]["hard"]
        same = (facts["data"]["identity"], facts["data"]["augmentation"], round(hard, 4))
        assert first.setdefault((path.parts[-3], facts["seed"]), same) == same, path
        taught = facts["method"]["name"] != "Supervised"
        assert not taught or facts["teacher"]["name"] == "resnet20"


def test_the_teacher_of_the_arena_is_committed_with_its_record() -> None:
    import torch
    from safetensors.torch import load_file

    from tempering.models import build, load

    weights, record = ARENA / "teacher" / "resnet20.safetensors", load_run(ARENA / "teacher" / "record.json")
    assert weights.stat().st_size < 1_000_000 and record.done and record.of("data")["name"] == "cifar100-16"
    net = load(build("resnet20", classes=100), weights).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 100)
    assert all(value.isfinite().all() for value in load_file(weights).values())
