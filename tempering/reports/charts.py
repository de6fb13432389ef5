"""Small charts as SVG text: scaled by their container, colored by the page's CSS, deterministic byte for byte.

They are not drawn with a plotting library because the page's light and dark colors, fonts and legend switches style
every mark by its CSS class, and because a chart takes only a few kilobytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tempering.utils.text import counted

Value = float | None
LINE = 13  # distance of two labels
MOST_ENLARGED = 1.25  # a chart alone in a wide row would have letters larger than the page's
FEW = 10  # examples in a bin; with fewer its accuracy is noise


class Svg(str):
    """Markup that is already escaped; jinja2 inserts it unchanged."""

    def __html__(self) -> str:
        return str(self)


def tag(name: str, *children: str, **attributes: object) -> Svg:
    """Return an element. Attributes, and children that are not ``Svg``, are escaped."""
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(child if isinstance(child, Svg) else html.escape(child) for child in children)
    return Svg(f"<{name}{attribute_text}>{inside}</{name}>" if children else f"<{name}{attribute_text}/>")


def join(parts: Iterable[str]) -> Svg:
    """Concatenate elements."""
    return Svg("".join(parts))


@dataclass(frozen=True)
class Scale:
    """Map numbers in [low, high] to coordinates in [start, stop] of the drawing."""

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
        """Return round numbers within the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            only_decades = len(decades) > 3
            candidates = [m * 10.0**d for d in decades for m in ((1,) if only_decades else (1, 2, 5))]
            return [t for t in candidates if self.low * 0.999 <= t <= self.high * 1.001]
        step = _round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        css: classes that color it.
        name: tooltip.
        low, high: edges of a band around it; empty for none.
        dots: whether each point has a tooltip with its value.
        text: label at its end.
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
    """One row of ``strips``: marks on a line, an interval under them, and a number on the right."""

    label: str
    css: str
    marks: Sequence[Mark]
    span: tuple[float, float] | None = None
    figure: str = ""


@dataclass(frozen=True)
class Frame:
    """Bounding box of a chart with its two axes."""

    x: Scale
    y: Scale
    width: int
    height: int

    def axes(self, x_label: str, y_label: str, *, x_ticks: Sequence[tuple[float, str]] | None = None) -> list[Svg]:
        """Return grid lines, tick labels and the names of the axes."""
        out = []
        for value in self.y.ticks(4 if self.height < 220 else 5):
            position = self.y(value)
            out.append(tag("line", class_="grid", x1=self.x.start, x2=self.x.stop, y1=position, y2=position))
            out.append(tag("text", figure(value), class_="tick end", x=self.x.start - 6, y=position + 3.5))
        integers = [value for value in self.x.ticks(4 if self.width < 360 else 6) if value == round(value)]
        ticks = x_ticks or [(value, figure(value)) for value in integers]  # epochs and steps are integers
        for value, text in ticks:
            position = self.x(value)
            # a long label at either end would leave the box
            side = (
                "mid"
                if len(text) < 5
                else "end"
                if position >= self.x.stop
                else "start"
                if position <= self.x.start
                else "mid"
            )
            out.append(tag("text", text, class_=f"tick {side}", x=position, y=self.y.start + 15))
        out.append(tag("line", class_="axis", x1=self.x.start, x2=self.x.stop, y1=self.y.start, y2=self.y.start))
        out.append(tag("text", x_label, class_="name end", x=self.x.stop, y=self.y.start + 31))
        out.append(tag("text", y_label, class_="name", x=2, y=11))
        return out


def lines(
    key: str,
    title: str,
    description: str,
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
    """Draw lines with bands over a common x; ``levels`` are horizontal lines (value, class, text)."""
    width, height = size
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if v is not None] + [level[0] for level in levels]
    xs = [v for s in series for v in s.x]
    log = log and min(ys) > 0
    low, high = y_range or _padded_range(ys, log=log)
    if any(s.text for s in series) and not log:
        low, high = low - 0.08 * (high - low), high + 0.05 * (high - low)  # room for the texts at the ends
    x_low, x_high = min(xs), max(xs)
    x = Scale(x_low, x_high if x_high > x_low else x_low + 1, 46, width - 12)
    frame = Frame(x, Scale(low, high, height - 38, 22, log), width, height)
    out = frame.axes(x_label, y_label, x_ticks=x_ticks)
    for value, css, text in levels:
        position = frame.y(value)
        out.append(tag("line", class_=f"level {css}", x1=x.start, x2=x.stop, y1=position, y2=position))
        out.append(tag("text", text, class_="tick end", x=x.stop, y=position - 5))
    out += [_draw_series(s, frame, x_label) for s in series]
    labeled = sorted(
        ((frame.y(y), s) for s in series if s.text and (y := s.y[-1]) is not None), key=lambda pair: pair[0]
    )
    for place, (_, s) in zip(_apart([y for y, _ in labeled], frame.y.start), labeled, strict=True):
        out.append(tag("text", s.text, class_=f"end halo {s.css} said", x=x.stop, y=place))
    return svg(key, title, description, out, width, height)


def _apart(ends: Sequence[float], bottom: float) -> list[float]:
    """Return baselines of labels of lines that end at these heights, from the top: the first above its line, the others
    below theirs if there is room, none over another and none below the axis."""
    places: list[float] = []
    for end in ends:
        place = end + 15 if places and end + 15 < bottom else end - 8
        places.append(max(place, places[-1] + LINE) if places else place)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], bottom - 4 if i + 1 == len(places) else places[i + 1] - LINE)
    return places


def strips(
    key: str,
    title: str,
    description: str,
    rows: Sequence[Strip],
    *,
    x_label: str,
    width: int = 480,
    reference: float | None = None,
    left: int | None = None,
) -> Svg:
    """Draw rows of marks on one scale; labels are above their row, or in a column of width ``left``."""
    values = [v for r in rows for v in (*(m.value for m in r.marks), *(r.span or ()))]
    values += [] if reference is None else [reference]
    low, high = _padded_range(values)
    pitch, top = (44, 0) if left is None else (21, 4)
    height = top + pitch * len(rows) + 40
    x = Scale(low, high, 8 if left is None else left, width - 8)
    foot = height - 36
    lanes = [(top + pitch * i + (22 if left is None else 0), top + pitch * (i + 1)) for i in range(len(rows))]
    # labels above their row must not be crossed by grid lines
    uprights = lanes if left is None else [(top, foot)]
    out = []
    for value in x.ticks(6 if width > 400 else 5):
        position = x(value)
        css = "axis" if value == reference else "grid"
        out += [tag("line", class_=css, x1=position, x2=position, y1=a, y2=b) for a, b in uprights]
        out.append(tag("text", figure(value), class_="tick mid", x=position, y=foot + 15))
    out.append(tag("text", x_label, class_="name end", x=width, y=foot + 31))
    for row, (upper, lower) in zip(rows, lanes, strict=True):
        position = (upper + lower) / 2
        inside = [tag("title", row.label)]
        if left is None:
            inside.append(tag("text", _cut(row.label, (width - 120) // 7), class_="label", x=0, y=upper - 6))
            inside.append(tag("text", row.figure, class_="figure end", x=width, y=upper - 6))
        else:
            inside.append(tag("text", _cut(row.label, left // 6 - 1), class_="tick end", x=left - 8, y=position + 3.5))
            inside.append(tag("line", class_="rule", x1=x.start, x2=x.stop, y1=position, y2=position))
        if row.span is not None:
            inside.append(tag("line", class_="span", x1=x(row.span[0]), x2=x(row.span[1]), y1=position, y2=position))
        out.append(tag("g", *inside, *(_mark(mark, x, position) for mark in row.marks), class_=row.css))
    return svg(key, title, description, out, width, height)


@dataclass(frozen=True)
class Bins:
    """One side of a reliability diagram: (confidence, accuracy, count) of each non-empty bin."""

    css: str
    name: str
    points: Sequence[tuple[float, float, float]] = field(default_factory=tuple)


def reliability(
    key: str, title: str, description: str, sides: Sequence[Bins], *, size: tuple[int, int] = (340, 300)
) -> Svg:
    """Draw accuracy over confidence, both in percent; dot areas show bin counts, the diagonal is calibrated."""
    width, height = size
    x, y = Scale(0, 100, 40, width - 10), Scale(0, 100, height - 38, 22)
    frame = Frame(x, y, width, height)
    out = frame.axes("confidence, %", "accuracy, %")
    out.append(tag("line", class_="diagonal", x1=x(0), y1=y(0), x2=x(100), y2=y(100)))
    for side in sides:
        total = math.fsum(count for *_, count in side.points) or 1.0
        full = [point for point in side.points if point[2] >= FEW]
        d = _path([100 * c for c, _, _ in full], [100 * a for _, a, _ in full], frame)
        inside = [tag("path", class_="line", d=d)]
        for confidence, accuracy, count in side.points:
            shares = f"confidence {100 * confidence:.1f} %, accuracy {100 * accuracy:.1f} %"
            text = f"{side.name}: {shares}, {counted(count, 'row')}"
            r = 2 + 6 * math.sqrt(count / total)
            inside.append(
                tag("circle", tag("title", text), class_="dot", cx=x(100 * confidence), cy=y(100 * accuracy), r=r)
            )
        out.append(tag("g", *inside, class_=side.css))
    return svg(key, title, description, out, width, height)


def figure(value: float) -> str:
    """Format a number on an axis as short as possible: 0.02, 35, 1.2k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{round(value, 6):g}"


def svg(key: str, title: str, description: str, parts: Iterable[Svg], width: float, height: float) -> Svg:
    """Return a drawing with title and description; ``key`` must be unique on the page."""
    named = [tag("title", title, id=f"{key}-t"), tag("desc", description, id=f"{key}-d")]
    labels = {"aria_labelledby": f"{key}-t", "aria_describedby": f"{key}-d"}
    return tag("svg", *named, *parts, **sized(width, height), role="img", **labels)


def sized(width: float, height: float) -> dict[str, str]:
    """Return the attributes of a drawing of that size in CSS pixels, which a container may enlarge a bit only."""
    return {
        "viewBox": f"0 0 {_short(width)} {_short(height)}",
        "style": f"max-width: {MOST_ENLARGED * width:g}px",
    }


def _draw_series(s: Series, frame: Frame, x_label: str) -> Svg:
    """Draw a series' band, line and points with tooltips."""
    inside = [tag("title", s.name)]
    if s.low:
        inside.append(tag("path", class_="band", d=_band(s, frame)))
    inside.append(tag("path", class_="line", d=_path(s.x, s.y, frame)))
    if s.dots or len(s.x) == 1:
        css = "dot" if len(s.x) < 8 else "point"
        for position, value in zip(s.x, s.y, strict=True):
            if value is not None:
                title = tag("title", f"{s.name}, {x_label} {figure(position)}: {value:.4g}".replace(",  ", ", "))
                r = 2.8 if css == "dot" else 4
                inside.append(tag("circle", title, class_=css, cx=frame.x(position), cy=frame.y(value), r=r))
    return tag("g", *inside, class_=s.css)


def _mark(mark: Mark, x: Scale, position: float) -> Svg:
    title, cx = tag("title", mark.text), x(mark.value)
    if mark.shape == "tick":
        return tag("line", title, class_=f"stick {mark.css}".strip(), x1=cx, x2=cx, y1=position - 7, y2=position + 7)
    r = 5.5 if mark.shape == "mean" else 3.2
    return tag("circle", title, class_=f"{mark.shape} {mark.css}".strip(), cx=cx, cy=position, r=r)


def _path(xs: Sequence[float], ys: Sequence[Value], frame: Frame) -> str:
    """Return the path of a line that breaks at missing values."""
    out, connected = [], False
    for position, value in zip(xs, ys, strict=True):
        if value is not None:
            out.append(f"{'' if connected else 'M'}{_short(frame.x(position))},{_short(frame.y(value))}")
        connected = value is not None
    return " ".join(out)


def _band(s: Series, frame: Frame) -> str:
    """Return the outline of each segment in which both edges have values."""
    out: list[str] = []
    segment: list[tuple[float, float, float]] = []
    for position, low, high in [*zip(s.x, s.low, s.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None:
            segment.append((position, low, high))
            continue
        if len(segment) > 1:
            upper = [(a, h) for a, _, h in segment]
            lower = [(a, b) for a, b, _ in reversed(segment)]
            out.append("M" + " ".join(f"{_short(frame.x(a))},{_short(frame.y(v))}" for a, v in upper + lower) + "Z")
        segment = []
    return " ".join(out)


def _padded_range(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Return a range that contains the values with a small margin."""
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin else low - margin), high + margin


def _round_step(raw: float) -> float:
    size = 10.0 ** math.floor(math.log10(raw))
    return next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)


def _short(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
