"""Plots of the performance page, as SVG that stands alone: bars of speed, and cost against size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tempering.reports.charts import Svg, join, tag

STYLE = """text { font: 12px system-ui, sans-serif; fill: #57606a } .ours { fill: #0b6e99 } .peer { fill: #9aa4ad }
line, path { stroke: #9aa4ad; fill: none } .a { stroke: #0b6e99 } .b { stroke: #c4622d } .c { stroke: #5b8a3a }
.d { stroke: #8250a8 } .a, .b, .c, .d { stroke-width: 2 }"""
ROW, LEFT, WIDE = 22, 300, 620
HUES = "abcd"


def alone(parts: Sequence[str], width: float, height: float, told: str) -> str:
    """A whole SVG file."""
    return tag(
        "svg",
        tag("title", told),
        tag("style", Svg(STYLE)),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
    )


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """Speeds as horizontal bars from 0, with their numbers; variants of our own are told by their names."""
    most = max(value for _, value in values)
    room = WIDE - LEFT - 60
    parts = []
    for i, (name, value) in enumerate(values):
        y = ROW * (i + 0.5) + 6
        shown = name if len(name) <= 44 else f"{name[:43]}…"
        parts += [
            tag("text", shown, x=LEFT - 8, y=y + 4, text_anchor="end"),
            tag(
                "rect",
                x=LEFT,
                y=y - 7,
                width=round(room * value / most, 1),
                height=14,
                class_="ours" if name.startswith("ours") else "peer",
            ),
            tag("text", f"{value:.3g}", x=LEFT + round(room * value / most, 1) + 6, y=y + 4),
        ]
    return alone(parts, WIDE, ROW * len(values) + 12, title)


def curves(title: str, x_label: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Milliseconds against size, both axes logarithmic; names stand at the right end of their lines."""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    left, top, right, bottom = 60.0, 10.0, 400.0, 230.0

    def place(value: float, values: list[float], start: float, stop: float) -> float:
        low, high = math.log10(min(values)), math.log10(max(values))
        return round(start + (stop - start) * (math.log10(value) - low) / ((high - low) or 1.0), 1)

    parts = [
        tag("line", x1=left, x2=right, y1=bottom, y2=bottom),
        tag("line", x1=left, x2=left, y1=top, y2=bottom),
        tag("text", x_label, x=(left + right) / 2, y=bottom + 34, text_anchor="middle"),
        tag("text", "ms", x=left - 8, y=top + 4, text_anchor="end"),
    ]
    parts += [
        tag("text", f"{x:g}", x=place(x, xs, left, right), y=bottom + 16, text_anchor="middle") for x in sorted(set(xs))
    ]
    for y in (min(ys), max(ys)):
        parts.append(tag("text", f"{y:.3g}", x=left - 8, y=place(y, ys, bottom, top + 20) + 4, text_anchor="end"))
    for hue, (name, points) in zip(HUES, series, strict=False):
        way = " L".join(f"{place(x, xs, left, right):g} {place(y, ys, bottom, top + 20):g}" for x, y in points)
        parts.append(tag("path", d=f"M{way}", class_=hue))
        parts.append(tag("text", name, x=right + 8, y=place(points[-1][1], ys, bottom, top + 20) + 4))
    return alone([join(parts)], WIDE, bottom + 44, title)
