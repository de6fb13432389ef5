"""The report: one HTML file that opens offline, made from records alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempering.reports import audit_section as audited
from tempering.reports import figures, figures_analysis, figures_boxes, figures_temperature, table
from tempering.reports import text as words
from tempering.reports.compare import Comparison, compare
from tempering.reports.records import RunRecord, number
from tempering.utils.files import write_atomic

HERE = Path(__file__).parent
LIMIT = 2_000_000  # bytes: what a mail takes and a browser opens at once
COLORS = 6  # of page.css, beside the control's gray
DASHES = ("none", "8 3", "8 3 2 3", "2 3")


def write_page(
    runs: Sequence[RunRecord], path: str | Path, *, title: str | None = None, control: str | None = None
) -> Path:
    """Write the report of these runs as one HTML file, beside its place and then renamed; the path.

    The same records give the same bytes. ``control`` is as in ``compare``.

    Raises:
        ValueError: as ``compare`` does, or where the page would be larger than 2 MB.
        ImportError: without jinja2, which extra "report" brings.
    """
    text = render(runs, title=title, control=control)
    if len(text.encode()) > LIMIT:
        raise ValueError(
            f"the page would have {len(text.encode()):,} bytes, more than {LIMIT:,}: {len(runs)} runs are too many for "
            "one page. Give fewer arms, or one page each."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def render(runs: Sequence[RunRecord], *, title: str | None = None, control: str | None = None) -> str:
    """The report as the text of an HTML file."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the HTML report needs jinja2: pip install 'tempering[report]'.") from error
    from tempering.reports.charts import Svg

    found = compare(runs, control)
    said = words.headline(found)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = figures.styles(found)
    sections = [
        figures.result(found),
        figures.learning(found),
        figures_temperature.temperatures(found),
        figures.terms(found),
        figures.agreement(found),
        figures_analysis.calibration(found),
        figures_analysis.classes(found),
        *figures_boxes.boxes(found),
    ]
    text = environment.get_template("page.html").render(
        title=title or _title(found),
        subtitle=_subtitle(found),
        verdict=said[0],
        more=said[1:],
        cards=_cards(found),
        arms=[(css[arm.label], arm.label, arm.n == 0) for arm in figures.make_sections(found)],
        colors=[_color(name) for name in css.values()],
        columns=list(table.cells(found, found.arms[0])),
        rows=[(css[arm.label], list(table.cells(found, arm).values())) for arm in found.arms],
        reading=words.reading(found),
        sections={section.key: section for section in sections},
        confusions=figures_analysis.confusions(found),
        audits=audited.audits(found),
        runs=[_run(run, css[run.label]) for arm in found.arms for run in arm.runs],
        style=Svg((HERE / "page.css").read_text(encoding="utf-8")),
    )
    return text + "\n"


def _color(css: str) -> tuple[str, int, str]:
    """(class, color, dashes) of an arm: the first is gray, six have colors, those after them these again, dashed."""
    turn, color = divmod(int(css[1:]) - 1, COLORS) if css != "a0" else (0, -1)
    return css, color + 1, DASHES[min(turn, len(DASHES) - 1)]


def _title(found: Comparison) -> str:
    data = next(
        (run.of("data").get("name") for arm in found.arms for run in arm.runs if run.of("data").get("name")), None
    )
    return f"Distillation on {data}" if data else "Distillation"


def _subtitle(found: Comparison) -> str:
    """Networks, arms and seeds in a line."""
    runs = [run for arm in found.arms if arm.same_student for run in arm.runs]
    students = dict.fromkeys(str(run.of("student").get("name")) for run in runs if run.of("student").get("name"))
    teachers = dict.fromkeys(str(run.of("teacher").get("name")) for run in runs if run.of("teacher").get("name"))
    nets = " and ".join(students) + (f" taught by {' and '.join(teachers)}" if teachers else "")
    seeds = found.seeds
    counts = [
        f"{len(found.arms)} arm{'s' * (len(found.arms) != 1)}",
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds[:8]))}{', ...' * (len(seeds) > 8)})",
    ]
    return ", ".join([part for part in (nets, *counts) if part])


def _cards(found: Comparison) -> list[dict[str, str]]:
    """The few numbers to take home: teacher, control, best arm, and how much of the way between them it went."""
    metric, cards = found.metric, []
    controls = [arm for arm in found.arms if arm.label in found.controls and arm.mean is not None]
    best = next((arm for arm in found.ranked if arm not in controls), None)
    taught = figures.teacher_accuracy(found)
    name = metric.name.replace("/", " ")
    for arm in [*controls, *([] if best is None else [best])]:
        role = "best arm" if arm is found.ranked[0] else "best of the rest" if controls else "highest mean"
        value = f"{metric.show(arm.mean)}{metric.unit}"
        note = f"{name}, {'control' if arm in controls else role}"
        cards.append({"value": value, "what": arm.label, "note": note})
    if taught is not None:
        cards.append({"value": f"{metric.show(taught)}{metric.unit}", "what": "teacher", "note": name})
    control = next((arm for arm in controls if arm.label == found.controls[0]), None)
    low, high = (None if arm is None else arm.mean for arm in (control, best))
    if control and taught is not None and low is not None and high is not None and low < min(taught, high):
        share = (high - low) / (taught - low)
        note = f"of the way from {control.label} to the teacher"
        cards.append({"value": f"{100 * share:.0f} %", "what": "gap closed", "note": note})
    small, large = _sizes(found)
    if cards and small and large:
        note = f"{_count(small)} parameters, the teacher has {_count(large)}"
        cards.append({"value": f"{large / small:.3g}\u00d7", "what": "smaller", "note": note})
    return cards


def _sizes(found: Comparison) -> tuple[float | None, float | None]:
    """Parameters of student and teacher."""
    runs = [run for arm in found.arms if arm.same_student for run in arm.runs]
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
    """What it takes to run this run again, as (name, text) pairs, and how it went."""
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
        *((which, _text(scores)) for which, scores in score.items()),
    ]
    command = facts.get("command")
    return {
        "css": css,
        "label": run.label,
        "seed": run.seed,
        "status": run.status,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "pairs": [(name, str(value)) for name, value in pairs if value not in (None, "")],
    }


def _named(facts: dict[str, Any], part: str) -> str | None:
    """A part of the facts in a line; None where it is null or not there."""
    return _text(facts[part]) if facts.get(part) else None


def _text(value: object, *, inner: bool = False) -> str:
    """A nested value in a line: what has a name as Name(key=value), floats with 6 digits."""
    if isinstance(value, dict):
        said = ", ".join(f"{key}={_text(part, inner=True)}" for key, part in value.items() if key != "name")
        if value.get("name"):
            return f"{value['name']}({said})"
        return f"({said})" if inner else said
    if isinstance(value, list):
        return ", ".join(_text(part, inner=True) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
