"""Samples on which student and teacher differ most: images, texts, and tokens colored by their KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Svg, tag
from tempering.reports.compare import Comparison
from tempering.reports.figures import groups_in_charts, shown, styles
from tempering.reports.records import RunRecord, number

ROOM = 600_000  # maximum bytes of pictures on a page
DRAWN = 96  # of a picture's longer side


@dataclass(frozen=True)
class Row:
    """A class or token: its name, and both probabilities in percent, and whether it is the true one."""

    name: str
    teacher: str
    student: str
    is_label: bool = False


@dataclass(frozen=True)
class Token:
    """A token of a text: its KL as a share of the full color, as text, and whether it is the worst."""

    text: str
    strength: str
    title: str
    worst: bool


@dataclass(frozen=True)
class Example:
    """One sample of one run."""

    css: str
    title: str
    rows: Sequence[Row]
    picture: Svg | None = None
    text: str = ""
    tokens: Sequence[Token] = ()


def examples(comparison: Comparison) -> list[Example]:
    """Return the examples of the first run of each method that has some, as many as there is room for."""
    css, found, room = styles(comparison), list[Example](), ROOM
    for group in groups_in_charts(comparison):
        run = next((run for run in shown(group) if _items(run)), None)
        for i, item in enumerate(_items(run) if run is not None else ()):
            room -= len(str(item.get("png") or "")) + len(str(item.get("tokens") or ""))
            if room > 0:
                color = css[group.label]
                found.append(_example(item, color, f"{color}-example-{i}", group.name, _names(run)))
    return found


def failures(comparison: Comparison) -> list[str]:
    """Return why examples of a method could not be made."""
    keys = {"examples_error": "Examples", "teacher_scores_error": "Scores of the teacher"}
    return [
        f"{text} of {group.name} could not be made: {reason}"
        for group in groups_in_charts(comparison)
        for key, text in keys.items()
        if (reason := next((str(r.analysis[key]) for r in group.runs if r.analysis and r.analysis.get(key)), None))
    ]


def _items(run: RunRecord) -> list[Mapping[str, Any]]:
    return (run.analysis or {}).get("examples") or []


def _names(run: RunRecord | None) -> list[str]:
    return [] if run is None else [str(name) for name in (run.analysis or {}).get("class_names") or []]


def _example(item: Mapping[str, Any], css: str, key: str, group: str, names: Sequence[str]) -> Example:
    title = f"{group}: KL {_figure(item.get('kl'))} nats"
    if item.get("tokens"):
        return Example(css, title, _token_rows(item), text=str(item.get("prompt") or ""), tokens=_tokens(item))
    label = item.get("label")
    rows = [
        Row(_class(names, k), _percent(q), _percent(p), is_label=k == label) for k, q, p in item.get("classes") or []
    ]
    picture = None
    if item.get("png"):
        picture = _picture(item, key, f"{group}: example", f"label {_class(names, label)}" if label is not None else "")
    return Example(css, title, rows, picture, str(item.get("text") or ""))


def _picture(item: Mapping[str, Any], key: str, title: str, description: str) -> Svg:
    scale = DRAWN / max(item["width"], item["height"])
    side = {name: float(scale * item[name]) for name in ("width", "height")}
    image = tag("image", href=f"data:image/png;base64,{item['png']}", **side)
    return charts.svg(key, title, description, [image], side["width"], side["height"])


def _class(names: Sequence[str], k: Any) -> str:
    return names[int(k)] if 0 <= int(k) < len(names) else f"class {int(k)}"


def _token_rows(item: Mapping[str, Any]) -> list[Row]:
    """Return the tokens that either side finds likely at the worst position, the true one marked."""
    return [
        Row(_visible(str(text)), _percent(q), _percent(p), is_label=i == item.get("label"))
        for i, (text, q, p) in enumerate(item.get("likeliest") or [])
    ]


def _tokens(item: Mapping[str, Any]) -> list[Token]:
    out, worst = [], number(item.get("kl")) or 1.0
    for i, (text, kl) in enumerate(item["tokens"]):
        value = number(kl) or 0.0
        strength = f"{max(0.0, min(1.0, value / worst)):.2f}"
        out.append(Token(str(text), strength, f"KL {value:.3g} nats", i == item.get("at")))
    return out


def _visible(token: str) -> str:
    """Show whitespace: a token may be a space or a line break alone."""
    return token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7") or "(empty)"


def _percent(p: Any) -> str:
    value = number(p)
    return "" if value is None else f"{100 * value:.1f}"


def _figure(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.3g}"
