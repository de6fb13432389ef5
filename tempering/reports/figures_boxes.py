"""What a detector found: average precision by class, and a few images with the boxes of truth, teacher and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Mark, Strip, Svg, join, tag
from tempering.reports.compare import Arm, Comparison
from tempering.reports.figures import TEACHER, Figure, Section, make_sections, shown, styles
from tempering.reports.intervals import mean
from tempering.reports.records import RunRecord, number

ROOM = 800_000  # bytes of pictures on a page
SCALE = 300  # width of a picture, in the units of its drawing
ORDER = ("truth", "teacher", "student")


def boxes(found: Comparison) -> list[Section]:
    """One section where some run detected something, else none."""
    runs = {arm.label: own for arm in make_sections(found) if (own := [run for run in shown(arm) if _of(run)])}
    if not runs:
        return []
    figures = [f for f in (_by_class(found, runs),) if f is not None]
    figures += [
        f for arm in make_sections(found) if arm.label in runs for f in _pictures(arm, runs[arm.label][0], found)
    ]
    room, kept = ROOM, []
    for figure in figures:
        room -= len(figure.svg)
        kept += [figure] if room > 0 else []
    less = "" if len(kept) == len(figures) else f" {len(figures) - len(kept)} pictures are left out for their size."
    return [
        Section(
            "boxes",
            "Boxes",
            "Images of the scored split. White: the true boxes. Dashed: the teacher's. In the arm's color: the "
            f"student's, of the first seed; both of a score of {_sure(runs):g} or more.{_again(runs)}{less}",
            kept,
            many=True,
        )
    ]


def _of(run: RunRecord) -> Mapping[str, Any]:
    return (run.analysis or {}).get("detection") or {}


def _sure(runs: Mapping[str, Sequence[RunRecord]]) -> float:
    return next((v for own in runs.values() for run in own if (v := number(_of(run).get("sure"))) is not None), 0.0)


def _again(runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """Of the teacher's boxes the share that each arm finds, in a sentence."""
    said = []
    for label, own in runs.items():
        if (share := mean([v for run in own if (v := number(_of(run).get("found"))) is not None])) is not None:
            said.append(f"{label} {100 * share:.0f} %")
    return f" Of the teacher's boxes these find, of one class and at an IoU of 0.5: {', '.join(said)}." if said else ""


def _names(run: RunRecord) -> list[str]:
    return [str(name) for name in (run.analysis or {}).get("class_names") or []]


def _by_class(found: Comparison, runs: Mapping[str, Sequence[RunRecord]]) -> Figure | None:
    """A row a class: each arm's mean over its seeds, and the teacher."""
    css, first = styles(found), next(iter(runs.values()))[0]
    sides = [(label, css[label], "student", own) for label, own in runs.items()]
    sides += [("teacher", TEACHER, "teacher", next((own for own in runs.values() if _listed(own[0], "teacher")), []))]
    rows = []
    for k, name in enumerate(_names(first) or [f"class {k}" for k in range(len(_listed(first, "student")))]):
        marks = []
        for label, own, side, of in sides:
            each = [v for run in of if k < len(a := _listed(run, side)) and (v := number(a[k])) is not None]
            if (middle := mean(each)) is not None:
                shape = "tick" if side == "teacher" else "dot"
                marks.append(Mark(100 * middle, own, f"{label}, {name}: {100 * middle:.1f} %", shape))
        rows.append(Strip(name, "", marks))
    if not any(row.marks for row in rows):
        return None
    told = f"{len(rows)} classes, {len(runs)} arms"
    svg = charts.strips(
        "boxes-classes", "Average precision per class", told, rows, x_label="average precision, %", width=360
    )
    return Figure("Average precision per class", svg, "Dot: an arm's student, mean over seeds. Upright: the teacher.")


def _listed(run: RunRecord, side: str) -> Sequence[Any]:
    return (_of(run).get("map_by_class") or {}).get(side) or []


def _pictures(arm: Arm, run: RunRecord, found: Comparison) -> list[Figure]:
    css, names, out = styles(found)[arm.label], _names(run), []
    for i, picture in enumerate(_of(run).get("pictures") or []):
        by_side = picture["boxes"]
        counts = [f"{side} {len(by_side[side])}" for side in ORDER if side in by_side]
        title, told = f"{arm.label}: image {i + 1}", f"Boxes: {', '.join(counts)}"
        out.append(Figure(title, _drawn(picture, css, f"{css}-boxes-{i}", title, told, names), f"{told}.", css))
    return out


def _drawn(picture: Mapping[str, Any], css: str, key: str, title: str, told: str, names: Sequence[str]) -> Svg:
    factor = SCALE / picture["width"]
    high = picture["height"] * factor
    source = f"data:image/jpeg;base64,{picture['jpeg']}"
    parts = [tag("image", href=source, width=SCALE, height=high)]
    for side in ORDER:
        own = TEACHER if side == "teacher" else css if side == "student" else ""
        for box in picture["boxes"].get(side) or []:
            x, y, right, below, label, score = box
            name = names[int(label)] if int(label) < len(names) else f"class {int(label)}"
            said = tag("title", f"{side}: {name}" + (f", {score:.2f}" if side != "truth" else ""))
            place = {"x": x * factor, "y": y * factor, "width": (right - x) * factor, "height": (below - y) * factor}
            parts.append(tag("rect", said, class_=f"box {side} {own}".strip(), **place))
    return charts.svg(key, title, told, [join(parts)], SCALE, high)
