"""Figures of audits: reliability before and after the fitted temperature, and temperatures by difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Bins, Series
from tempering.reports.figures import SMALL, TEACHER, Figure

SIDES = (("teacher", TEACHER), ("student", ""))


def reliability(report_data: Mapping[str, Any], css: str, key: str) -> list[Figure]:
    """Return reliability diagrams of both models before and after temperature scaling; [] without data."""
    data, out = report_data.get("reliability") or {}, []
    T = data.get("temperature") or {}
    for when, title in (("plain", "Reliability before scaling"), ("tempered", "After the fitted temperature")):
        bins = data.get(when) or {}
        sides = [
            Bins(color or css, side, [(b["confidence"], b["accuracy"], b["count"]) for b in bins[side]])
            for side, color in SIDES
            if bins.get(side)
        ]
        if sides:
            values = ", ".join(f"{side} {value:.3g}" for side, value in T.items()) if when == "tempered" else ""
            caption = f"Temperatures: {values}." if values else "On the half of the rows not used to fit a temperature."
            svg = charts.reliability(f"{key}-{when}", title, caption, sides)
            out.append(Figure(title, svg, caption, css))
    return out


def temperatures(report_data: Mapping[str, Any], css: str, key: str) -> list[Figure]:
    """Return mean temperatures of each side in fifths of the student's loss, hardest first; [] without data."""
    data = report_data.get("temperatures") or {}
    parts = data.get("by_difficulty") or []
    if not parts:
        return []
    x = [float(i) for i in range(len(parts))]
    series = [
        Series(color or css, side, x, [part[f"T_{side}"] for part in parts], dots=True, text=side)
        for side, color in SIDES
    ]
    last = len(parts) - 1
    ticks = [(position, {0: "hardest", last: "easiest"}.get(int(position), "")) for position in x]
    title = "Temperature by the student's loss"
    caption = f"Means in fifths of the rows. {data.get('policy')}."
    description = "; ".join(
        f"loss {p['loss']:.3g}: student {p['T_student']:.3g}, teacher {p['T_teacher']:.3g}" for p in parts
    )
    svg = charts.lines(key, title, description, series, x_label="", y_label="temperature", size=SMALL, x_ticks=ticks)
    return [Figure(title, svg, caption, css)]
