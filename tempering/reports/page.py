"""Write the report: one HTML file that opens offline, made from records only."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from tempering.reports import audit_section as audited
from tempering.reports import figures, figures_analysis, figures_boxes, figures_examples, figures_temperature, table
from tempering.reports import text as words
from tempering.reports.compare import Comparison, RunGroup, compare, display_name
from tempering.reports.pair import pair, side_by_side
from tempering.reports.records import RunRecord, number
from tempering.utils.files import write_atomic
from tempering.utils.text import counted

HERE = Path(__file__).parent
LIMIT = 1_500_000  # bytes; small enough for a mail and to open quickly in a browser
MOST_FOLDERS = 200  # lines of a summary's list of folders
REFRESH = 15  # seconds between reloads of the page of a run in progress
COLORS = 6  # in page.css, besides the control's gray
UNIT = re.compile(r"(?<=\d) (?=[%\u00b1])|(?<=\u00b1) (?=\d)")
DASHES = ("none", "8 3", "8 3 2 3", "2 3")


class Extent(NamedTuple):
    """What a page shows: number of methods in its charts and in its table, and each run's facts or a link to them."""

    charts: int | None = None
    rows: int | None = None
    runs: Literal["facts", "links", "folders"] = "facts"


EXTENTS = (Extent(), Extent(runs="links"), Extent(charts=12, runs="links"), Extent(charts=12, rows=200, runs="folders"))


def write_page(
    runs: Sequence[RunRecord], path: str | Path, *, title: str | None = None, control: str | None = None
) -> Path:
    """Write the report of these runs as one HTML file, atomically, and return its path.

    The same records give the same bytes. ``control`` is as in ``compare``. A page that would have more than 1.5 MB is a
    summary: it links to the records instead of quoting them; then it has charts, then a table of the best methods only.

    Raises:
        ValueError: as in ``compare``.
        ImportError: if jinja2 is not installed (extra "report").
    """
    path = Path(path)
    text = fitting(runs, title=title, control=control, folder=path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def fitting(runs: Sequence[RunRecord], *, title: str | None, control: str | None, folder: Path) -> str:
    """Return the text of the page that ``write_page`` writes into ``folder``."""
    text = ""
    for extent in EXTENTS:
        text = render(runs, title=title, control=control, extent=extent, folder=folder)
        if len(text.encode()) <= LIMIT:
            break
    return text


def render(
    runs: Sequence[RunRecord],
    *,
    title: str | None = None,
    control: str | None = None,
    extent: Extent = EXTENTS[0],
    folder: str | Path = ".",
) -> str:
    """Return the report as the text of an HTML file; links are relative to ``folder``."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the HTML report needs jinja2: pip install 'tempering[report]'.") from error
    from tempering.reports.charts import Svg

    runs = side_by_side(runs)
    comparison = compare(runs, control)
    state, status = words.state(comparison)
    sentences = words.headline(comparison)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    charted = replace(comparison, groups=_best(comparison, extent.charts))
    listed = _best(comparison, extent.rows)
    css = figures.styles(charted)
    sections = [
        figures.result(charted),
        figures.learning(charted),
        figures_temperature.temperatures(charted),
        figures.terms(charted),
        figures.agreement(charted),
        figures_analysis.calibration(charted),
        figures_analysis.classes(charted),
        *figures_boxes.boxes(charted),
    ]
    quoted = [run for group in comparison.groups for run in group.runs] if extent.runs == "facts" else []
    text = environment.get_template("page.html").render(
        title=title or _title(comparison),
        subtitle=_subtitle(comparison),
        state=state,
        status=status,
        refresh=REFRESH if state == "running" else None,
        verdict=sentences[0],
        more=sentences[1:],
        cards=_cards(comparison),
        groups=[(css[group.label], group.name, group.n == 0) for group in figures.groups_in_charts(charted)],
        colors=[_color(name) for name in css.values()],
        columns=list(table.cells(comparison, comparison.groups[0])),
        rows=[(css.get(group.label, "other"), list(table.cells(comparison, group).values())) for group in listed],
        reading=words.reading(comparison),
        sections={section.key: section for section in sections},
        confusions=figures_analysis.confusions(charted),
        examples=figures_examples.examples(charted),
        failures=figures_examples.failures(charted),
        pair=pair(comparison, css),
        audits=audited.audits(charted),
        runs=[_run(run, css.get(run.label, "other")) for run in quoted],
        links=_links(comparison, extent, Path(folder)),
        summary=_summary(comparison, charted, listed, extent),
        style=Svg((HERE / "page.css").read_text(encoding="utf-8")),
    )
    return text + "\n"


def _unbroken(value: object) -> object:
    """Return a text with no line break between a number and its "%", or around "±"."""
    return UNIT.sub("\u00a0", value) if type(value) is str else value


def _best(comparison: Comparison, limit: int | None) -> tuple[RunGroup, ...]:
    """Return at most that many methods, in their order: the controls, then those with the best means."""
    if limit is None or len(comparison.groups) <= limit:
        return comparison.groups
    by_rank = [*comparison.controls, *(group.label for group in (*comparison.ranked, *comparison.groups))]
    kept = set(list(dict.fromkeys(by_rank))[:limit])
    return tuple(group for group in comparison.groups if group.label in kept)


def _links(comparison: Comparison, extent: Extent, folder: Path) -> list[tuple[str, str, str]]:
    """Return (address relative to ``folder``, text, note) of every run's record, or of the folders that hold them."""
    runs = [run for group in comparison.groups for run in group.runs]
    if extent.runs == "links":
        return [(_address(r.source, folder), f"{display_name(r.label)}, seed {r.seed}", r.status) for r in runs]
    if extent.runs == "facts":
        return []
    counts = Counter(run.source.absolute().parent for run in runs)
    parents = sorted(counts)[:MOST_FOLDERS]
    return [(_address(parent, folder), f"{parent.name}/", counted(counts[parent], "record")) for parent in parents]


def _address(path: Path, folder: Path) -> str:
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:  # another drive
        return path.absolute().as_uri()


def _summary(comparison: Comparison, charted: Comparison, listed: Sequence[RunGroup], extent: Extent) -> str:
    """Return what a summary leaves out, in sentences; "" for a full page."""
    if extent.runs == "facts":
        return ""
    groups = len(comparison.groups)
    sentences = [f"This page is a summary of at most {LIMIT / 1e6:g} MB: records are linked, not quoted."]
    if len(charted.groups) < groups:
        sentences.append(f"Charts show the controls and the best methods, {len(charted.groups)} of {groups}.")
    if len(listed) < groups:
        sentences.append(f"The table shows {len(listed)} of {groups}.")
    return " ".join(sentences)


def _color(css: str) -> tuple[str, int, str]:
    """Return (class, color, dashes) of a method: the first is gray, then six colors, repeated with dashes."""
    turn, color = divmod(int(css[1:]) - 1, COLORS) if css != "a0" else (0, -1)
    return css, color + 1, DASHES[min(turn, len(DASHES) - 1)]


def _title(comparison: Comparison) -> str:
    data = next(
        (run.of("data").get("name") for group in comparison.groups for run in group.runs if run.of("data").get("name")),
        None,
    )
    return f"Distillation on {data}" if data else "Distillation"


def _subtitle(comparison: Comparison) -> str:
    """Return networks, number of methods and seeds in one line."""
    runs = [run for group in comparison.groups if group.same_student for run in group.runs]
    students = dict.fromkeys(str(run.of("student").get("name")) for run in runs if run.of("student").get("name"))
    teachers = dict.fromkeys(str(run.of("teacher").get("name")) for run in runs if run.of("teacher").get("name"))
    nets = " and ".join(students) + (f" taught by {' and '.join(teachers)}" if teachers else "")
    seeds = comparison.seeds
    counts = [
        counted(len(comparison.groups), "method"),
        f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds[:8]))}{', ...' * (len(seeds) > 8)})",
    ]
    return ", ".join([part for part in (nets, *counts) if part])


def _cards(comparison: Comparison) -> list[dict[str, str]]:
    """Return the main numbers: teacher, controls, best method, and how much of the gap to the teacher it closed."""
    metric, cards = comparison.metric, []
    controls = [group for group in comparison.groups if group.label in comparison.controls and group.mean is not None]
    best = next((group for group in comparison.ranked if group not in controls), None)
    teacher_score = figures.teacher_accuracy(comparison)
    name = metric.name.replace("/", " ")
    for group in [*controls, *([] if best is None else [best])]:
        role = "best method" if group is comparison.ranked[0] else "best of the others" if controls else "highest mean"
        value = f"{metric.show(group.mean)}{metric.unit}"
        note = f"{name}, {'control' if group in controls else role}"
        cards.append({"value": value, "what": group.name, "note": note})
    if teacher_score is not None:
        cards.append({"value": f"{metric.show(teacher_score)}{metric.unit}", "what": "teacher", "note": name})
    control = next((group for group in controls if group.label == comparison.controls[0]), None)
    low, high = (None if group is None else group.mean for group in (control, best))
    if (
        control
        and teacher_score is not None
        and low is not None
        and high is not None
        and low < min(teacher_score, high)
    ):
        share = (high - low) / (teacher_score - low)
        note = f"of the gap from {control.name} to the teacher"
        cards.append({"value": f"{100 * share:.0f} %", "what": "gap closed", "note": note})
    small, large = _sizes(comparison)
    if cards and small and large and large > small:
        note = f"{_count(small)} parameters, the teacher has {_count(large)}"
        cards.append({"value": f"{large / small:.3g}\u00d7", "what": "smaller", "note": note})
    return cards


def _sizes(comparison: Comparison) -> tuple[float | None, float | None]:
    """Return the number of parameters of student and teacher."""
    runs = [run for group in comparison.groups if group.same_student for run in group.runs]
    sizes = []
    for part in ("student", "teacher"):
        sizes.append(next((v for run in runs if (v := number(run.of(part).get("parameters")))), None))
    return sizes[0], sizes[1]


def _count(value: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f}"


def _run(run: RunRecord, css: str) -> dict[str, Any]:
    """Return what is needed to reproduce this run, as (name, text) pairs, and its results."""
    facts, host = run.facts, run.of("host")
    result = run.of("result")
    commit = facts.get("commit")
    seconds = number(result.get("seconds"))
    score = {which: result.get(which) for which in ("last", "best") if result.get(which)}
    pairs = [
        ("record", run.name),
        ("error", facts.get("error")),
        ("self-check", run.of("selfcheck").get("line")),
        ("started", facts.get("started")),
        ("finished", facts.get("finished")),
        ("training time", None if seconds is None else f"{seconds:.1f} s"),
        ("commit", None if commit is None else f"{commit}{', with uncommitted changes' if facts.get('dirty') else ''}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in sorted(run.of("versions").items()) if v)),
        ("host", ", ".join(str(host[k]) for k in ("name", "cpu", "gpu", "platform") if host.get(k))),
        ("cores", host.get("cores")),
        ("student", _named(facts, "student")),
        ("teacher", _named(facts, "teacher")),
        ("data", _named(facts, "data")),
        ("method", _named(facts, "method")),
        ("settings", _named(facts, "settings")),
        ("optimizer", _named(facts, "optimizer")),
        ("best by", facts.get("best_by")),
        ("loggers", _named(facts, "loggers")),
        *((which, _text(scores)) for which, scores in score.items()),
    ]
    command = facts.get("command")
    return {
        "css": css,
        "label": display_name(run.label),
        "seed": run.seed,
        "status": run.status,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "pairs": [(name, str(value)) for name, value in pairs if value not in (None, "")],
    }


def _named(facts: dict[str, Any], part: str) -> str | None:
    """Format a part of the facts in one line; None if it is null or missing."""
    return _text(facts[part]) if facts.get(part) else None


def _text(value: object, *, inner: bool = False) -> str:
    """Format a nested value in one line: named objects as Name(key=value), floats with 6 digits."""
    if isinstance(value, dict):
        parts = ", ".join(f"{key}={_text(part, inner=True)}" for key, part in value.items() if key != "name")
        if value.get("name"):
            return f"{value['name']}({parts})"
        return f"({parts})" if inner else parts
    if isinstance(value, list):
        return ", ".join(_text(part, inner=True) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
