"""Small charts as SVG text: sized by their box, colored by the page's CSS, the same bytes for the same numbers.

Drawn here and not by a plotting library because the page's light and dark colors, its fonts and its switches for
arms act on every mark by its class, and because a chart stays at a few kilobytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Value = float | None
FEW = 10  # examples in a bin, whose accuracy is noise below that


class Svg(str):
    """Markup that needs no more escaping; jinja2 takes it as it is."""

    def __html__(self) -> str:
        return str(self)


def tag(name: str, *children: str, **attributes: object) -> Svg:
    """An element. Every attribute and every child that is not an ``Svg`` is escaped."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Svg) else html.escape(child) for child in children)
    return Svg(f"<{name}{said}>{inside}</{name}>" if children else f"<{name}{said}/>")


def join(parts: Iterable[str]) -> Svg:
    """Elements one after the other."""
    return Svg("".join(parts))


@dataclass(frozen=True)
class Scale:
    """Numbers in [low, high] to places in [start, stop] of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            many = len(decades) > 3
            found = [m * 10.0**d for d in decades for m in ((1,) if many else (1, 2, 5))]
            return [t for t in found if self.low * 0.999 <= t <= self.high * 1.001]
        step = _round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        css: classes that color it.
        name: said when pointed at.
        low, high: a band round it, or nothing.
        dots: whether each point says its value when pointed at.
        text: written at its end.
    """

    css: str
    name: str
    x: Sequence[float]
    y: Sequence[Value]
    low: Sequence[Value] = ()
    high: Sequence[Value] = ()
    dots: bool = False
    text: str = ""


@dataclass(frozen=True)
class Mark:
    """One value on a strip: "dot", "mean" (larger) or "tick"."""

    value: float
    css: str
    text: str
    shape: str = "dot"


@dataclass(frozen=True)
class Strip:
    """One row of ``strips``: marks on a line, an interval under them, and a figure at the right."""

    label: str
    css: str
    marks: Sequence[Mark]
    span: tuple[float, float] | None = None
    figure: str = ""


@dataclass(frozen=True)
class Frame:
    """The box of a chart with its two axes."""

    x: Scale
    y: Scale
    width: int
    height: int

    def axes(self, x_label: str, y_label: str, *, x_ticks: Sequence[tuple[float, str]] | None = None) -> list[Svg]:
        """Grid lines, tick labels and the names of the axes."""
        out = []
        for value in self.y.ticks(4 if self.height < 220 else 5):
            at = self.y(value)
            out.append(tag("line", class_="grid", x1=self.x.start, x2=self.x.stop, y1=at, y2=at))
            out.append(tag("text", figure(value), class_="tick end", x=self.x.start - 6, y=at + 3.5))
        whole = [value for value in self.x.ticks(4 if self.width < 360 else 6) if value == round(value)]
        ticks = x_ticks or [(value, figure(value)) for value in whole]  # there is no half epoch
        for value, text in ticks:
            at = self.x(value)
            # a long word at either end would leave the box
            side = "mid" if len(text) < 5 else "end" if at >= self.x.stop else "start" if at <= self.x.start else "mid"
            out.append(tag("text", text, class_=f"tick {side}", x=at, y=self.y.start + 15))
        out.append(tag("line", class_="axis", x1=self.x.start, x2=self.x.stop, y1=self.y.start, y2=self.y.start))
        out.append(tag("text", x_label, class_="name end", x=self.x.stop, y=self.y.start + 31))
        out.append(tag("text", y_label, class_="name", x=2, y=11))
        return out


def lines(
    key: str,
    title: str,
    told: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (480, 270),
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    levels: Sequence[tuple[float, str, str]] = (),
) -> Svg:
    """Lines with bands over a common x; ``levels`` are (value, class, text) lines across."""
    width, height = size
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None] + [level[0] for level in levels]
    xs = [v for s in series for v in s.x]
    log = log and min(ys) > 0
    low, high = y_range or _room(ys, log=log)
    if any(s.text for s in series) and not log:
        low, high = low - 0.08 * (high - low), high + 0.05 * (high - low)  # room for the texts at the ends
    x_low, x_high = min(xs), max(xs)
    x = Scale(x_low, x_high if x_high > x_low else x_low + 1, 46, width - 12)
    frame = Frame(x, Scale(low, high, height - 38, 22, log), width, height)
    out = frame.axes(x_label, y_label, x_ticks=x_ticks)
    for value, css, text in levels:
        at = frame.y(value)
        out.append(tag("line", class_=f"level {css}", x1=x.start, x2=x.stop, y1=at, y2=at))
        out.append(tag("text", text, class_="tick end", x=x.stop, y=at - 5))
    out += [_drawn(s, frame, x_label) for s in series]
    ends = [(s, y) for s in series if s.text and (y := s.y[-1]) is not None]
    for s, y in ends:
        under = any(other > y for _, other in ends) and frame.y(y) + 15 < frame.y.start
        out.append(tag("text", s.text, class_=f"end halo {s.css} said", x=x.stop, y=frame.y(y) + (15 if under else -8)))
    return svg(key, title, told, out, width, height)


def strips(
    key: str,
    title: str,
    told: str,
    rows: Sequence[Strip],
    *,
    x_label: str,
    width: int = 480,
    reference: float | None = None,
    left: int | None = None,
) -> Svg:
    """Rows of marks over one scale; labels above their row, or in a column ``left`` wide."""
    values = [v for r in rows for v in (*(m.value for m in r.marks), *(r.span or ()))]
    values += [] if reference is None else [reference]
    low, high = _room(values)
    pitch, top = (44, 0) if left is None else (21, 4)
    height = top + pitch * len(rows) + 40
    x = Scale(low, high, 8 if left is None else left, width - 8)
    foot = height - 36
    lanes = [(top + pitch * i + (22 if left is None else 0), top + pitch * (i + 1)) for i in range(len(rows))]
    # labels above their row keep the lines clear of them
    uprights = lanes if left is None else [(top, foot)]
    out = []
    for value in x.ticks(6 if width > 400 else 5):
        at = x(value)
        css = "axis" if value == reference else "grid"
        out += [tag("line", class_=css, x1=at, x2=at, y1=a, y2=b) for a, b in uprights]
        out.append(tag("text", figure(value), class_="tick mid", x=at, y=foot + 15))
    out.append(tag("text", x_label, class_="name end", x=width, y=foot + 31))
    for row, (upper, lower) in zip(rows, lanes, strict=True):
        at = (upper + lower) / 2
        inside = [tag("title", row.label)]
        if left is None:
            inside.append(tag("text", _cut(row.label, (width - 120) // 7), class_="label", x=0, y=upper - 6))
            inside.append(tag("text", row.figure, class_="figure end", x=width, y=upper - 6))
        else:
            inside.append(tag("text", _cut(row.label, left // 6 - 1), class_="tick end", x=left - 8, y=at + 3.5))
            inside.append(tag("line", class_="rule", x1=x.start, x2=x.stop, y1=at, y2=at))
        if row.span is not None:
            inside.append(tag("line", class_="span", x1=x(row.span[0]), x2=x(row.span[1]), y1=at, y2=at))
        out.append(tag("g", *inside, *(_mark(mark, x, at) for mark in row.marks), class_=row.css))
    return svg(key, title, told, out, width, height)


@dataclass(frozen=True)
class Bins:
    """One side of a reliability diagram: (confidence, accuracy, count) of each filled bin."""

    css: str
    name: str
    points: Sequence[tuple[float, float, float]] = field(default_factory=tuple)


def reliability(key: str, title: str, told: str, sides: Sequence[Bins], *, size: tuple[int, int] = (340, 300)) -> Svg:
    """Accuracy over confidence, both in percent, dots as large as their bin is full; the diagonal is calibrated."""
    width, height = size
    x, y = Scale(0, 100, 40, width - 10), Scale(0, 100, height - 38, 22)
    frame = Frame(x, y, width, height)
    out = frame.axes("confidence, %", "accuracy, %")
    out.append(tag("line", class_="diagonal", x1=x(0), y1=y(0), x2=x(100), y2=y(100)))
    for side in sides:
        whole = math.fsum(count for *_, count in side.points) or 1.0
        full = [point for point in side.points if point[2] >= FEW]
        d = _path([100 * c for c, _, _ in full], [100 * a for _, a, _ in full], frame)
        inside = [tag("path", class_="line", d=d)]
        for confidence, accuracy, count in side.points:
            said = (
                f"{side.name}: confidence {100 * confidence:.1f} %, accuracy {100 * accuracy:.1f} %, {count:.0f} rows"
            )
            r = 2 + 6 * math.sqrt(count / whole)
            inside.append(
                tag("circle", tag("title", said), class_="dot", cx=x(100 * confidence), cy=y(100 * accuracy), r=r)
            )
        out.append(tag("g", *inside, class_=side.css))
    return svg(key, title, told, out, width, height)


def figure(value: float) -> str:
    """A number on an axis, as short as it can be: 0.02, 35, 1.2k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 6):g}"


def svg(key: str, title: str, told: str, parts: Iterable[Svg], width: float, height: float) -> Svg:
    """A drawing that says what it is; ``key`` is its own on the page."""
    named = [tag("title", title, id=f"{key}-t"), tag("desc", told, id=f"{key}-d")]
    box = f"0 0 {_short(width)} {_short(height)}"
    return tag("svg", *named, *parts, viewBox=box, role="img", aria_labelledby=f"{key}-t", aria_describedby=f"{key}-d")


def _drawn(s: Series, frame: Frame, x_label: str) -> Svg:
    """A series' band, line and the points that answer the pointer."""
    inside = [tag("title", s.name)]
    if s.low:
        inside.append(tag("path", class_="band", d=_band(s, frame)))
    inside.append(tag("path", class_="line", d=_path(s.x, s.y, frame)))
    if s.dots or len(s.x) == 1:
        css = "dot" if len(s.x) < 8 else "point"
        for at, value in zip(s.x, s.y, strict=True):
            if value is not None:
                said = tag("title", f"{s.name}, {x_label} {figure(at)}: {value:.4g}".replace(",  ", ", "))
                r = 2.8 if css == "dot" else 4
                inside.append(tag("circle", said, class_=css, cx=frame.x(at), cy=frame.y(value), r=r))
    return tag("g", *inside, class_=s.css)


def _mark(mark: Mark, x: Scale, at: float) -> Svg:
    said, cx = tag("title", mark.text), x(mark.value)
    if mark.shape == "tick":
        return tag("line", said, class_=f"stick {mark.css}".strip(), x1=cx, x2=cx, y1=at - 7, y2=at + 7)
    r = 5.5 if mark.shape == "mean" else 3.2
    return tag("circle", said, class_=f"{mark.shape} {mark.css}".strip(), cx=cx, cy=at, r=r)


def _path(xs: Sequence[float], ys: Sequence[Value], frame: Frame) -> str:
    """A line that breaks where there is no value."""
    out, pen = [], False
    for at, value in zip(xs, ys, strict=True):
        if value is not None:
            out.append(f"{'' if pen else 'M'}{_short(frame.x(at))},{_short(frame.y(value))}")
        pen = value is not None
    return " ".join(out)


def _band(s: Series, frame: Frame) -> str:
    """The outline of each stretch in which both edges have values."""
    out: list[str] = []
    stretch: list[tuple[float, float, float]] = []
    for at, low, high in [*zip(s.x, s.low, s.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None:
            stretch.append((at, low, high))
            continue
        if len(stretch) > 1:
            upper = [(a, h) for a, _, h in stretch]
            lower = [(a, b) for a, b, _ in reversed(stretch)]
            out.append("M" + " ".join(f"{_short(frame.x(a))},{_short(frame.y(v))}" for a, v in upper + lower) + "Z")
        stretch = []
    return " ".join(out)


def _room(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """A range that holds the values with a little air."""
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    air = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (0.0 if 0 <= low < air else low - air), high + air


def _round_step(raw: float) -> float:
    size = 10.0 ** math.floor(math.log10(raw))
    return next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)


def _short(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
