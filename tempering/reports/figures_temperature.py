"""How the temperatures moved: over the run, by difficulty, and how sharp both sides stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Series
from tempering.reports.compare import Arm, Comparison
from tempering.reports.figures import (
    SMALL,
    TEACHER,
    Curve,
    Figure,
    Section,
    curve,
    inside,
    make_sections,
    overlay,
    shown,
    styles,
)
from tempering.reports.records import RunRecord, number

COUNTS = {
    "fallback": ("Rows that fell back", "Their equation has no usable solution, so both sides got the reference."),
    "clamped": ("Rows held at the reach", "Their solution lies further from the reference than the policy may go."),
}
Bands = list[tuple[str, str, Curve, Curve | None, Curve | None]]
SIDES = (("T_teacher", TEACHER, "teacher"), ("T_student", "", "student"))


def temperatures(found: Comparison) -> Section:
    """Both temperatures of every arm whose policy moves them, and the gap they are to close."""
    dynamic = [arm for arm in make_sections(found) if is_dynamic(shown(arm))]
    bands = [_bands(arm) for arm in dynamic]
    limits = _limits(bands)
    figures = [_over_steps(found, arm, own, limits) for arm, own in zip(dynamic, bands, strict=True)]
    gap = overlay(
        found,
        "gap",
        "Sharpness gap",
        inside("gap"),
        stream="steps",
        y_label="mean |gap|, log scale",
        caption="Mean distance of the two sides' log-sum-exp, logits centered, at the temperatures in use. "
        "The exact solution keeps it at zero, but for rows that are held at the reach.",
        log=True,
        size=SMALL,
    )
    figures += [] if gap is None else [gap]
    for name, (title, what) in COUNTS.items():
        if any(number(inside("policy", name)(line)) for arm in dynamic for run in shown(arm) for line in run.steps):
            share = partial(_share, name)
            label = "% of a batch"
            held = overlay(found, name, title, share, stream="steps", y_label=label, caption=what, size=SMALL)
            figures += [] if held is None else [held]
    figures += [f for arm in dynamic if (f := _by_difficulty(found, arm)) is not None]
    constant = [
        f"{arm.label} at {value:g}" for arm in make_sections(found) if (value := _constant(shown(arm))) is not None
    ]
    lead = "What the policy gave each side. Line: mean over rows; band: 5 to 95 % of the rows of a batch."
    return Section(
        "temperatures",
        "Temperatures",
        lead + (f" Constant: {'; '.join(constant)}." if constant else ""),
        figures,
        missing="No arm of these runs has a temperature.",
        many=True,
    )


def _share(name: str, line: Mapping[str, Any]) -> float | None:
    """The share of a logged batch that the policy counted under ``name``, in percent."""
    count, rows = number(inside("policy", name)(line)), _rows(line)
    return None if count is None or not rows else 100 * count / rows


def _rows(line: Mapping[str, Any]) -> float:
    """How many rows a line of steps.jsonl is about; 0 where it does not say."""
    speed, took = number(line.get("rows_per_second")), number(line.get("step_ms"))
    return 0.0 if speed is None or took is None else speed * took / 1000


def is_dynamic(runs: Sequence[RunRecord]) -> bool:
    """Whether any row ever got another temperature than the others, or than the other side."""
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


def _bands(arm: Arm) -> Bands:
    """(class, name, mean, 5 %, 95 %) of each side over steps, all means over seeds."""
    out = []
    for side, css, name in SIDES:
        mean, low, high = (curve(shown(arm), "steps", "step", inside(side, part)) for part in ("mean", "p5", "p95"))
        if mean is not None:
            out.append((css, name, mean, low, high))
    return out


def _limits(arms: Sequence[Bands]) -> tuple[float, float] | None:
    """One range for all arms, so that they compare at a glance."""
    values = [
        v
        for bands in arms
        for _, _, *curves in bands
        for one in curves
        if one is not None
        for v in one.y
        if v is not None
    ]
    if not values:
        return None
    air = 0.06 * (max(values) - min(values)) or 0.5
    return max(0.0, min(values) - air), max(values) + air


def _over_steps(found: Comparison, arm: Arm, bands: Bands, limits: tuple[float, float] | None) -> Figure:
    own, series, told = styles(found)[arm.label], [], []
    for css, name, mean, low, high in bands:
        banded = low is not None and high is not None and low.x == mean.x == high.x
        band = (low.y, high.y) if banded and low is not None and high is not None else ((), ())
        series.append(Series(css or own, f"{arm.label}: {name}", mean.x, mean.y, *band, text=name))
        told.append(f"{name} from {mean.y[0]:.2f} to {mean.y[-1]:.2f}")
    key = f"temperature-{found.arms.index(arm)}"
    title = f"{arm.label}: temperatures over the run"
    svg = charts.lines(
        key, title, "; ".join(told), series, x_label="step", y_label="temperature", size=SMALL, y_range=limits
    )
    return Figure(arm.label, svg, _fallbacks(shown(arm)), own)


def _fallbacks(runs: Sequence[RunRecord]) -> str:
    """How many rows the policy could not serve, in a sentence; nothing where it does not count them."""
    said = []
    for name, what in (("fallback", "fell back to the reference temperature"), ("clamped", "were held at the reach")):
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
            said.append(f"{total:.0f} rows {what}{share}" if total else f"no row {what.replace('were', 'was')}")
    return "; ".join(said).capitalize() + "." if said else ""


def _by_difficulty(found: Comparison, arm: Arm) -> Figure | None:
    """Mean temperatures in the five bins of the analysis, hardest examples first."""
    tables = [
        bins for run in shown(arm) if (bins := ((run.analysis or {}).get("temperatures") or {}).get("by_difficulty"))
    ]
    if not tables:
        return None
    length = min(len(bins) for bins in tables)
    own, series, told = styles(found)[arm.label], [], []
    for side, css, name in SIDES:
        y = []
        for i in range(length):
            values = [v for bins in tables if (v := number(bins[i].get(side))) is not None]
            y.append(sum(values) / len(values) if values else None)
        if any(v is not None for v in y):
            series.append(
                Series(css or own, f"{arm.label}: {name}", list(map(float, range(length))), y, dots=True, text=name)
            )
            told.append(f"{name} " + ", ".join("-" if v is None else f"{v:.2f}" for v in y))
    if not series:
        return None
    ticks = [(float(i), "hardest" if i == 0 else "easiest" if i == length - 1 else "") for i in range(length)]
    key = f"difficulty-{found.arms.index(arm)}"
    title = f"{arm.label}: temperature by difficulty"
    svg = charts.lines(
        key, title, "; ".join(told), series, x_label="", y_label="temperature", size=SMALL, x_ticks=ticks
    )
    return Figure(
        f"{arm.label}, by difficulty", svg, "Test examples in bins of the teacher's margin for the label.", own
    )
