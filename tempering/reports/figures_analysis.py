"""What the finished student is like: calibration, classes, confusions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Bins, Mark, Strip
from tempering.reports.compare import Arm, Comparison
from tempering.reports.figures import TEACHER, Figure, Section, make_sections, shown, styles
from tempering.reports.intervals import mean
from tempering.reports.records import RunRecord, number

MOST = 20  # classes shown one by one
PAIRS = 8  # confusions shown of an arm


def calibration(found: Comparison) -> Section:
    """A reliability diagram of every arm, student over teacher, and both errors."""
    figures = []
    for i, arm in enumerate(make_sections(found)):
        own = styles(found)[arm.label]
        sides = [
            Bins(css, f"{arm.label}: {side}", points)
            for side, css, runs in (("teacher", TEACHER, _teachers(shown(arm))), ("student", own, shown(arm)))
            if (points := _pooled(runs, side))
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
        f"Seeds pooled; a dot is as large as its bin is full, and no line goes through bins of fewer than {charts.FEW} "
        "examples. ECE: expected calibration error, mean over seeds.",
        figures,
        missing="No run wrote an analysis.",
        many=True,
    )


def classes(found: Comparison) -> Section:
    """Accuracy class by class, arms beside the teacher, and what changed; of many classes those that changed most."""
    means = {arm.label: values for arm in make_sections(found) if (values := _per_class(shown(arm), "student"))}
    taught = next((v for arm in make_sections(found) if (v := _per_class(shown(arm), "teacher"))), [])
    if not means:
        return Section("classes", "Classes", "", missing="No run wrote an analysis.")
    main, base = _pair(found, means)
    changes = _changes(found.arm(main), None if base is None else found.arm(base))
    count = min(map(len, means.values()))
    moved = [abs(mean(list(changes[k].values())) or 0.0) if k < len(changes) else 0.0 for k in range(count)]
    picked = sorted(sorted(range(count), key=lambda k: (-moved[k], k))[:MOST])
    names, css = _names(found), styles(found)
    accuracy, change = [], []
    for k in picked:
        name = _name(names, k)
        marks = [
            Mark(100 * v, TEACHER, f"teacher, {name}: {100 * v:.1f} %", "tick")
            for v in taught[k : k + 1]
            if v is not None
        ]
        for label, values in means.items():
            if (v := values[k]) is not None:
                marks.append(Mark(100 * v, css[label], f"{label}, {name}: {100 * v:.1f} %"))
        gaps = changes[k] if k < len(changes) else {}
        seeds = [Mark(100 * v, "", f"{name}, seed {seed}: {100 * v:+.1f} points") for seed, v in gaps.items()]
        if (middle := mean(list(gaps.values()))) is not None:
            seeds.append(Mark(100 * middle, "", f"{name}, mean: {100 * middle:+.1f} points", "mean"))
        accuracy.append(Strip(name, "", marks))
        change.append(Strip(name, css[main], seeds))
    few = f" The {len(picked)} of {count} classes that changed most." if count > len(picked) else ""
    left = min(130, 16 + 6 * max(len(row.label) for row in accuracy))
    told = f"{len(picked)} classes, {len(means)} arms"
    title = f"{main} minus {base or 'the teacher'}"
    figures = []
    if any(row.marks for row in accuracy):
        svg = charts.strips("classes-all", "Accuracy per class", told, accuracy, x_label="accuracy, %", left=left)
        figures.append(
            Figure("Accuracy per class", svg, "Dot: an arm's student, mean over seeds. Upright: the teacher.")
        )
    if any(row.marks for row in change):
        svg = charts.strips("classes-gap", title, told, change, x_label="points", left=left, reference=0.0)
        figures.append(Figure(title, svg, "Large dot: mean over seeds. Small dots: seeds."))
    return Section("classes", "Classes", f"Where the accuracy comes from, class by class.{few}", figures)


def _pair(found: Comparison, means: Mapping[str, object]) -> tuple[str, str | None]:
    """The arm that the classes are about, and the arm it is compared with; None where that is the teacher."""
    control = next((label for label in found.controls if label in means), None)
    main = next((arm.label for arm in found.ranked if arm.label in means and arm.label != control), None)
    return (next(iter(means)), None) if main is None else (main, control)


def _changes(arm: Arm, base: Arm | None) -> list[dict[int, float]]:
    """Class -> seed -> accuracy of the arm minus that of ``base`` for the same seed, or minus the teacher's."""

    def lists(runs: Sequence[RunRecord], side: str) -> dict[int, list[Any]]:
        return {run.seed: found[0] for run in runs if (found := _analyses([run], "per_class", side))}

    own = lists(shown(arm), "student")
    other = lists(shown(arm), "teacher") if base is None else lists(shown(base), "student")
    common = sorted(set(own) & set(other))
    width = min((min(len(own[s]), len(other[s])) for s in common), default=0)
    return [
        {
            s: own[s][k] - other[s][k]
            for s in common
            if number(own[s][k]) is not None and number(other[s][k]) is not None
        }
        for k in range(width)
    ]


@dataclass(frozen=True)
class Confusions:
    """One arm's pairs of classes that student and teacher confuse most differently."""

    label: str
    css: str
    seeds: int
    rows: Sequence[dict[str, Any]]

    @property
    def partly(self) -> bool:
        """Whether some pair is not in every seed's list."""
        return any(row["seeds"] < self.seeds for row in self.rows)


def confusions(found: Comparison) -> list[Confusions]:
    """Of each arm the pairs (true, predicted) whose counts differ most, as means over the seeds that list them."""
    names, css, out = _names(found), styles(found), []
    for arm in make_sections(found):
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
            if count and count > 0 and confidence is not None and accuracy is not None:
                sums = pooled.setdefault(float(one["low"]), [0.0, 0.0, 0.0])
                sums[0] += count * confidence
                sums[1] += count * accuracy
                sums[2] += count
    return [(c / n, a / n, n) for _, (c, a, n) in sorted(pooled.items())]


def _teachers(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """One run of each teacher: seeds that share it would only count its answers again."""
    return list({run.of("teacher").get("identity"): run for run in reversed(runs)}.values())


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
    return names[k] if 0 <= k < len(names) else f"class {k}"
