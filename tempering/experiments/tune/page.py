"""Report of a search: its best values, their importance, and one self-contained HTML page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from tempering.experiments.tune.runner import FILE, FORMAT
from tempering.experiments.tune.space import Space
from tempering.experiments.tune.study import best, finished, shown
from tempering.reports import charts
from tempering.reports.charts import Frame, Mark, Scale, Strip, Svg, figure, join, sized, strips, tag
from tempering.reports.compare import Metric
from tempering.utils.files import read_sealed, write_atomic
from tempering.utils.text import counted

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FEW = 4  # complete trials needed to estimate importances
STYLE = Path(charts.__file__).with_name("page.css")
CSS = {"COMPLETE": "complete", "PRUNED": "pruned"}
COLORS = ".complete { --c: var(--c1) } .pruned { --c: var(--c0) } pre { white-space: pre-wrap }"


def importances(study: optuna.Study, space: Space) -> dict[str, float]:
    """Return the fraction of the scores' variance that each dimension explains, largest first; {} for too few trials.

    Pruned trials are left out: their scores are from an earlier epoch.

    Reference: Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014 (fANOVA), as
    computed by Optuna.
    """
    complete = [t for t in finished(study) if t.state.name == "COMPLETE"]
    names = [d.name for d in space.varied]
    if len(complete) < FEW or len({t.value for t in complete}) < 2:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=names)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def words(study: optuna.Study, space: Space) -> list[str]:
    """Return the results of the search as sentences."""
    metric, best_trial, done = _metric(study), best(study), finished(study)
    pruned = sum(t.state.name == "PRUNED" for t in done)
    sentences = [
        f"{shown(metric, best_trial.value)} by {best_trial.user_attrs['method']}",
        f"{counted(len(done), 'trial')}, {pruned} of them pruned.",
    ]
    default_trial = _default_trial(done, space)
    if default_trial is not None and default_trial.number == best_trial.number:
        sentences.append("No trial was better than the default values.")
    elif default_trial is not None and default_trial.value is not None:
        sentences.append(f"Default values: {shown(metric, default_trial.value)}.")
    sentences.append(
        "One seed, the best of many trials, so the score is biased upward. Compare both over seeds, on the test split, "
        "before relying on it."
    )
    return sentences


def write_page(folder: Path, study: optuna.Study, space: Space, typed: str) -> Path:
    """Write tune.html atomically and return its path. The same trials give the same bytes."""
    path = folder / "tune.html"
    write_atomic(path, page(folder, study, space, typed))
    return path


def page(folder: Path, study: optuna.Study, space: Space, typed: str) -> str:
    """Return the page: command to run, history, importances, every dimension, every trial."""
    settings = read_sealed(folder / FILE, required=FORMAT)
    sentences, escape = words(study, space), html.escape
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in settings["flags"].items()) or "none"
    history_lead = "Each trial's score, and the best so far; in gray pruned trials with their last score."
    sections = [
        ("History", history_lead, _history(study)),
        ("Importance", *_importance_chart(study, space)),
        ("Values", "Each complete trial's score over each of its values.", _slices(study, space)),
        ("Trials", "All trials, best first.", _table(study, space)),
    ]
    body = "\n".join(
        f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{content}</section>'
        for title, lead, content in sections
    )
    title = f"Search: {settings['recipe']}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}
{COLORS}
</style>
</head>
<body>
<header>
<p class="kicker">Tempering search</p>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(settings["method"])}, flags {escape(flags)}, seed {settings["seed"]}</p>
<p class="verdict">{escape(sentences[0])}</p>
<p class="more">{escape(" ".join(sentences[1:]))}</p>
<pre>{escape(typed)}</pre>
</header>
<main>
{body}
</main>
<footer><p>The test split was not used: all scores are from the validation split.</p></footer>
</body>
</html>
"""


def _default_trial(done: list[FrozenTrial], space: Space) -> FrozenTrial | None:
    """Return the trial with the default values, with which the search starts; None if there is none."""
    names = {d.name for d in space.varied}
    if not names or names - set(space.defaults):
        return None
    return next((t for t in done if all(_is_same_value(t.params.get(n), space.defaults[n]) for n in names)), None)


def _is_same_value(value: object, text: str) -> bool:
    return value == (float(text) if isinstance(value, float) else text)


def _metric(study: optuna.Study) -> Metric:
    return Metric(str(study.user_attrs["metric"]))


def _score(metric: Metric, value: float) -> float:
    """Return the score as drawn: in percent if it is a fraction, with its original sign."""
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
    points = [(f"{frame.x(i):.1f}", f"{frame.y(v):.1f}") for i, v in steps]
    line = " ".join(f"H{x} V{y}" if j else f"M{x},{y}" for j, (x, y) in enumerate(points))
    parts = frame.axes("trial", _label(metric))
    parts.append(tag("g", tag("path", class_="line", d=line), class_="complete"))
    parts += [_dot(frame, i, v, t, metric) for i, (t, v) in enumerate(zip(done, values, strict=True), 1)]
    return _box("Scores of the trials", parts, 760, 270)


def _importance_chart(study: optuna.Study, space: Space) -> tuple[str, Svg]:
    shares = importances(study, space)
    if not shares:
        return f"Too few complete trials: {FEW} with different scores are needed.", Svg("")
    rows = [
        Strip(name, "complete", (Mark(100 * share, "", f"{share:.0%}", "mean"),), (0.0, 100 * share), f"{share:.0%}")
        for name, share in shares.items()
    ]
    description = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    lead = "Fraction of the scores' variance that each value explains over the range searched (fANOVA)."
    drawn = strips("mattered", "Importance", description, rows, x_label="% of the variance")
    return lead, tag("div", tag("figure", drawn), class_="figures one")


def _slices(study: optuna.Study, space: Space) -> Svg:
    metric, figures = _metric(study), []
    done = [t for t in finished(study) if t.state.name == "COMPLETE" and t.value is not None]
    values = [_score(metric, t.value) for t in done]  # pyright: ignore[reportArgumentType]
    for d in space.varied:
        ticks = None
        if d.low is None or d.high is None:
            positions = [float(d.choices.index(t.params[d.name])) for t in done]
            frame = _frame((-0.5, len(d.choices) - 0.5), values, 360, 220)
            ticks = [(float(i), c if len(c) < 14 else f"{c[:11]}...") for i, c in enumerate(d.choices)]
        else:
            positions = [float(t.params[d.name]) for t in done]
            frame = _frame((d.low, d.high), values, 360, 220, log=d.log)
        parts = frame.axes("", _label(metric), x_ticks=_tick_labels(frame, ticks))
        parts += [_dot(frame, x, v, t, metric) for x, v, t in zip(positions, values, done, strict=True)]
        chart = _box(f"Score over {d.name}", parts, 360, 220)
        figures.append(tag("figure", tag("h3", d.name), chart))
    return tag("div", *figures, class_="figures many")


def _tick_labels(frame: Frame, ticks: list[tuple[float, str]] | None) -> list[tuple[float, str]] | None:
    """Return the given ticks; default: those of a logarithmic scale, else None."""
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
        note = str(t.user_attrs.get("error") or ("" if t.state.name == "COMPLETE" else "pruned"))
        rows.append(tag("tr", tag("th", str(t.number)), *(tag("td", text) for text in (value, *texts, note))))
    table = tag("table", tag("thead", heads), tag("tbody", *rows), class_="small")
    return tag("div", table, style="overflow-x: auto")


def _frame(x: tuple[float, float], ys: list[float], width: int, height: int, *, log: bool = False) -> Frame:
    low, high = min(ys), max(ys)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    across = Scale(x[0], x[1], 52, width - 14, log)
    return Frame(across, Scale(low - margin, high + margin, height - 38, 22), width, height)


def _dot(frame: Frame, x: float, y: float, t: FrozenTrial, metric: Metric) -> Svg:
    suffix = ", pruned" if t.state.name == "PRUNED" else ""
    tooltip = f"trial {t.number}: {shown(metric, t.value)}{suffix}, {t.user_attrs['method']}"
    dot = tag("circle", tag("title", tooltip), class_="dot", cx=frame.x(x), cy=frame.y(y), r=3.2)
    return tag("g", dot, class_=CSS[t.state.name])


def _label(metric: Metric) -> str:
    return metric.name.replace("/", " ") + (", %" if metric.fraction else "")


def _box(title: str, parts: list[Svg], width: int, height: int) -> Svg:
    return tag("svg", tag("title", title), join(parts), role="img", aria_label=title, **sized(width, height))
