"""Figures of temperatures: over the run, by difficulty, and the remaining sharpness gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Series
from tempering.reports.compare import Comparison, RunGroup
from tempering.reports.figures import (
    SMALL,
    TEACHER,
    Curve,
    Figure,
    Section,
    curve,
    groups_in_charts,
    inside,
    overlay,
    shown,
    styles,
)
from tempering.reports.records import RunRecord, number
from tempering.utils.text import counted

COUNTS = {
    "fallback": ("Rows with fallback", "Their equation has no usable solution, so both sides use the reference."),
    "clamped": ("Rows clamped at the reach", "Their solution is further from the reference than the policy allows."),
}
Bands = list[tuple[str, str, Curve, Curve | None, Curve | None]]
SIDES = (("T_teacher", TEACHER, "teacher"), ("T_student", "", "student"))


def temperatures(comparison: Comparison) -> Section:
    """Return both temperatures of every method with a dynamic policy, and the sharpness gap to be closed."""
    dynamic = [group for group in groups_in_charts(comparison) if is_dynamic(shown(group))]
    bands = [_bands(group) for group in dynamic]
    limits = _limits(bands)
    figures = [
        _over_steps(comparison, group, group_bands, limits) for group, group_bands in zip(dynamic, bands, strict=True)
    ]
    gap = overlay(
        comparison,
        "gap",
        "Sharpness gap",
        _gap,
        stream="steps",
        y_label="mean |gap|, log scale",
        caption="Mean distance of the two sides' log-sum-exp, logits centered, at the temperatures in use. "
        "The exact solution keeps it at zero, except for rows clamped at the reach.",
        log=True,
        size=SMALL,
    )
    figures += [] if gap is None else [gap]
    for name, (title, explanation) in COUNTS.items():
        if any(number(inside("policy", name)(line)) for group in dynamic for run in shown(group) for line in run.steps):
            share = partial(_share, name)
            label = "% of a batch"
            figure = overlay(
                comparison, name, title, share, stream="steps", y_label=label, caption=explanation, size=SMALL
            )
            figures += [] if figure is None else [figure]
    figures += [f for group in dynamic if (f := _by_difficulty(comparison, group)) is not None]
    constant = [
        f"{group.name} at {value:g}"
        for group in groups_in_charts(comparison)
        if (value := _constant(shown(group))) is not None
    ]
    lead = "Temperatures of each side. Line: mean over rows; band: 5 to 95 % of the rows of a batch."
    return Section(
        "temperatures",
        "Temperatures",
        lead + (f" Constant: {'; '.join(constant)}." if constant else ""),
        figures,
        missing="No method of these runs has a temperature.",
        many=True,
    )


def _gap(line: Mapping[str, Any]) -> object:
    return line.get("logsumexp_gap", line.get("gap"))  # "gap" in records of older versions


def _share(name: str, line: Mapping[str, Any]) -> float | None:
    """Return the percentage of a logged batch that the policy counted under ``name``."""
    count, rows = number(inside("policy", name)(line)), _rows(line)
    return None if count is None or not rows else 100 * count / rows


def _rows(line: Mapping[str, Any]) -> float:
    """Return how many rows a line of steps.jsonl covers; 0 if unknown."""
    speed, took = number(line.get("rows_per_second")), number(line.get("step_ms"))
    return 0.0 if speed is None or took is None else speed * took / 1000


def is_dynamic(runs: Sequence[RunRecord]) -> bool:
    """Return whether temperatures ever differ between rows or between the two sides."""
    return any(
        len(values) > 1
        for run in runs
        if (values := {round(v, 6) for line in run.steps for side, *_ in SIDES for v in _numbers(line.get(side))})
    )


def _constant(runs: Sequence[RunRecord]) -> float | None:
    values = {round(v, 6) for run in runs for line in run.steps for side, *_ in SIDES for v in _numbers(line.get(side))}
    return values.pop() if len(values) == 1 else None


def _numbers(side: object) -> list[float]:
    return [v for x in side.values() if (v := number(x)) is not None] if isinstance(side, dict) else []


def _bands(group: RunGroup) -> Bands:
    """Return (class, name, mean, 5 %, 95 %) of each side over steps, all means over seeds."""
    out = []
    for side, css, name in SIDES:
        mean, low, high = (curve(shown(group), "steps", "step", inside(side, part)) for part in ("mean", "p5", "p95"))
        if mean is not None:
            out.append((css, name, mean, low, high))
    return out


def _limits(groups: Sequence[Bands]) -> tuple[float, float] | None:
    """Return one y range for all methods, so that the charts are comparable."""
    values = [
        v
        for bands in groups
        for _, _, *curves in bands
        for curve_ in curves
        if curve_ is not None
        for v in curve_.y
        if v is not None
    ]
    if not values:
        return None
    margin = 0.06 * (max(values) - min(values)) or 0.5
    return max(0.0, min(values) - margin), max(values) + margin


def _over_steps(comparison: Comparison, group: RunGroup, bands: Bands, limits: tuple[float, float] | None) -> Figure:
    color, series, descriptions = styles(comparison)[group.label], [], []
    for css, name, mean, low, high in bands:
        banded = low is not None and high is not None and low.x == mean.x == high.x
        band = (low.y, high.y) if banded and low is not None and high is not None else ((), ())
        series.append(Series(css or color, f"{group.name}: {name}", mean.x, mean.y, *band, text=name))
        descriptions.append(f"{name} from {mean.y[0]:.2f} to {mean.y[-1]:.2f}")
    key = f"temperature-{comparison.groups.index(group)}"
    title = f"{group.name}: temperatures over the run"
    svg = charts.lines(
        key, title, "; ".join(descriptions), series, x_label="step", y_label="temperature", size=SMALL, y_range=limits
    )
    return Figure(group.name, svg, _fallbacks(shown(group)), color)


def _fallbacks(runs: Sequence[RunRecord]) -> str:
    """Return a sentence on rows with fallback or clamping; empty if the policy does not count them."""
    parts = []
    for name, verb in (
        ("fallback", "fell back to the reference temperature"),
        ("clamped", "were clamped at the reach"),
    ):
        counts, rows = [], 0.0
        for run in runs:
            for line in run.steps:
                count = number((line.get("policy") or {}).get(name))
                if count is not None:
                    counts.append(count)
                    rows += _rows(line)
        if counts:
            total = sum(counts)
            share = f" ({100 * total / rows:.2g} % of the rows logged)" if rows and total else ""
            verb = verb if total > 1 else verb.replace("were", "was")
            parts.append(f"{counted(total, 'row') if total else 'no row'} {verb}{share}")
    return "; ".join(parts).capitalize() + "." if parts else ""


def _by_difficulty(comparison: Comparison, group: RunGroup) -> Figure | None:
    """Return mean temperatures in the five bins of the analysis, hardest examples first."""
    tables = [
        bins for run in shown(group) if (bins := ((run.analysis or {}).get("temperatures") or {}).get("by_difficulty"))
    ]
    if not tables:
        return None
    length = min(len(bins) for bins in tables)
    color, series, descriptions = styles(comparison)[group.label], [], []
    for side, css, name in SIDES:
        y = []
        for i in range(length):
            values = [v for bins in tables if (v := number(bins[i].get(side))) is not None]
            y.append(sum(values) / len(values) if values else None)
        if any(v is not None for v in y):
            series.append(
                Series(css or color, f"{group.name}: {name}", list(map(float, range(length))), y, dots=True, text=name)
            )
            descriptions.append(f"{name} " + ", ".join("-" if v is None else f"{v:.2f}" for v in y))
    if not series:
        return None
    ticks = [(float(i), "hardest" if i == 0 else "easiest" if i == length - 1 else "") for i in range(length)]
    key = f"difficulty-{comparison.groups.index(group)}"
    title = f"{group.name}: temperature by difficulty"
    svg = charts.lines(
        key, title, "; ".join(descriptions), series, x_label="", y_label="temperature", size=SMALL, x_ticks=ticks
    )
    return Figure(
        f"{group.name}, by difficulty", svg, "Test examples in bins of the teacher's margin for the label.", color
    )
