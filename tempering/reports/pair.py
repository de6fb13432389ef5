"""Two runs, or two methods, side by side: settings that differ, and scores paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempering.reports.compare import NO_DIFFERENCE, Comparison, Metric, RunGroup
from tempering.reports.intervals import difference, mean
from tempering.reports.records import RunRecord, number

PARTS = ("student", "teacher", "data", "method", "optimizer", "settings", "selfcheck", "versions", "host")
LEFT_OUT = (*NO_DIFFERENCE, "scores", "weights", "checks")
LONGEST = 160  # characters of a value


@dataclass(frozen=True)
class Pair:
    """What the page shows of two methods.

    Attributes:
        names: of the two, with their CSS classes.
        settings: (name, value, value) of what differs in the first run of each.
        scores: (metric, value, value, difference, whether its interval excludes zero).
    """

    names: tuple[tuple[str, str], tuple[str, str]]
    settings: Sequence[tuple[str, str, str]]
    scores: Sequence[tuple[str, str, str, str, bool]]


def side_by_side(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs; two runs of one label get labels with their folders' names, so that they are distinguished."""
    if len(runs) != 2 or runs[0].label != runs[1].label:
        return list(runs)
    folders = [run.source.absolute() for run in runs]
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = ["/".join(folder.parts[-2:]) for folder in folders]
    return [replace(r, facts={**r.facts, "label": f"{r.label} ({name})"}) for r, name in zip(runs, names, strict=True)]


def pair(comparison: Comparison, css: Mapping[str, str]) -> Pair | None:
    """Return the comparison of two methods; None for another number."""
    if len(comparison.groups) != 2:
        return None
    first, second = comparison.groups
    facts = [_flat({part: group.runs[0].facts.get(part) for part in PARTS}) for group in (first, second)]
    settings = [
        (name.replace("_", " "), _text(facts[0].get(name)), _text(facts[1].get(name)))
        for name in dict.fromkeys([*facts[0], *facts[1]])
        if facts[0].get(name) != facts[1].get(name) and name.rpartition(".")[2] not in LEFT_OUT
    ]
    names = ((first.name, css[first.label]), (second.name, css[second.label]))
    return Pair(names, settings, _scores(first, second))


def _scores(first: RunGroup, second: RunGroup) -> list[tuple[str, str, str, str, bool]]:
    """Return every score of the last epoch, and the second method's minus the first's over the same seeds."""
    rows = []
    for name in dict.fromkeys([*_metrics(first), *_metrics(second)]):
        metric = Metric(name)
        sides = [{r.seed: v for r in group.counted if (v := r.score(name)) is not None} for group in (first, second)]
        gap, text = difference(sides[1], sides[0]), "-"
        if gap is not None:
            text = metric.show(gap.mean, signed=True) + metric.step
            text += "" if gap.half is None else f" \u00b1 {metric.show(gap.half)}"
        means = [mean(list(side.values())) for side in sides]
        one, two = (metric.show(v) + (metric.unit if v is not None else "") for v in means)
        rows.append((name.replace("/", " ").replace("_", " "), one, two, text, gap is not None and gap.shown))
    return rows


def _metrics(group: RunGroup) -> list[str]:
    last = [run.of("result").get("last") or {} for run in group.counted]
    splits = [(split, scores) for result in last for split, scores in result.items() if isinstance(scores, dict)]
    return [f"{split}/{key}" for split, scores in splits for key, v in scores.items() if number(v) is not None]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if _is_nested(value) else None
    if items is None:
        return {} if value is None else {name: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{name}.{key}".lstrip(".")).items()}


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _text(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if number(value) is not None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
