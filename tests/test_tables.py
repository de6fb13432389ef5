"""Comparisons: intervals beside scipy's, tables beside numpy's, and words that say no more than the numbers do."""

from __future__ import annotations

import random
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tempering.reports.compare import Comparison, compare, display_name
from tempering.reports.intervals import difference
from tempering.reports.records import RunRecord, load_run, pack, read_cell, write_cell
from tempering.reports.table import cells, markdown, rich_table
from tempering.reports.text import headline, reading
from tests.lazy_modules import LazyModule
from tests.records_made import RECORDED, make_run, make_set

stats = LazyModule("scipy.stats")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Five methods of three seeds."""
    return [load_run(folder) for folder in make_set(tmp_path_factory.mktemp("made"), epochs=6)]


def made(root: Path, label: str, ends: dict[int, float], *, like: str = "KD", status: str = "done", **facts) -> list:
    """Runs of one method whose last test accuracies are ``ends``, by seed."""
    order = sum(1 for _ in root.iterdir()) if root.exists() else 0
    folders = [root / f"{order}-{seed}" for seed in ends]
    return [
        load_run(make_run(folder, label, seed, like=like, order=order, end=end, epochs=3, status=status, **facts))
        for folder, (seed, end) in zip(folders, ends.items(), strict=True)
    ]


def scores(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def said(found: Comparison) -> str:
    return " ".join(headline(found) + reading(found))


# intervals


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_a_paired_interval_is_scipys(n: int) -> None:
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found = difference(scores(*a), scores(*b))
    assert found is not None and found.half is not None and found.paired
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9)
    assert found.shown == (stats.ttest_rel(a, b).pvalue < 0.05)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (8, 2)])
def test_an_unpaired_interval_is_welchs(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), 3 * rng.normal(size=m)
    found = difference(scores(*a), {100 + seed: value for seed, value in enumerate(b)})
    assert found is not None and found.half is not None and not found.paired
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_detectable_difference_is_shown_in_four_of_five_experiments(n: int) -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=n)
    found = difference(scores(*sample), scores(*np.zeros(n)))
    assert found is not None and found.detectable is not None
    true = found.detectable / sample.std(ddof=1)  # in standard deviations of the paired differences
    experiments = true + rng.normal(size=(100_000, n))
    shown = (np.abs(stats.ttest_1samp(experiments, 0.0, axis=1).statistic) > stats.t.ppf(0.975, n - 1)).mean()
    assert shown == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("gap", [0.0, 0.02])
def test_seeds_that_agree_to_the_last_digit_give_no_interval(gap: float) -> None:
    control = scores(0.9, 0.91, 0.93)
    found = difference({seed: value + gap for seed, value in control.items()}, control)
    assert found is not None and (found.half, found.detectable, found.shown, found.n) == (None, None, False, 3)


def test_one_seed_beside_more_is_taken_with_its_own() -> None:
    """A grid that goes on: without an interval either way, the pair says more than two means of different seeds."""
    for group, control, sign in (({1: 0.5}, {0: 0.1, 1: 0.2, 2: 0.9}, 1), ({0: 0.1, 1: 0.2, 2: 0.9}, {1: 0.5}, -1)):
        found = difference(group, control)
        assert found is not None and found.paired and found.half is None and found.n == 1
        assert found.mean == pytest.approx(sign * 0.3)


def test_no_seed_no_difference() -> None:
    assert difference({}, scores(1.0)) is None and difference(scores(1.0), {}) is None


# the table


def test_the_tables_numbers_are_those_of_the_records(runs: list[RunRecord]) -> None:
    """Computed again from the raw facts, with numpy and scipy alone."""
    found = compare(runs)
    raw = {}
    for run in runs:
        raw.setdefault(run.label, []).append(run.facts["result"])
    last = {label: np.array([r["last"]["test"]["accuracy"] for r in results]) for label, results in raw.items()}
    assert [group.label for group in found.groups] == list(RECORDED)
    assert (found.controls, found.main) == (("student alone", "KD, weight-matched"), "KD, weight-matched")
    for group in found.groups:
        own, results = 100 * last[group.label], raw[group.label]
        best = 100 * np.array([r["best"]["test"]["accuracy"] for r in results])
        row = {head: text for head, (text, _) in cells(found, group).items()}
        assert row["method"] == display_name(group.label) and row["seeds"] == "3"
        assert row["test accuracy, last (%)"] == f"{own.mean():.2f} ± {own.std(ddof=1):.2f}"
        assert row["best (%)"] == f"{best.mean():.2f} ± {best.std(ddof=1):.2f}"
        epochs = [r["best"]["epoch"] for r in results]
        span = f"{min(epochs)}\u2013{max(epochs)}" if min(epochs) < max(epochs) else f"{epochs[0]}"
        assert row["best epoch"] == f"{span} of 6"
        assert row["ms / step"] == f"{np.mean([r['step_ms'] for r in results]):.1f}"
        assert row["train min"] == f"{np.mean([r['seconds'] for r in results]) / 60:.3g}"
        assert row["peak MB"] == f"{np.mean([r['peak_mb'] for r in results]):.0f}"
        for control in found.controls:
            text, strong = cells(found, group)[f"vs {display_name(control)} (points)"]
            if control == group.label:
                assert (text, strong) == ("control", False)
                continue
            gaps = 100 * (last[group.label] - last[control])
            test = stats.ttest_1samp(gaps, 0.0)
            half = (test.confidence_interval().high - test.confidence_interval().low) / 2
            assert text == f"{gaps.mean():+.2f} ± {half:.2f}"
            assert strong == (test.pvalue < 0.05)
            if control == found.main:
                shift = float(row["detectable (points)"]) / (gaps.std(ddof=1) / np.sqrt(3))
                power = stats.nct.sf(stats.t.ppf(0.975, 2), 2, shift)
                assert power == pytest.approx(0.8, abs=0.02), "two decimals of a point leave that much"


def test_the_same_records_give_the_same_table_in_any_order(runs: list[RunRecord]) -> None:
    text = markdown(compare(runs))
    for seed in range(5):
        assert markdown(compare(random.Random(seed).sample(runs, len(runs)))) == text


def test_markdown_stands_whatever_a_label_holds(tmp_path: Path) -> None:
    found = compare(made(tmp_path, "a|b *c* <img src=x>\n[d](e)", scores(0.9, 0.8)))
    row = next(line for line in markdown(found).splitlines() if line.startswith(r"| a\|b"))
    assert row.startswith(r"| a\|b \*c\* \<img src=x\> \[d\](e) | 2 | 85.00 ± 7.07 |")


def test_a_terminal_of_80_columns_is_wide_enough(runs: list[RunRecord]) -> None:
    file, found = StringIO(), compare(runs)
    Console(width=80, file=file).print(rich_table(found))
    text = file.getvalue()
    assert "equal weights" in text and "DTKD published" in text and found.metric.show(found.groups[0].mean) in text


# what is missing


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    found = compare(
        [
            *made(tmp_path, "student alone", scores(0.9), like="student alone"),
            *made(tmp_path, "KD", scores(0.92)),
        ]
    )
    assert cells(found, found.group("KD"))["vs student alone (points)"] == ("+2.00 (no interval)", False)
    assert cells(found, found.group("KD"))["detectable (points)"] == ("-", False)
    assert headline(found)[0] == "KD is 2.00 points better than student alone, on one seed."
    assert "With one seed there is no interval, so this may be chance." in said(found)
    assert "One seed gives no spread and no interval" in said(found)


def test_a_comparison_without_a_control_takes_no_difference(tmp_path: Path) -> None:
    found = compare([*made(tmp_path, "A", scores(0.9, 0.91)), *made(tmp_path, "B", scores(0.8, 0.83))])
    assert found.controls == () and found.main is None
    assert not [head for head in cells(found, found.groups[0]) if head.startswith(("vs", "detectable"))]
    assert headline(found) == [
        "A has the highest mean, 90.50 % test accuracy.",
        "No method is named as the control, so there are no differences.",
    ]


def test_a_control_may_be_named_and_then_decides(runs: list[RunRecord]) -> None:
    found = compare(runs, "kd")
    assert (found.controls, found.main, found.groups[0].label) == (("KD", "KD, weight-matched"), "KD", "KD")
    with pytest.raises(ValueError, match=r"no method is called 'DTKD exakt'. Did you mean 'dtkd exact'\?"):
        compare(runs, "DTKD exakt")


def test_only_common_seeds_are_paired(tmp_path: Path) -> None:
    found = compare(
        [
            *made(tmp_path, "student alone", scores(0.90, 0.91, 0.93), like="student alone"),
            *made(tmp_path, "KD", {1: 0.92, 2: 0.95, 7: 0.2}),
            *made(tmp_path, "apart", {8: 0.90, 9: 0.95}),
        ]
    )
    alone = found.group("student alone").last
    text, _ = cells(found, found.group("KD"))["vs student alone (points)"]
    gaps = 100 * np.array([0.92 - alone[1], 0.95 - alone[2]])
    half = stats.t.ppf(0.975, 1) * gaps.std(ddof=1) / np.sqrt(2)
    assert text == f"{gaps.mean():+.2f} ± {half:.2f} (2 pairs)"
    welch = stats.ttest_ind([0.90, 0.95], list(alone.values()), equal_var=False).confidence_interval()
    text, _ = cells(found, found.group("apart"))["vs student alone (points)"]
    assert text == f"{50 * (welch.low + welch.high):+.2f} ± {50 * (welch.high - welch.low):.2f} (u)"
    assert cells(found, found.group("KD"))["seeds"][0] == "3 of 6; not run: 0, 8, 9"
    assert "(u): unpaired seeds, so Welch's interval" in said(found)


def test_open_cells_are_shown_as_open(tmp_path: Path) -> None:
    found = compare(
        [
            *made(tmp_path, "student alone", scores(0.90, 0.91, 0.93), like="student alone"),
            *made(tmp_path, "KD", {0: 0.92, 1: 0.94}),
            *made(tmp_path, "KD", {2: 0.92}, status="failed"),
            *made(tmp_path, "later", scores(0.5, 0.5, 0.5), status="open"),
        ]
    )
    row = cells(found, found.group("later"))
    assert row["seeds"][0] == "0 of 3; open: 0, 1, 2"
    assert {text for head, (text, _) in row.items() if head not in ("method", "seeds")} == {"-"}
    assert cells(found, found.group("KD"))["seeds"][0] == "2 of 3; failed: 2"
    assert "Unfinished runs: 1 failed, 3 open." in said(found)


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    found = compare(made(tmp_path, "KD", scores(0.9), status="running"))
    assert headline(found)[0] == "No run has finished, so there is nothing to compare yet."
    assert "KD seed 0 (running)" in said(found)


def test_a_published_number_stands_beside_ours_with_its_source(runs: list[RunRecord], tmp_path: Path) -> None:
    assert not [head for head in cells(compare(runs), compare(runs).groups[0]) if head.startswith("reported")]
    own = made(tmp_path, "X", scores(0.9, 0.91), reported={"value": 0.6288, "source": "arXiv:2404.12711"})
    found = compare([*own, *made(tmp_path, "Y", scores(0.9, 0.91))])
    assert cells(found, found.group("X"))["reported (%)"] == ("62.88", False)
    assert cells(found, found.group("Y"))["reported (%)"] == ("-", False)
    assert "Reported: published values for full-length training, not measured here; X: arXiv:2404.12711." in said(found)


def test_a_known_pair_of_nets_has_its_published_number(tmp_path: Path) -> None:
    pair = {
        "student": {"name": "resnet8"},
        "teacher": {"name": "resnet14", "identity": "5f" * 32},
        "data": {"name": "cifar100", "identity": "ab" * 32},
    }
    runs = [
        *made(tmp_path, "student alone", scores(0.5), like="student alone", **{**pair, "teacher": None}),
        *made(tmp_path, "DTKD published", scores(0.6), **pair),
        *made(tmp_path, "DTKD exact", scores(0.6), **pair),
    ]
    found = compare(runs)
    shown = {group.label: cells(found, group)["reported (%)"][0] for group in found.groups}
    assert shown == {"student alone": "59.87", "DTKD published": "62.88", "DTKD exact": "-"}
    assert "student alone, DTKD published: " in said(found)
    assert not [group for group in compare(runs, metric="test/loss").groups if group.reported]


# what is refused, and what is kept apart


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no runs to compare"):
        compare([])


def test_runs_on_two_data_sets_are_refused(tmp_path: Path) -> None:
    other = made(tmp_path, "KD", scores(0.9), data={"name": "cifar100", "identity": "cd" * 32})
    with pytest.raises(ValueError, match=r"different data cannot be compared; .*cifar100 \(identity cdcdcdcdcdcd\)"):
        compare([*made(tmp_path, "A", scores(0.9)), *other])


@pytest.mark.parametrize(
    ("part", "value"),
    [("student", {"name": "wide"}), ("teacher", {"name": "other", "identity": "77" * 32})],
)
def test_an_arm_of_two_nets_is_refused(tmp_path: Path, part: str, value: dict[str, str]) -> None:
    seed = 0 if part == "teacher" else 1
    both = [*made(tmp_path, "KD", {0: 0.9}), *made(tmp_path, "KD", {seed: 0.9}, **{part: value})]
    with pytest.raises(
        ValueError, match=f"the method 'KD' has two {part}s: .*{value['name']}.* or give them different labels"
    ):
        compare(both)


def test_another_student_is_kept_out_of_the_differences(tmp_path: Path) -> None:
    found = compare(
        [
            *made(tmp_path, "student alone", scores(0.90, 0.92), like="student alone"),
            *made(tmp_path, "KD", scores(0.91, 0.94)),
            *made(tmp_path, "teacher", scores(0.99, 0.99), like="student alone", student={"name": "large"}),
        ]
    )
    assert cells(found, found.group("teacher"))["vs student alone (points)"] == ("-", False)
    assert [group.label for group in found.ranked] == ["KD", "student alone"]
    assert "teacher trains another network" in said(found)


def test_a_seed_that_was_run_twice_is_counted_once(tmp_path: Path) -> None:
    first, again = made(tmp_path, "KD", {0: 0.9}), made(tmp_path, "KD", {0: 0.8})
    assert compare([*first, *again]).group("KD").last == {0: 0.8}
    assert "KD, seed 0, was run more than once; the one started last (" in said(compare([*again, *first]))
    cell = read_cell(write_cell(tmp_path / "cell.json", pack(first[0].source)))
    assert "more than once" not in said(compare([*first, cell])), "a run and its packed cell are one"


# the headline


def verdict(root: Path, matched: tuple[float, ...], best: tuple[float, ...]) -> str:
    alone = made(root, "student alone", scores(0.80, 0.81, 0.82), like="student alone")
    found = compare([*alone, *made(root, "KD, weight-matched", scores(*matched)), *made(root, "DTKD", scores(*best))])
    return " ".join(headline(found))


def test_a_gain_over_the_student_alone_that_the_weights_explain_is_the_headline(tmp_path: Path) -> None:
    """DTKD beats the student alone by far, and KD at its weights does too: that is what has to be said first."""
    text = verdict(tmp_path, (0.900, 0.915, 0.908), (0.903, 0.910, 0.906))
    assert text.startswith("Nothing here beats KD, equal weights. DTKD against KD, equal weights: -0.13 ± ")
    assert "an interval that includes zero" in text and "would show in four of five such experiments" in text
    assert "Against student alone it is +9.63 ± " in text and "excludes zero" in text


def test_a_better_mean_that_seeds_cannot_tell_apart_is_no_victory(tmp_path: Path) -> None:
    text = verdict(tmp_path, (0.900, 0.915, 0.908), (0.920, 0.910, 0.916))
    assert text.startswith("DTKD has the best mean, but is not shown to differ from KD, equal weights.")
    assert "beats" not in text


def test_a_loss_is_called_one(tmp_path: Path) -> None:
    text = verdict(tmp_path, (0.900, 0.915, 0.908), (0.890, 0.906, 0.898))
    assert text.startswith("Nothing here beats KD, equal weights. The closest, DTKD, is worse by 0.97 points;")


def test_a_victory_gives_its_interval(tmp_path: Path) -> None:
    text = verdict(tmp_path, (0.900, 0.915, 0.908), (0.920, 0.936, 0.928))
    assert text.startswith("DTKD beats KD, equal weights by 2.03 points. It reaches 92.80 % test accuracy;")
    assert "1.89 to 2.18 points over 3 paired seeds, excludes zero" in text


def test_less_is_better_where_it_is(tmp_path: Path) -> None:
    runs = [
        *made(tmp_path, "student alone", scores(0.80, 0.81, 0.82), like="student alone"),
        *made(tmp_path, "KD", scores(0.90, 0.912, 0.92)),
    ]
    found = compare(runs, metric="test/loss")
    assert found.ranked[0].label == "KD"
    assert cells(found, found.group("KD"))["test loss, last"][0] == "0.2323 ± 0.0262"
    assert headline(found)[0] == "KD beats student alone by 0.2617."


def test_many_arms_are_counted_and_the_pick_is_named(runs: list[RunRecord]) -> None:
    text = " ".join(headline(compare(runs)))
    assert (
        "Of 3 methods 1 is shown to be better than KD, equal weights, none to be worse; 2 not shown to differ" in text
    )
    assert "which biases it upward" in text
