"""What every section of the page is made of, and the figures of how training went."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Mark, Series, Strip, Svg
from tempering.reports.compare import Arm, Comparison
from tempering.reports.records import RunRecord, number

POINTS = 120  # of a line, at most: more than that a chart of this width cannot show
BANDED = 8  # arms in a chart, at most: bands of more cover each other
SMALL = (360, 240)  # of a chart, where there are many beside each other
TEACHER = "teacher"  # CSS class: the teacher is drawn in ink everywhere, arms have colors


@dataclass(frozen=True)
class Figure:
    """A chart with what a reader is told above and below it; ``arm`` is the class of the one arm it shows, if any."""

    title: str
    svg: Svg
    caption: str = ""
    arm: str = ""


@dataclass(frozen=True)
class Section:
    """Figures under a heading; where there are none, ``missing`` says why."""

    key: str
    title: str
    lead: str
    figures: Sequence[Figure] = ()
    missing: str = ""
    many: bool = False  # many small figures, one an arm


@dataclass(frozen=True)
class Curve:
    """Mean over seeds, and the lowest and highest seed, on one x."""

    x: list[float]
    y: list[float | None]
    low: list[float | None]
    high: list[float | None]
    seeds: int

    def since(self, begin: float) -> Curve:
        """The part from that x on."""
        cut = bisect.bisect_left(self.x, begin)
        return Curve(self.x[cut:], self.y[cut:], self.low[cut:], self.high[cut:], self.seeds)

    def series(self, css: str, name: str, *, dots: bool = False, band: bool = True) -> Series:
        """As a line with a band; no band for one seed."""
        band = band and self.seeds > 1
        return Series(css, name, self.x, self.y, self.low if band else (), self.high if band else (), dots)


def make_sections(found: Comparison) -> list[Arm]:
    """The arms that charts show; one that trains another network would only set their scale."""
    return [arm for arm in found.arms if arm.same_student]


def styles(found: Comparison) -> dict[str, str]:
    """Arm -> its CSS class; the control is a0, which is gray."""
    first, last = 0 if found.controls else 1, [arm for arm in found.arms if not arm.same_student]
    return {arm.label: f"a{i + first}" for i, arm in enumerate([*make_sections(found), *last])}


def shown(arm: Arm) -> tuple[RunRecord, ...]:
    """The runs that curves are drawn from: the finished ones, or what there is while none is."""
    return arm.counted or arm.runs


def curve(runs: Sequence[RunRecord], stream: str, key: str, get: Callable[[Mapping[str, Any]], object]) -> Curve | None:
    """One quantity over ``key`` ("epoch", "step"), read from ``stream`` ("epochs", "steps"); None if nobody has it."""
    import numpy as np

    tracks = []
    for run in runs:
        values: dict[float, float] = {}
        for line in getattr(run, stream):
            x, y = number(line.get(key)), number(get(line))
            if x is not None and y is not None:
                values[x] = y
        if values:
            tracks.append((np.array(sorted(values)), np.array([values[x] for x in sorted(values)])))
    if not tracks:
        return None
    grid = np.unique(np.concatenate([x for x, _ in tracks]))
    each = np.stack([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in tracks])
    there = ~np.isnan(each)
    middle = np.where(there, each, 0.0).sum(0) / there.sum(0)
    low, high = np.where(there, each, np.inf).min(0), np.where(there, each, -np.inf).max(0)
    if len(grid) > POINTS:
        grid, middle, low, high = (
            np.array([part.mean() for part in np.array_split(values, POINTS)]) for values in (grid, middle, low, high)
        )
    return Curve(grid.tolist(), middle.tolist(), low.tolist(), high.tolist(), len(tracks))


def inside(*path: str) -> Callable[[Mapping[str, Any]], object]:
    """A getter of a nested value, None where a part of the path is missing."""

    def get(line: Mapping[str, Any]) -> object:
        value: object = line
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return get


def percent(get: Callable[[Mapping[str, Any]], object]) -> Callable[[Mapping[str, Any]], object]:
    """The same, times 100."""

    def scaled(line: Mapping[str, Any]) -> object:
        value = number(get(line))
        return None if value is None else 100 * value

    return scaled


def overlay(
    found: Comparison,
    key: str,
    title: str,
    get: Callable[[Mapping[str, Any]], object],
    *,
    stream: str = "epochs",
    y_label: str,
    caption: str = "",
    log: bool = False,
    levels: Sequence[tuple[float, str, str]] = (),
    begin: float = 0.0,
    size: tuple[int, int] = (480, 270),
) -> Figure | None:
    """One chart with a line an arm, from the share ``begin`` of the longest run on; None where no arm has it."""
    css, x = styles(found), "epoch" if stream == "epochs" else "step"
    curves = {arm.label: c for arm in make_sections(found) if (c := curve(shown(arm), stream, x, get)) is not None}
    end = max((c.x[-1] for c in curves.values()), default=0.0)
    curves = {label: c for label, whole in curves.items() if (c := whole.since(begin * end)).x}
    series, told, few = [], [], len(curves) <= BANDED
    for label, line in curves.items():
        dots = stream == "epochs" and len(line.x) <= 60
        series.append(line.series(css[label], label, dots=dots, band=few))
        told.append(f"{label} ends at {line.y[-1]:.4g}")
    if not series:
        return None
    svg = charts.lines(
        key, title, "; ".join(told), series, x_label=x, y_label=y_label, log=log, levels=levels, size=size
    )
    return Figure(title, svg, caption)


def result(found: Comparison) -> Section:
    """The first thing to see: every seed of every arm, and the differences with their intervals."""
    metric, css = found.metric, styles(found)
    factor = 100.0 if metric.fraction else 1.0
    rows = []
    for arm in make_sections(found):
        if arm.mean is not None:
            marks = [
                Mark(factor * v, "", f"seed {seed}: {metric.show(v)}{metric.unit}") for seed, v in arm.last.items()
            ]
            middle = Mark(factor * arm.mean, "", f"mean {metric.show(arm.mean)}{metric.unit}", "tick")
            rows.append(Strip(arm.label, css[arm.label], [*marks, middle], figure=metric.show(arm.mean) + metric.unit))
    name = metric.name.replace("/", " ")
    figures = []
    if rows:
        told = "; ".join(f"{row.label} {row.figure}" for row in rows)
        svg = charts.strips(
            "each-seed", f"{name} of every seed", told, rows, x_label=f"{name}{_in(metric.unit)}", width=360
        )
        figures.append(Figure("Every seed", svg, "A dot is a seed, the upright line their mean."))
    figures += [f for control in found.controls[:2] if (f := _differences(found, control, factor)) is not None]
    return Section("result", "Result", "", figures, missing="No run has finished.", many=True)


def _differences(found: Comparison, control: str, factor: float) -> Figure | None:
    metric, css, rows = found.metric, styles(found), []
    for arm in found.arms:
        gap = arm.versus.get(control)
        if gap is None:
            continue
        text = metric.show(gap.mean, signed=True)
        span = None
        if gap.half is not None:
            span = (factor * (gap.mean - gap.half), factor * (gap.mean + gap.half))
            text += f" \u00b1 {metric.show(gap.half)}"
        marks = [Mark(factor * v, "", f"seed {seed}: {metric.show(v, signed=True)}") for seed, v in gap.each.items()]
        middle = Mark(factor * gap.mean, "" if gap.shown else "hollow", f"mean {text}{metric.step}", "mean")
        rows.append(Strip(arm.label, css[arm.label], [*marks, middle], span, text))
    if not rows:
        return None
    title = f"Difference to {control}"
    told = "; ".join(f"{row.label} {row.figure}" for row in rows)
    unit = "points" if metric.fraction else metric.key
    key = f"versus-{found.controls.index(control)}"
    svg = charts.strips(key, title, told, rows, x_label=f"difference, {unit}", reference=0.0, width=360)
    return Figure(title, svg, "Bar: 95 % t interval. Large dot: mean, hollow unless it excludes zero. Small: seeds.")


def learning(found: Comparison) -> Section:
    """Scores and losses over epochs."""
    metric = found.metric
    split = _scored(found)
    get = inside(split, metric.key)
    get = percent(get) if metric.fraction else get
    name, unit = f"{split.capitalize()} {metric.key}", f"{metric.key}{_in(metric.unit)}"
    taught = teacher_accuracy(found)
    levels = [] if taught is None else [(100 * taught, TEACHER, "teacher")]
    figures = [
        overlay(found, "score", name, get, y_label=unit, levels=levels),
        overlay(found, "score-late", f"{name}, second half", get, y_label=unit, begin=0.5),
        overlay(found, "loss-train", "Loss in training", inside("loss"), y_label="log scale", log=True),
    ]
    if metric.key != "loss":
        title = f"{split.capitalize()} cross entropy"
        nats = overlay(found, "loss-scored", title, inside(split, "loss"), y_label="nats, log scale", log=True)
        figures.insert(2, nats)
    if metric.key == "accuracy":
        top5 = percent(inside(split, "top5"))
        figures.append(
            overlay(found, "top5", f"{split.capitalize()} top-5 accuracy", top5, y_label="top-5 accuracy, %")
        )
    return Section(
        "learning",
        "Learning",
        "Line: mean over seeds. Band: lowest to highest seed. The loss in training adds up other terms in each arm, so "
        "only its course compares, not its height.",
        [f for f in figures if f is not None],
        missing="No epoch was scored: these runs had neither a validation nor a test loader.",
    )


def _scored(found: Comparison) -> str:
    """The split that the epochs were scored on: the comparison's where it is there."""
    own = found.metric.name.partition("/")[0]
    for split in (own, "test", "validation"):
        if any(split in line for arm in found.arms for run in shown(arm) for line in run.epochs):
            return split
    return own


def agreement(found: Comparison) -> Section:
    """How often student and teacher predict the same class."""
    one = overlay(
        found,
        "agreement",
        "Same prediction as the teacher",
        lambda line: percent(inside("test", "agreement"))(line) or percent(inside("validation", "agreement"))(line),
        y_label="agreement, %",
    )
    return Section(
        "agreement",
        "Agreement with the teacher",
        "The share of examples on which student and teacher predict the same class, right or wrong.",
        [] if one is None else [one],
        missing="No run was scored beside a teacher.",
    )


def terms(found: Comparison) -> Section:
    """Each named part of the loss over steps."""
    names: dict[str, None] = {}
    for arm in make_sections(found):
        for run in shown(arm):
            for line in run.steps:
                names |= dict.fromkeys(line.get("terms") or {})
    figures = []
    for i, name in enumerate(names):
        title = f'Term "{name}"'
        label = "mean over a batch, log scale"
        get = inside("terms", name)
        figures.append(overlay(found, f"term-{i}", title, get, stream="steps", y_label=label, log=True, size=SMALL))
    return Section(
        "terms",
        "Loss terms",
        "What the method adds up, weights and warm-up included. Terms of one name need not be one formula in two arms.",
        [f for f in figures if f is not None],
        missing="No step was logged.",
        many=True,
    )


def teacher_accuracy(found: Comparison) -> float | None:
    """Of the teacher on the split that was analyzed, or its map; None where no record says it."""
    key = found.metric.key
    for arm in found.arms:
        for run in shown(arm):
            said = run.analysis or {}
            part = said.get("accuracy") if key == "accuracy" else (said.get("detection") or {}).get(key)
            value = number((part or {}).get("teacher"))
            if value is not None and said.get("split") == found.metric.name.partition("/")[0]:
                return value
    return None


def _in(unit: str) -> str:
    return f",{unit}" if unit else ""
