"""Figures of detectors: average precision by class, and images with the boxes of ground truth, teacher and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempering.reports import charts
from tempering.reports.charts import Mark, Strip, Svg, join, tag
from tempering.reports.compare import Comparison, RunGroup, display_name
from tempering.reports.figures import TEACHER, Figure, Section, groups_in_charts, shown, styles
from tempering.reports.intervals import mean
from tempering.reports.records import RunRecord, number
from tempering.utils.text import counted

ROOM = 800_000  # maximum bytes of pictures on a page
SCALE = 300  # width of a picture, in units of its drawing
ORDER = ("truth", "teacher", "student")


def boxes(comparison: Comparison) -> list[Section]:
    """Return one section if some run has detections, else none."""
    runs = {
        group.label: detected
        for group in groups_in_charts(comparison)
        if (detected := [run for run in shown(group) if _detection(run)])
    }
    if not runs:
        return []
    figures = [f for f in (_by_class(comparison, runs),) if f is not None]
    figures += [
        f
        for group in groups_in_charts(comparison)
        if group.label in runs
        for f in _pictures(group, runs[group.label][0], comparison)
    ]
    budget, fitting = ROOM, []
    for figure in figures:
        budget -= len(figure.svg)
        fitting += [figure] if budget > 0 else []
    large = len(figures) - len(fitting)
    omitted = f" Left out for their size: {counted(large, 'picture')}." if large else ""
    return [
        Section(
            "boxes",
            "Boxes",
            "Images of the scored split whose boxes differ most between the two. White: truth. Dashed: the teacher's. "
            f"Colored: the student's, of the first seed; scores of {_min_score(runs):g} or more."
            f"{_found_shares(runs)}{omitted}",
            fitting,
            many=True,
        )
    ]


def _detection(run: RunRecord) -> Mapping[str, Any]:
    return (run.analysis or {}).get("detection") or {}


def _min_score(runs: Mapping[str, Sequence[RunRecord]]) -> float:
    return next(
        (
            v
            for label_runs in runs.values()
            for run in label_runs
            if (v := number(_detection(run).get("sure"))) is not None
        ),
        0.0,
    )


def _found_shares(runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """Return a sentence on the fraction of the teacher's boxes that each method finds."""
    shares = []
    for label, label_runs in runs.items():
        if (
            share := mean([v for run in label_runs if (v := number(_detection(run).get("found"))) is not None])
        ) is not None:
            shares.append(f"{display_name(label)} {100 * share:.0f} %")
    return (
        f" Teacher's boxes also found by the student (same class, IoU of 0.5): {', '.join(shares)}." if shares else ""
    )


def _names(run: RunRecord) -> list[str]:
    return [str(name) for name in (run.analysis or {}).get("class_names") or []]


def _by_class(comparison: Comparison, runs: Mapping[str, Sequence[RunRecord]]) -> Figure | None:
    """Return one strip per class: each method's mean over its seeds, and the teacher."""
    css, first = styles(comparison), next(iter(runs.values()))[0]
    sides = [(label, css[label], "student", color) for label, color in runs.items()]
    sides += [
        (
            "teacher",
            TEACHER,
            "teacher",
            next((color for color in runs.values() if _class_scores(color[0], "teacher")), []),
        )
    ]
    rows = []
    for k, name in enumerate(_names(first) or [f"class {k}" for k in range(len(_class_scores(first, "student")))]):
        marks = []
        for label, color, side, side_runs in sides:
            values = [
                v for run in side_runs if k < len(a := _class_scores(run, side)) and (v := number(a[k])) is not None
            ]
            if (mean_value := mean(values)) is not None:
                shape = "tick" if side == "teacher" else "dot"
                marks.append(
                    Mark(100 * mean_value, color, f"{display_name(label)}, {name}: {100 * mean_value:.1f} %", shape)
                )
        rows.append(Strip(name, "", marks))
    if not any(row.marks for row in rows):
        return None
    description = f"{counted(len(rows), 'class')}, {counted(len(runs), 'method')}"
    svg = charts.strips(
        "boxes-classes", "Average precision per class", description, rows, x_label="average precision, %", width=360
    )
    return Figure("Average precision per class", svg, "Dot: a student, mean over seeds. Vertical line: the teacher.")


def _class_scores(run: RunRecord, side: str) -> Sequence[Any]:
    return (_detection(run).get("map_by_class") or {}).get(side) or []


def _pictures(group: RunGroup, run: RunRecord, comparison: Comparison) -> list[Figure]:
    css, names, out = styles(comparison)[group.label], _names(run), []
    for i, picture in enumerate(_detection(run).get("pictures") or []):
        by_side = picture["boxes"]
        counts = [f"{side} {len(by_side[side])}" for side in ORDER if side in by_side]
        title, description = f"{group.name}: image {i + 1}", f"Boxes: {', '.join(counts)}"
        out.append(
            Figure(
                title,
                _draw_picture(picture, css, f"{css}-boxes-{i}", title, description, names),
                f"{description}.",
                css,
            )
        )
    return out


def _draw_picture(
    picture: Mapping[str, Any], css: str, key: str, title: str, description: str, names: Sequence[str]
) -> Svg:
    factor = SCALE / picture["width"]
    high = picture["height"] * factor
    source = f"data:image/jpeg;base64,{picture['jpeg']}"
    parts = [tag("image", href=source, width=SCALE, height=high)]
    for side in ORDER:
        color = TEACHER if side == "teacher" else css if side == "student" else ""
        for box in picture["boxes"].get(side) or []:
            x, y, right, below, label, score = box
            name = names[int(label)] if int(label) < len(names) else f"class {int(label)}"
            title_tag = tag("title", f"{side}: {name}" + (f", {score:.2f}" if side != "truth" else ""))
            box_attributes = {
                "x": x * factor,
                "y": y * factor,
                "width": (right - x) * factor,
                "height": (below - y) * factor,
            }
            parts.append(tag("rect", title_tag, class_=f"box {side} {color}".strip(), **box_attributes))
    return charts.svg(key, title, description, [join(parts)], SCALE, high)
