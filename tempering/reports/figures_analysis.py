"""Figures of the finished student: calibration, classes, confusions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Bins, Mark, Strip
from tempering.reports.compare import Comparison, RunGroup, display_name
from tempering.reports.figures import TEACHER, Figure, Section, groups_in_charts, shown, styles
from tempering.reports.intervals import mean
from tempering.reports.records import RunRecord, number
from tempering.utils.text import counted

MOST = 20  # maximum number of classes shown
PAIRS = 8  # confusions shown per method


def calibration(comparison: Comparison) -> Section:
    """Return a reliability diagram per method, with student, teacher and both calibration errors."""
    figures = []
    for i, group in enumerate(groups_in_charts(comparison)):
        color = styles(comparison)[group.label]
        sides = [
            Bins(css, f"{group.name}: {side}", points)
            for side, css, runs in (("teacher", TEACHER, _teachers(shown(group))), ("student", color, shown(group)))
            if (points := _pooled(runs, side))
        ]
        if not sides:
            continue
        errors = {side: _mean(shown(group), "ece", side) for side in ("student", "teacher")}
        errors_text = ", ".join(f"{side} {100 * e:.2f} %" for side, e in errors.items() if e is not None)
        title = f"{group.name}: calibration"
        svg = charts.reliability(f"calibration-{i}", title, f"Expected calibration error: {errors_text}", sides)
        figures.append(Figure(group.name, svg, f"ECE: {errors_text}." if errors_text else "", color))
    return Section(
        "calibration",
        "Calibration",
        "Confidence against accuracy. On the diagonal a model is calibrated; below it, overconfident. Seeds are "
        f"pooled; dot areas show bin counts, and lines skip bins with fewer than {charts.FEW} examples. ECE: expected "
        "calibration error, mean over seeds.",
        figures,
        missing="No run wrote an analysis.",
        many=True,
    )


def classes(comparison: Comparison) -> Section:
    """Return accuracy per class for methods and teacher, and the changes; of many classes those that changed most."""
    means = {
        group.label: values for group in groups_in_charts(comparison) if (values := _per_class(shown(group), "student"))
    }
    teacher_values = next(
        (v for group in groups_in_charts(comparison) if (v := _per_class(shown(group), "teacher"))), []
    )
    if not means:
        return Section("classes", "Classes", "", missing="No run wrote an analysis.")
    main, base = _pair(comparison, means)
    changes = _changes(comparison.group(main), None if base is None else comparison.group(base))
    count = min(map(len, means.values()))
    magnitude = [abs(mean(list(changes[k].values())) or 0.0) if k < len(changes) else 0.0 for k in range(count)]
    selected = sorted(sorted(range(count), key=lambda k: (-magnitude[k], k))[:MOST])
    names, css = _names(comparison), styles(comparison)
    accuracy, change = [], []
    for k in selected:
        name = _name(names, k)
        marks = [
            Mark(100 * v, TEACHER, f"teacher, {name}: {100 * v:.1f} %", "tick")
            for v in teacher_values[k : k + 1]
            if v is not None
        ]
        for label, values in means.items():
            if (v := values[k]) is not None:
                marks.append(Mark(100 * v, css[label], f"{display_name(label)}, {name}: {100 * v:.1f} %"))
        gaps = changes[k] if k < len(changes) else {}
        seeds = [Mark(100 * v, "", f"{name}, seed {seed}: {100 * v:+.1f} points") for seed, v in gaps.items()]
        if (mean_gap := mean(list(gaps.values()))) is not None:
            seeds.append(Mark(100 * mean_gap, "", f"{name}, mean: {100 * mean_gap:+.1f} points", "mean"))
        accuracy.append(Strip(name, "", marks))
        change.append(Strip(name, css[main], seeds))
    selection = f" The {len(selected)} of {count} classes that changed most." if count > len(selected) else ""
    margin = min(130, 16 + 6 * max(len(row.label) for row in accuracy))
    description = f"{counted(len(selected), 'class')}, {counted(len(means), 'method')}"
    title = f"{display_name(main)} minus {display_name(base or 'the teacher')}"
    figures = []
    if any(row.marks for row in accuracy):
        svg = charts.strips(
            "classes-all", "Accuracy per class", description, accuracy, x_label="accuracy, %", left=margin
        )
        figures.append(
            Figure("Accuracy per class", svg, "Dot: a student, mean over seeds. Vertical line: the teacher.")
        )
    if any(row.marks for row in change):
        svg = charts.strips("classes-gap", title, description, change, x_label="points", left=margin, reference=0.0)
        figures.append(Figure(title, svg, "Large dot: mean over seeds. Small dots: seeds."))
    return Section("classes", "Classes", f"Accuracy per class.{selection}", figures)


def _pair(comparison: Comparison, means: Mapping[str, object]) -> tuple[str, str | None]:
    """Return the method to show and the method to compare it with; None if that is the teacher."""
    control = next((label for label in comparison.controls if label in means), None)
    main = next((group.label for group in comparison.ranked if group.label in means and group.label != control), None)
    return (next(iter(means)), None) if main is None else (main, control)


def _changes(group: RunGroup, base: RunGroup | None) -> list[dict[int, float]]:
    """Return class -> seed -> accuracy of the group minus that of ``base`` for the seed, or minus the teacher's."""

    def lists(runs: Sequence[RunRecord], side: str) -> dict[int, list[Any]]:
        return {run.seed: values[0] for run in runs if (values := _analyses([run], "per_class", side))}

    group_values = lists(shown(group), "student")
    base_values = lists(shown(group), "teacher") if base is None else lists(shown(base), "student")
    common = sorted(set(group_values) & set(base_values))
    width = min((min(len(group_values[s]), len(base_values[s])) for s in common), default=0)
    return [
        {
            s: group_values[s][k] - base_values[s][k]
            for s in common
            if number(group_values[s][k]) is not None and number(base_values[s][k]) is not None
        }
        for k in range(width)
    ]


@dataclass(frozen=True)
class Confusions:
    """One method's pairs of classes on which the confusions of student and teacher differ most."""

    label: str
    css: str
    seeds: int
    rows: Sequence[dict[str, Any]]

    @property
    def partly(self) -> bool:
        """Return whether some pair is not in every seed's list."""
        return any(row["seeds"] < self.seeds for row in self.rows)


def confusions(comparison: Comparison) -> list[Confusions]:
    """Return each method's pairs (true, predicted) whose counts differ most, as means over the seeds that list them."""
    names, css, out = _names(comparison), styles(comparison), []
    for group in groups_in_charts(comparison):
        listed: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        runs = [run for run in shown(group) if (run.analysis or {}).get("confusions")]
        for run in runs:
            for pair in (run.analysis or {})["confusions"]:
                listed[pair["true"], pair["predicted"]].append((float(pair["student"]), float(pair["teacher"])))
        rows = []
        for (true, predicted), counts in listed.items():
            student, teacher = (sum(side) / len(counts) for side in zip(*counts, strict=True))
            gap = student - teacher
            rows.append(
                {
                    "true": _name(names, true),
                    "predicted": _name(names, predicted),
                    "student": student,
                    "teacher": teacher,
                    "gap": gap,
                    "seeds": len(counts),
                    "order": (-len(counts), -abs(gap), true, predicted),
                }
            )
        if rows:
            rows.sort(key=lambda row: row["order"])
            out.append(Confusions(group.name, css[group.label], len(runs), rows[:PAIRS]))
    return out


def _analyses(runs: Sequence[RunRecord], part: str, side: str) -> list[Any]:
    return [v for run in runs if (v := ((run.analysis or {}).get(part) or {}).get(side)) is not None]


def _mean(runs: Sequence[RunRecord], part: str, side: str) -> float | None:
    return mean([v for x in _analyses(runs, part, side) if (v := number(x)) is not None])


def _pooled(runs: Sequence[RunRecord], side: str) -> list[tuple[float, float, float]]:
    """Return the non-empty bins of all seeds together, (confidence, accuracy, count)."""
    pooled: dict[float, list[float]] = {}
    for bins in _analyses(runs, "reliability", side):
        for item in bins:
            count = number(item.get("count"))
            confidence, accuracy = number(item.get("confidence")), number(item.get("accuracy"))
            if count and count > 0 and confidence is not None and accuracy is not None:
                sums = pooled.setdefault(float(item["low"]), [0.0, 0.0, 0.0])
                sums[0] += count * confidence
                sums[1] += count * accuracy
                sums[2] += count
    return [(c / n, a / n, n) for _, (c, a, n) in sorted(pooled.items())]


def _teachers(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return one run per teacher, so that outputs of a shared teacher are counted once."""
    return list({run.of("teacher").get("identity"): run for run in reversed(runs)}.values())


def _per_class(runs: Sequence[RunRecord], side: str) -> list[float | None]:
    lists = [values for values in _analyses(runs, "per_class", side) if values]
    if not lists:
        return []
    width = min(map(len, lists))
    return [mean([v for values in lists if (v := number(values[k])) is not None]) for k in range(width)]


def _names(comparison: Comparison) -> list[str]:
    for group in comparison.groups:
        for run in group.runs:
            if names := (run.analysis or {}).get("class_names"):
                return [str(name) for name in names]
    return []


def _name(names: Sequence[str], k: int) -> str:
    return names[k] if 0 <= k < len(names) else f"class {k}"
