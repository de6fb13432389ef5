"""What is seen of a search: its best values, what mattered, and one self-contained page."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tempering.experiments.tune.runner import FILE
from tempering.experiments.tune.space import Space
from tempering.experiments.tune.study import best, finished, shown
from tempering.reports import charts
from tempering.reports.charts import Frame, Mark, Scale, Strip, Svg, figure, join, strips, tag
from tempering.reports.compare import Metric
from tempering.utils.files import write_atomic

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FEW = 4  # whole trials below which an importance is a guess about nothing
STYLE = Path(charts.__file__).with_name("page.css")
WAYS = {"COMPLETE": "whole", "PRUNED": "cut"}
COLORS = ".whole { --c: var(--c1) } .cut { --c: var(--c0) } pre { white-space: pre-wrap }"


def importances(study: optuna.Study, space: Space) -> dict[str, float]:
    """Share of the scores' variance that each dimension explains, the largest first; {} for too few trials.

    Cut trials are left out: their scores are of another epoch.

    Reference: Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014 (fANOVA), as
    Optuna computes it.
    """
    done = [t for t in finished(study) if t.state.name == "COMPLETE"]
    names = [d.name for d in space.varied]
    if len(done) < FEW or len({t.value for t in done}) < 2:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=names)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def words(study: optuna.Study, space: Space) -> list[str]:
    """What the search found, in sentences."""
    metric, top, done = _metric(study), best(study), finished(study)
    cut = sum(t.state.name == "PRUNED" for t in done)
    said = [f"{shown(metric, top.value)} by {top.user_attrs['method']}", f"{len(done)} trials, {cut} of them cut."]
    own = _own(done, space)
    if own is not None and own.number == top.number:
        said.append("No trial was better than the method as it came.")
    elif own is not None and own.value is not None:
        said.append(f"The method as it came: {shown(metric, own.value)}.")
    said.append(
        "One seed, the best of many: it flatters itself. Compare both over seeds, on the test split, before you "
        "believe it."
    )
    return said


def write_page(folder: Path, study: optuna.Study, space: Space, typed: str) -> Path:
    """Write tune.html beside its place, then rename; its path. The same trials give the same bytes."""
    path = folder / "tune.html"
    write_atomic(path, page(folder, study, space, typed))
    return path


def page(folder: Path, study: optuna.Study, space: Space, typed: str) -> str:
    """The page's text: what to type, the history, what mattered, every dimension, every trial."""
    what = json.loads((folder / FILE).read_text(encoding="utf-8"))
    said, escaped = words(study, space), html.escape
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in what["flags"].items()) or "none"
    past = "Each trial's score, and the best so far; in gray the trials that were cut, where they stood."
    sections = [
        ("History", past, _history(study)),
        ("What mattered", *_mattered(study, space)),
        ("Where", "Each whole trial's score over each of its values.", _slices(study, space)),
        ("Trials", "All of them, the best first.", _table(study, space)),
    ]
    body = "\n".join(
        f'<section><h2>{escaped(title)}</h2><p class="lead">{escaped(lead)}</p>{content}</section>'
        for title, lead, content in sections
    )
    title = f"Search: {what['recipe']}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}
{COLORS}
</style>
</head>
<body>
<header>
<p class="kicker">Tempering search</p>
<h1>{escaped(title)}</h1>
<p class="subtitle">{escaped(what["method"])}, flags {escaped(flags)}, seed {what["seed"]}</p>
<p class="verdict">{escaped(said[0])}</p>
<p class="more">{escaped(" ".join(said[1:]))}</p>
<pre>{escaped(typed)}</pre>
</header>
<main>
{body}
</main>
<footer><p>The test split was not looked at: every score is the validation split's.</p></footer>
</body>
</html>
"""


def _own(done: list[FrozenTrial], space: Space) -> FrozenTrial | None:
    """The trial with the method's own values, which the search began with; None where it did not."""
    names = {d.name for d in space.varied}
    if not names or names - set(space.defaults):
        return None
    return next((t for t in done if all(_same(t.params.get(n), space.defaults[n]) for n in names)), None)


def _same(value: object, text: str) -> bool:
    return value == (float(text) if isinstance(value, float) else text)


def _metric(study: optuna.Study) -> Metric:
    return Metric(str(study.user_attrs["metric"]))


def _score(metric: Metric, value: float) -> float:
    """As it is drawn: in percent where it is a fraction, and the right way up."""
    value = -value if metric.lower else value
    return 100 * value if metric.fraction else value


def _history(study: optuna.Study) -> Svg:
    metric = _metric(study)
    done = [t for t in finished(study) if t.value is not None]
    values = [_score(metric, t.value) for t in done]  # pyright: ignore[reportArgumentType]
    steps: list[tuple[int, float]] = []
    for i, (t, value) in enumerate(zip(done, values, strict=True), 1):
        if t.state.name == "COMPLETE":
            so_far = steps[-1][1] if steps else value
            steps.append((i, min(so_far, value) if metric.lower else max(so_far, value)))
    frame = _frame((1, max(2, len(done))), values, 760, 270)
    steps += [(len(done), steps[-1][1])] if steps else []
    at = [(f"{frame.x(i):.1f}", f"{frame.y(v):.1f}") for i, v in steps]
    line = " ".join(f"H{x} V{y}" if j else f"M{x},{y}" for j, (x, y) in enumerate(at))
    parts = frame.axes("trial", _label(metric))
    parts.append(tag("g", tag("path", class_="line", d=line), class_="whole"))
    parts += [_dot(frame, i, v, t, metric) for i, (t, v) in enumerate(zip(done, values, strict=True), 1)]
    return _box("Scores of the trials", parts, 760, 270)


def _mattered(study: optuna.Study, space: Space) -> tuple[str, Svg]:
    found = importances(study, space)
    if not found:
        return f"Too few whole trials to say: {FEW} with different scores are needed.", Svg("")
    rows = [
        Strip(name, "whole", (Mark(100 * share, "", f"{share:.0%}", "mean"),), (0.0, 100 * share), f"{share:.0%}")
        for name, share in found.items()
    ]
    told = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    lead = "Share of the scores' variance that each value explains over the whole range searched (fANOVA)."
    drawn = strips("mattered", "What mattered", told, rows, x_label="% of the variance")
    return lead, tag("div", tag("figure", drawn), class_="figures one")


def _slices(study: optuna.Study, space: Space) -> Svg:
    metric, figures = _metric(study), []
    done = [t for t in finished(study) if t.state.name == "COMPLETE" and t.value is not None]
    values = [_score(metric, t.value) for t in done]  # pyright: ignore[reportArgumentType]
    for d in space.varied:
        ticks = None
        if d.low is None or d.high is None:
            at = [float(d.choices.index(t.params[d.name])) for t in done]
            frame = _frame((-0.5, len(d.choices) - 0.5), values, 360, 220)
            ticks = [(float(i), c if len(c) < 14 else f"{c[:11]}...") for i, c in enumerate(d.choices)]
        else:
            at = [float(t.params[d.name]) for t in done]
            frame = _frame((d.low, d.high), values, 360, 220, log=d.log)
        parts = frame.axes("", _label(metric), x_ticks=_placed(frame, ticks))
        parts += [_dot(frame, x, v, t, metric) for x, v, t in zip(at, values, done, strict=True)]
        drawn = _box(f"Score over {d.name}", parts, 360, 220)
        figures.append(tag("figure", tag("h3", d.name), drawn))
    return tag("div", *figures, class_="figures many")


def _placed(frame: Frame, ticks: list[tuple[float, str]] | None) -> list[tuple[float, str]] | None:
    """Ticks at values; by themselves, of a logarithm's range, those that have room."""
    if ticks is not None or not frame.x.log:
        return ticks
    return [(v, figure(v)) for v in frame.x.ticks()]


def _table(study: optuna.Study, space: Space) -> Svg:
    metric = _metric(study)
    names = [d.name for d in space.varied]
    heads = tag("tr", *(tag("th", text) for text in ("trial", _label(metric), *names, "")))
    ordered = sorted(finished(study), key=lambda t: (t.state.name, -(t.value or float("-inf")), t.number))
    rows = []
    for t in ordered:
        value = "no score" if t.value is None else metric.show(-t.value if metric.lower else t.value)
        texts = [f"{p:.4g}" if isinstance(p := t.params.get(n), float) else str(p) for n in names]
        how = str(t.user_attrs.get("error") or ("" if t.state.name == "COMPLETE" else "cut"))
        rows.append(tag("tr", tag("th", str(t.number)), *(tag("td", text) for text in (value, *texts, how))))
    table = tag("table", tag("thead", heads), tag("tbody", *rows), class_="small")
    return tag("div", table, style="overflow-x: auto")


def _frame(x: tuple[float, float], ys: list[float], width: int, height: int, *, log: bool = False) -> Frame:
    low, high = min(ys), max(ys)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    across = Scale(x[0], x[1], 52, width - 14, log)
    return Frame(across, Scale(low - air, high + air, height - 38, 22), width, height)


def _dot(frame: Frame, x: float, y: float, t: FrozenTrial, metric: Metric) -> Svg:
    cut = ", cut" if t.state.name == "PRUNED" else ""
    said = f"trial {t.number}: {shown(metric, t.value)}{cut}, {t.user_attrs['method']}"
    dot = tag("circle", tag("title", said), class_="dot", cx=frame.x(x), cy=frame.y(y), r=3.2)
    return tag("g", dot, class_=WAYS[t.state.name])


def _label(metric: Metric) -> str:
    return metric.name.replace("/", " ") + (", %" if metric.fraction else "")


def _box(title: str, parts: list[Svg], width: int, height: int) -> Svg:
    return tag("svg", tag("title", title), join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
