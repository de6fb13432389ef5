"""Charts of the report on one sheet: an SVG file that stands alone, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tempering.reports import charts, page
from tempering.reports.charts import Svg, tag
from tempering.reports.compare import Comparison
from tempering.reports.figures import SMALL, curve, groups_in_charts, inside, overlay, percent, styles

COLUMNS, PITCH, HEAD, AIR, LINE = 3, 384, 20, 22, 18  # panels in a row; widths and heights in pixels
OWN = "svg { overflow: visible } text { font-size: 11.5px; fill: var(--muted) } .teacher { --c: var(--ink) }"
Panel = tuple[str, Svg]


def learning(found: Comparison) -> list[Panel]:
    """The scored metric over epochs: all methods together, then the second half of each beside the control's."""
    metric, css = found.metric, styles(found)
    get = inside(*metric.name.split("/"))
    get = percent(get) if metric.fraction else get
    label = metric.key + (f",{metric.unit}" if metric.unit else "")
    said = (("score", "All methods", 0.0), ("score-late", "All methods, second half", 0.5))
    panels = [
        (f.title, f.svg)
        for key, title, begin in said
        if (f := overlay(found, key, title, get, y_label=label, begin=begin, size=SMALL)) is not None
    ]
    curves = {
        group.label: c
        for group in groups_in_charts(found)
        if group.n and (c := curve(group.counted, "epochs", "epoch", get))
    }
    middle = max((c.x[-1] for c in curves.values()), default=0.0) / 2
    curves = {name: late for name, c in curves.items() if (late := c.since(middle)).x}
    values = [v for c in curves.values() for v in (*c.low, *c.high) if v is not None]
    control = curves.get(found.main or "")
    for i, (name, own) in enumerate(curves.items()):
        beside = [] if control is None or control is own else [control.series(css[found.main or ""], f"{found.main}")]
        series = [*beside, own.series(css[name], name)]
        told = f"{name} ends at {own.y[-1]:.4g}"
        drawing = charts.lines(
            f"late-{i}",
            name,
            told,
            series,
            x_label="epoch",
            y_label=label,
            size=SMALL,
            y_range=(min(values), max(values)),
        )
        panels.append((name, drawing))
    return panels


def sheet(title: str, panels: Sequence[Panel], found: Comparison) -> str:
    """The panels under their titles, and below them which method is which."""
    css, parts, y = styles(found), [], 4.0
    for first in range(0, len(panels), COLUMNS):
        row = [(head, svg, *_size(svg)) for head, svg in panels[first : first + COLUMNS]]
        for i, (head, svg, width, height) in enumerate(row):
            parts.append(tag("text", head, class_="label", x=PITCH * i, y=y + 12))
            place = f'<svg x="{PITCH * i}" y="{y + HEAD:g}" width="{width:g}" height="{height:g}"'
            parts.append(Svg(svg.replace("<svg", place, 1)))
        y += HEAD + max(height for *_, height in row) + AIR
    shown = [group.label for group in groups_in_charts(found) if group.n]
    for i, label in enumerate(shown):
        x, at = PITCH * (i % COLUMNS), y + LINE * (i // COLUMNS) + 12
        line = tag("line", class_="line", x1=x, x2=x + 26, y1=at - 4, y2=at - 4)
        parts.append(tag("g", line, tag("text", label, x=x + 34, y=at), class_=css[label]))
    height, width = y + LINE * -(-len(shown) // COLUMNS) + 8, PITCH * COLUMNS - (PITCH - SMALL[0])
    looks = " ".join(_look(css[label]) for label in shown)
    style = tag("style", Svg(f"{_rules()} {OWN} {looks}"))
    box = {"viewBox": f"0 0 {width} {height:g}", "width": width, "height": f"{height:g}"}
    whole = tag("svg", tag("title", title), style, *parts, xmlns="http://www.w3.org/2000/svg", **box, role="img")
    return whole + "\n"


def _size(svg: Svg) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None, "charts.svg writes a viewBox"
    return float(found[1]), float(found[2])


def _rules() -> str:
    """What the report's style says of colors and of what is inside a drawing."""
    css = (page.HERE / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{[^{}]*\}", css)
    inner = re.findall(r"svg [.g][^{}]*\{[^{}]*\}", css)
    return " ".join([light, f"@media (prefers-color-scheme: dark) {{ {dark} }}", *inner])


def _look(css: str) -> str:
    """Color and dashes of a method, as the report has them."""
    turn, color = divmod(int(css[1:]) - 1, page.COLORS)
    if css == "a0":
        return ".a0 { --c: var(--c0) }"
    dashes = page.DASHES[min(turn, len(page.DASHES) - 1)]
    return f".{css} {{ --c: var(--c{color + 1}); --dashes: {dashes} }}"
