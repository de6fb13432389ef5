"""Building blocks of the page's sections, and the figures of training curves."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Mark, Series, Strip, Svg
from tempering.reports.compare import Comparison, RunGroup, display_name
from tempering.reports.records import RunRecord, number

POINTS = 120  # maximum points of a line; a chart of this width cannot show more
BANDED = 8  # maximum number of methods with bands in a chart; more bands would overlap
SMALL = (360, 240)  # size of a chart in a grid of many
TEACHER = "teacher"  # CSS class: the teacher has the text color everywhere, methods have colors


@dataclass(frozen=True)
class Figure:
    """A chart with title and caption; ``group`` is the CSS class of its runs, if it shows one method only."""

    title: str
    svg: Svg
    caption: str = ""
    group: str = ""


@dataclass(frozen=True)
class Section:
    """Figures under a heading; ``missing`` is shown if there are none."""

    key: str
    title: str
    lead: str
    figures: Sequence[Figure] = ()
    missing: str = ""
    many: bool = False  # many small figures, one per method


@dataclass(frozen=True)
class Curve:
    """Mean, minimum and maximum over seeds on a common x."""

    x: list[float]
    y: list[float | None]
    low: list[float | None]
    high: list[float | None]
    seeds: int

    def since(self, begin: float) -> Curve:
        """Return the part from x = ``begin``."""
        cut = bisect.bisect_left(self.x, begin)
        return Curve(self.x[cut:], self.y[cut:], self.low[cut:], self.high[cut:], self.seeds)

    def series(self, css: str, name: str, *, dots: bool = False, band: bool = True) -> Series:
        """Return a line with a band; no band for one seed."""
        band = band and self.seeds > 1
        return Series(css, name, self.x, self.y, self.low if band else (), self.high if band else (), dots)


def groups_in_charts(comparison: Comparison) -> list[RunGroup]:
    """Return the methods shown in charts; one that trains another network would distort their scale."""
    return [group for group in comparison.groups if group.same_student]


def styles(comparison: Comparison) -> dict[str, str]:
    """Return method's label -> CSS class; the control is a0, which is gray."""
    first, last = 0 if comparison.controls else 1, [group for group in comparison.groups if not group.same_student]
    return {group.label: f"a{i + first}" for i, group in enumerate([*groups_in_charts(comparison), *last])}


def shown(group: RunGroup) -> tuple[RunRecord, ...]:
    """Return the runs that curves are drawn from: the finished ones, or all if none has finished."""
    return group.counted or group.runs


def curve(runs: Sequence[RunRecord], stream: str, key: str, get: Callable[[Mapping[str, Any]], object]) -> Curve | None:
    """Return one quantity over ``key`` ("epoch", "step"), read from ``stream`` ("epochs", "steps"); None if missing."""
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
    tracks_on_grid = np.stack([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in tracks])
    present = ~np.isnan(tracks_on_grid)
    mean = np.where(present, tracks_on_grid, 0.0).sum(0) / present.sum(0)
    low, high = np.where(present, tracks_on_grid, np.inf).min(0), np.where(present, tracks_on_grid, -np.inf).max(0)
    if len(grid) > POINTS:
        grid, mean, low, high = (
            np.array([part.mean() for part in np.array_split(values, POINTS)]) for values in (grid, mean, low, high)
        )
    return Curve(grid.tolist(), mean.tolist(), low.tolist(), high.tolist(), len(tracks))


def inside(*path: str) -> Callable[[Mapping[str, Any]], object]:
    """Return a getter of a nested value; it returns None if a part of the path is missing."""

    def get(line: Mapping[str, Any]) -> object:
        value: object = line
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return get


def percent(get: Callable[[Mapping[str, Any]], object]) -> Callable[[Mapping[str, Any]], object]:
    """Return a getter that multiplies the value by 100."""

    def scaled(line: Mapping[str, Any]) -> object:
        value = number(get(line))
        return None if value is None else 100 * value

    return scaled


def overlay(
    comparison: Comparison,
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
    """Return a chart with one line per method, from fraction ``begin`` of the longest run; None if no method has it."""
    css, x = styles(comparison), "epoch" if stream == "epochs" else "step"
    curves = {
        group.label: c
        for group in groups_in_charts(comparison)
        if (c := curve(shown(group), stream, x, get)) is not None
    }
    end = max((c.x[-1] for c in curves.values()), default=0.0)
    curves = {label: c for label, full in curves.items() if (c := full.since(begin * end)).x}
    series, descriptions, with_bands = [], [], len(curves) <= BANDED
    for label, line in curves.items():
        dots = stream == "epochs" and len(line.x) <= 60
        name = display_name(label)
        series.append(line.series(css[label], name, dots=dots, band=with_bands))
        descriptions.append(f"{name} ends at {line.y[-1]:.4g}")
    if not series:
        return None
    svg = charts.lines(
        key, title, "; ".join(descriptions), series, x_label=x, y_label=y_label, log=log, levels=levels, size=size
    )
    return Figure(title, svg, caption)


def result(comparison: Comparison) -> Section:
    """Return the first section: every seed of every method, and the differences with their intervals."""
    metric, css = comparison.metric, styles(comparison)
    factor = 100.0 if metric.fraction else 1.0
    rows = []
    for group in groups_in_charts(comparison):
        if group.mean is not None:
            marks = [
                Mark(factor * v, "", f"seed {seed}: {metric.show(v)}{metric.unit}") for seed, v in group.last.items()
            ]
            mean_mark = Mark(factor * group.mean, "", f"mean {metric.show(group.mean)}{metric.unit}", "tick")
            rows.append(
                Strip(group.name, css[group.label], [*marks, mean_mark], figure=metric.show(group.mean) + metric.unit)
            )
    name = metric.name.replace("/", " ")
    figures = []
    if rows:
        description = "; ".join(f"{row.label} {row.figure}" for row in rows)
        svg = charts.strips(
            "each-seed",
            f"{name} of every seed",
            description,
            rows,
            x_label=f"{name}{_unit_suffix(metric.unit)}",
            width=360,
        )
        figures.append(Figure("Every seed", svg, "Dots: seeds. Vertical line: their mean."))
    figures += [
        f for control in comparison.controls[:2] if (f := _differences(comparison, control, factor)) is not None
    ]
    return Section("result", "Result", "", figures, missing="No run has finished.", many=True)


def _differences(comparison: Comparison, control: str, factor: float) -> Figure | None:
    metric, css, rows = comparison.metric, styles(comparison), []
    for group in comparison.groups:
        gap = group.versus.get(control)
        if gap is None:
            continue
        text = metric.show(gap.mean, signed=True)
        span = None
        if gap.half is not None:
            span = (factor * (gap.mean - gap.half), factor * (gap.mean + gap.half))
            text += f" \u00b1 {metric.show(gap.half)}"
        marks = [Mark(factor * v, "", f"seed {seed}: {metric.show(v, signed=True)}") for seed, v in gap.each.items()]
        mean_mark = Mark(factor * gap.mean, "" if gap.shown else "hollow", f"mean {text}{metric.step}", "mean")
        rows.append(Strip(group.name, css[group.label], [*marks, mean_mark], span, text))
    if not rows:
        return None
    title = f"Difference to {display_name(control)}"
    description = "; ".join(f"{row.label} {row.figure}" for row in rows)
    unit = "points" if metric.fraction else metric.key
    key = f"versus-{comparison.controls.index(control)}"
    svg = charts.strips(key, title, description, rows, x_label=f"difference, {unit}", reference=0.0, width=360)
    return Figure(title, svg, "Bar: 95 % t interval. Large dot: mean, hollow unless it excludes zero. Small: seeds.")


def learning(comparison: Comparison) -> Section:
    """Return scores and losses over epochs."""
    metric = comparison.metric
    split = _scored_split(comparison)
    get = inside(split, metric.key)
    get = percent(get) if metric.fraction else get
    name, unit = f"{split.capitalize()} {metric.key}", f"{metric.key}{_unit_suffix(metric.unit)}"
    teacher_score = teacher_accuracy(comparison)
    scale = 100 if metric.fraction else 1
    levels = [] if teacher_score is None else [(scale * teacher_score, TEACHER, "teacher")]
    averaged = inside(f"{split}_ema", metric.key)
    averaged = percent(averaged) if metric.fraction else averaged
    caption = "Of the moving average of the student's weights (EMA)."
    figures = [
        overlay(comparison, "score", name, get, y_label=unit, levels=levels),
        overlay(comparison, "score-late", f"{name}, second half", get, y_label=unit, begin=0.5),
        overlay(comparison, "ema", f"{name}, EMA", averaged, y_label=unit, levels=levels, caption=caption),
        overlay(comparison, "loss-train", "Training loss", inside("loss"), y_label="log scale", log=True),
        overlay(comparison, "rate", "Learning rate", inside("lr"), stream="steps", y_label="learning rate"),
    ]
    if metric.key != "loss":
        title = f"{split.capitalize()} cross entropy"
        nats = overlay(comparison, "loss-scored", title, inside(split, "loss"), y_label="nats, log scale", log=True)
        figures.insert(2, nats)
    if metric.key == "accuracy":
        top5 = percent(inside(split, "top5"))
        figures.append(
            overlay(comparison, "top5", f"{split.capitalize()} top-5 accuracy", top5, y_label="top-5 accuracy, %")
        )
    return Section(
        "learning",
        "Learning",
        "Line: mean over seeds. Band: lowest to highest seed. The training loss has different terms in each method, so "
        "compare its trend, not its value.",
        [f for f in figures if f is not None],
        missing="No epoch was evaluated: these runs had neither a validation nor a test loader.",
    )


def _scored_split(comparison: Comparison) -> str:
    """Return the split on which epochs were evaluated, preferably that of the comparison."""
    split_of_metric = comparison.metric.name.partition("/")[0]
    for split in (split_of_metric, "test", "validation"):
        if any(split in line for group in comparison.groups for run in shown(group) for line in run.epochs):
            return split
    return split_of_metric


def agreement(comparison: Comparison) -> Section:
    """Return how often student and teacher predict the same class."""
    figure = overlay(
        comparison,
        "agreement",
        "Same prediction as the teacher",
        lambda line: percent(inside("test", "agreement"))(line) or percent(inside("validation", "agreement"))(line),
        y_label="agreement, %",
    )
    return Section(
        "agreement",
        "Agreement with the teacher",
        "The share of examples on which student and teacher predict the same class, right or wrong.",
        [] if figure is None else [figure],
        missing="No run was evaluated with a teacher.",
    )


def terms(comparison: Comparison) -> Section:
    """Return each named loss term over steps."""
    names: dict[str, None] = {}
    for group in groups_in_charts(comparison):
        for run in shown(group):
            for line in run.steps:
                names |= dict.fromkeys(line.get("terms") or {})
    figures = []
    for i, name in enumerate(names):
        title = f'Term "{name}"'
        label = "mean over a batch, log scale"
        get = inside("terms", name)
        figures.append(
            overlay(comparison, f"term-{i}", title, get, stream="steps", y_label=label, log=True, size=SMALL)
        )
    figures += [
        _terms_by_epoch(group, styles(comparison)[group.label], list(names)) for group in groups_in_charts(comparison)
    ]
    return Section(
        "terms",
        "Loss terms",
        "The terms of the loss, including weights and warm-up. Terms with the same name may differ between methods. "
        "Per epoch: the mean of its logged steps.",
        [f for f in figures if f is not None],
        missing="No step was logged.",
        many=True,
    )


def _terms_by_epoch(group: RunGroup, css: str, names: Sequence[str]) -> Figure | None:
    """Return the terms of one method, averaged over the logged steps of each epoch; None for fewer than two terms."""
    series = []
    for i, name in enumerate(names):
        runs = [replace(run, steps=_epoch_means(run, name)) for run in shown(group)]
        line = curve(runs, "steps", "epoch", inside("mean"))
        if line is not None and any(line.y):
            series.append(line.series(f"{css} d{i % 4}", name, dots=len(line.x) <= 60, band=False))
    if len(series) < 2 or max(len(s.x) for s in series) < 2:
        return None
    title, key = f"{group.name}: terms per epoch", f"{css}-terms"
    texts = [replace(s, text=s.name) for s in series]
    svg = charts.lines(
        key, title, ", ".join(s.name for s in series), texts, x_label="epoch", y_label="mean", size=SMALL
    )
    return Figure(title, svg, "", css)


def _epoch_means(run: RunRecord, name: str) -> list[dict[str, Any]]:
    values: dict[Any, list[float]] = {}
    for line in run.steps:
        if (value := number((line.get("terms") or {}).get(name))) is not None:
            values.setdefault(line.get("epoch"), []).append(value)
    return [{"epoch": epoch, "mean": sum(found) / len(found)} for epoch, found in values.items()]


def teacher_accuracy(comparison: Comparison) -> float | None:
    """Return the teacher's score on the analyzed split; None if no record has it."""
    key = comparison.metric.key
    for group in comparison.groups:
        for run in shown(group):
            analysis = run.analysis or {}
            part = analysis.get("accuracy") if key == "accuracy" else (analysis.get("detection") or {}).get(key)
            value = number((part if isinstance(part, dict) else {}).get("teacher"))
            value = number((analysis.get("teacher_scores") or {}).get(key)) if value is None else value
            if value is not None and analysis.get("split") == comparison.metric.name.partition("/")[0]:
                return value
    return None


def _unit_suffix(unit: str) -> str:
    return f",{unit}" if unit else ""
