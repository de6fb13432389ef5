"""What the finished student is like: calibration, classes, confusions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Bins, Mark, Strip
from tempering.reports.compare import Arm, Comparison, mean
from tempering.reports.figures import TEACHER, Figure, Section, shown, styles
from tempering.reports.read import RunRecord, number

MOST = 20  # classes shown one by one
PAIRS = 8  # confusions shown of an arm


def calibration(found: Comparison) -> Section:
    """A reliability diagram of every arm, student over teacher, and both errors."""
    figures = []
    for i, arm in enumerate(found.arms):
        own = styles(found)[arm.label]
        sides = [
            Bins(css, f"{arm.label}: {side}", points)
            for side, css in (("teacher", TEACHER), ("student", own))
            if (points := _pooled(shown(arm), side))
        ]
        if not sides:
            continue
        errors = {side: _mean(shown(arm), "ece", side) for side in ("student", "teacher")}
        said = ", ".join(f"{side} {100 * e:.2f} %" for side, e in errors.items() if e is not None)
        title = f"{arm.label}: calibration"
        svg = charts.reliability(f"calibration-{i}", title, f"Expected calibration error: {said}", sides)
        figures.append(Figure(arm.label, svg, f"ECE: {said}." if said else "", own))
    return Section(
        "calibration",
        "Calibration",
        "Confidence against accuracy. On the diagonal a model is as sure as it is right; below it, too sure. "
        "Seeds pooled; a dot is as large as its bin is full. ECE: expected calibration error, 15 bins.",
        figures,
        missing="No run wrote an analysis.",
        many=True,
    )


def classes(found: Comparison) -> Section:
    """Accuracy class by class, arms beside the teacher; of many classes those that moved most."""
    css = styles(found)
    means = {arm.label: _per_class(shown(arm), "student") for arm in found.arms}
    means = {label: values for label, values in means.items() if values}
    taught = next((v for arm in found.arms if (v := _per_class(shown(arm), "teacher"))), [])
    if not means:
        return Section("classes", "Classes", "", missing="No run wrote an analysis.")
    names = _names(found)
    main = next((arm.label for arm in found.ranked if arm.label in means and arm.label not in found.controls[:1]), "")
    main = main or next(iter(means))
    base = means.get(found.controls[0], taught) if found.controls and main != found.controls[0] else taught
    count = min(len(values) for values in [*means.values(), *([taught] if taught else [])])
    moved = [
        abs(a - b) if base and None not in (a := means[main][k], b := base[k]) and a is not None and b is not None else 0.0
        for k in range(count)
    ]
    picked = sorted(sorted(range(count), key=lambda k: (-moved[k], k))[:MOST])
    rows = []
    for k in picked:
        marks = [
            Mark(100 * v, css[label], f"{label}, {_name(names, k)}: {100 * v:.1f} %", "dot")
            for label, values in means.items()
            if (v := values[k]) is not None
        ]
        if taught and (v := taught[k]) is not None:
            marks.insert(0, Mark(100 * v, TEACHER, f"teacher, {_name(names, k)}: {100 * v:.1f} %", "tick"))
        if marks:
            rows.append(Strip(_name(names, k), "", marks))
    few = count > len(picked)
    lead = "Mean over seeds. Dot: an arm's student. Upright line: the teacher."
    if few:
        lead += f" The {len(picked)} of {count} classes on which {main} moved most."
    left = min(130, 16 + 6 * max(len(row.label) for row in rows)) if rows else 60
    told = f"{len(rows)} classes, {len(means)} arms"
    svg = charts.strips("classes-all", "Accuracy per class", told, rows, x_label="accuracy, %", left=left)
    return Section("classes", "Classes", lead, [Figure("Accuracy per class", svg)])


@dataclass(frozen=True)
class Confusions:
    """One arm's pairs of classes that student and teacher confuse most differently."""

    label: str
    css: str
    seeds: int
    rows: Sequence[dict[str, Any]]


def confusions(found: Comparison) -> list[Confusions]:
    """For each arm the pairs (true, predicted) with the largest difference of counts, means over the seeds listing it."""
    names, css, out = _names(found), styles(found), []
    for arm in found.arms:
        listed: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        runs = [run for run in shown(arm) if (run.analysis or {}).get("confusions")]
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
            out.append(Confusions(arm.label, css[arm.label], len(runs), rows[:PAIRS]))
    return out


def _analyses(runs: Sequence[RunRecord], part: str, side: str) -> list[Any]:
    return [v for run in runs if (v := ((run.analysis or {}).get(part) or {}).get(side)) is not None]


def _mean(runs: Sequence[RunRecord], part: str, side: str) -> float | None:
    return mean([v for x in _analyses(runs, part, side) if (v := number(x)) is not None])


def _pooled(runs: Sequence[RunRecord], side: str) -> list[tuple[float, float, float]]:
    """The filled bins of all seeds together, (confidence, accuracy, count)."""
    pooled: dict[float, list[float]] = {}
    for bins in _analyses(runs, "reliability", side):
        for one in bins:
            count = number(one.get("count"))
            confidence, accuracy = number(one.get("confidence")), number(one.get("accuracy"))
            if count and confidence is not None and accuracy is not None:
                sums = pooled.setdefault(float(one["low"]), [0.0, 0.0, 0.0])
                sums[0] += count * confidence
                sums[1] += count * accuracy
                sums[2] += count
    return [(c / n, a / n, n) for _, (c, a, n) in sorted(pooled.items())]


def _per_class(runs: Sequence[RunRecord], side: str) -> list[float | None]:
    lists = [values for values in _analyses(runs, "per_class", side) if values]
    if not lists:
        return []
    width = min(map(len, lists))
    return [mean([v for values in lists if (v := number(values[k])) is not None]) for k in range(width)]


def _names(found: Comparison) -> list[str]:
    for arm in found.arms:
        for run in arm.runs:
            if names := (run.analysis or {}).get("class_names"):
                return [str(name) for name in names]
    return []


def _name(names: Sequence[str], k: int) -> str:
    return names[k] if k < len(names) else f"class {k}"


