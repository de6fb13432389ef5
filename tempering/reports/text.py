"""Summarize a comparison in sentences derived from its numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from tempering.reports.compare import NOT_RUN, Comparison, RunGroup, display_name
from tempering.reports.intervals import Difference
from tempering.reports.records import RunRecord, number
from tempering.utils.text import counted

PM = "\u00b1"


def headline(comparison: Comparison) -> list[str]:
    """Return the conclusions as sentences, the main one first."""
    best = next(iter(comparison.ranked), None)
    if best is None:
        return ["No run has finished, so there is nothing to compare yet.", *_open(comparison)]
    rivals = [group for group in comparison.ranked if group.label not in comparison.controls]
    return [*_first(comparison, best, rivals), *_counted(comparison, rivals), *_open(comparison)]


def _first(comparison: Comparison, best: RunGroup, rivals: list[RunGroup]) -> list[str]:
    """Compare the best method that is not a control with the main control, then with the other."""
    main, score = comparison.main, _score_text(comparison, best)
    if not comparison.controls:
        if len(comparison.ranked) == 1:
            return [
                f"{best.name} reaches {score}{_seeds_suffix(best)}.",
                "There is no other method to compare it with.",
            ]
        return [
            f"{best.name} has the highest mean, {score}.".replace(
                "highest", "lowest" if comparison.metric.lower else "highest"
            ),
            "No method is named as the control, so there are no differences.",
        ]
    if main is None or comparison.group(main).mean is None:
        return [
            f"{best.name} leads with {score}.",
            f"{display_name(main or comparison.controls[0])}, the control, has no finished run yet.",
        ]
    if not rivals:  # only controls
        rivals = [group for group in comparison.ranked if group.label in comparison.controls[1:]]
        main = comparison.controls[0]
    gap = rivals[0].versus.get(main) if rivals else None
    if gap is None:
        return [f"{best.name} reaches {score}{_seeds_suffix(best)}.", "No other method has finished."]
    return [*_verdict(comparison, rivals[0], main, gap), *_against_other_controls(comparison, rivals[0], main)]


def _verdict(comparison: Comparison, group: RunGroup, control: str, gap: Difference) -> list[str]:
    """Compare the best method that is not the control with the control."""
    metric, control = comparison.metric, display_name(control)
    better = gap.mean != 0 and (gap.mean < 0) == metric.lower
    by = f"{metric.show(abs(gap.mean))}{metric.step}"
    if gap.half is None:
        relation = f"is {by} {'better' if better else 'worse'} than" if abs(gap.mean) > 1e-12 else "does as well as"
        reason = "With one seed there is no interval, so this may be chance."
        if gap.n > 1:
            reason = "The seeds do not differ, so there is no interval; with so few of them this may be chance."
        over = "on one seed" if gap.n == 1 else f"over {_pairs_text(gap)}"
        return [f"{group.name} {relation} {control}, {over}.", f"It reaches {_score_text(comparison, group)}. {reason}"]
    if gap.shown and better:
        interval = _interval_text(comparison, gap)
        return [
            f"{group.name} beats {control} by {by}.",
            f"It reaches {_score_text(comparison, group)}; the 95 % interval of the gain, {interval}, excludes zero.",
        ]
    if gap.shown:
        interval = _interval_text(comparison, gap)
        return [
            f"Nothing here beats {control}.",
            f"The closest, {group.name}, is worse by {by}; the 95 % interval, {interval}, excludes zero.",
        ]
    observed = (
        f"{group.name} against {control}: {_difference_text(comparison, gap)} over {_pairs_text(gap)}, an interval "
        "that includes zero."
    )
    need = (
        f"A difference had to reach {metric.show(gap.half)}{metric.step} to show; a true one of "
        f"{metric.show(gap.detectable)}{metric.step} would show in four of five such experiments."
    )
    if better:
        return [f"{group.name} has the best mean, but is not shown to differ from {control}.", observed, need]
    return [f"Nothing here beats {control}.", observed, need]


def _against_other_controls(comparison: Comparison, group: RunGroup, main: str) -> list[str]:
    """Compare the method with the other control."""
    sentences = []
    for control in comparison.controls:
        gap = group.versus.get(control)
        if control != main and gap is not None and gap.half is not None:
            zero = "excludes" if gap.shown else "includes"
            sentences.append(
                f"Against {display_name(control)} it is {_difference_text(comparison, gap)}, an interval that "
                f"{zero} zero."
            )
    return sentences


def _counted(comparison: Comparison, rivals: list[RunGroup]) -> list[str]:
    """Count the methods shown to be better or worse than the main control, and warn about picking the best."""
    gaps = [
        gap
        for group in rivals
        if comparison.main and (gap := group.versus.get(comparison.main)) and gap.half is not None
    ]
    if len(gaps) < 2:
        return []
    better = sum(gap.shown and (gap.mean < 0) == comparison.metric.lower for gap in gaps)
    worse = sum(gap.shown for gap in gaps) - better
    control = display_name(comparison.main or "")
    sentences = [
        f"Of {len(gaps)} methods {better or 'none'} {'are' if better > 1 else 'is'} shown to be better than {control}, "
        f"{worse or 'none'} to be worse; {len(gaps) - better - worse} not shown to differ."
    ]
    if len(gaps) > 2:
        sentences.append(
            "The best of them was picked, which biases it upward: each interval is valid for one planned comparison."
        )
    return sentences


def _open(comparison: Comparison) -> list[str]:
    begun = [
        (group, seed, reason) for group in comparison.groups for seed, reason in group.open.items() if reason != NOT_RUN
    ]
    missing = sum(reason == NOT_RUN for group in comparison.groups for reason in group.open.values())
    sentences = []
    if len(begun) > 3:
        counts = Counter(reason for _, _, reason in begun)
        sentences = [f"Unfinished runs: {', '.join(f'{count} {reason}' for reason, count in counts.items())}."]
    elif begun:
        sentences = [
            f"Unfinished: {', '.join(f'{group.name} seed {seed} ({reason})' for group, seed, reason in begun)}."
        ]
    if missing:
        sentences.append(f"Not run here: {counted(missing, 'seed')} of other methods.")
    return sentences


def state(comparison: Comparison) -> tuple[str, str]:
    """Return the state of all runs, "running", "interrupted", "failed" or "done", and a sentence on it."""
    runs = [run for group in comparison.groups for run in group.runs]
    counts = Counter("done" if run.done else run.status for run in runs)
    main = next((name for name in ("running", "failed", "interrupted") if counts[name]), "done")
    names = {"done": "finished"}
    if len(runs) == 1:
        return main, names.get(main, main).capitalize() + _progress(runs[0])
    parts = [f"{count} {names.get(name, name)}" for name, count in counts.most_common()]
    going = [f"{display_name(run.label)}, seed {run.seed}{_progress(run)}" for run in runs if run.status == "running"]
    return main, f"{len(runs)} runs: {', '.join(parts)}" + (f". Running: {_listed(going)}" if going else "")


def _progress(run: RunRecord) -> str:
    """Return how far an unfinished run is, as in ": epoch 3 of 10, step 120 of 400"; "" if it is not known."""
    if run.done or not run.steps:
        return ""
    last, settings = run.steps[-1], run.of("settings")
    totals = {"epoch": settings.get("epochs"), "step": settings.get("total_steps")}
    return ": " + ", ".join(f"{k} {last.get(k)}" + (f" of {n}" if n else "") for k, n in totals.items() if last.get(k))


def reading(comparison: Comparison) -> list[str]:
    """Return sentences on how to read the table and on its limits."""
    metric = comparison.metric
    sentences = [
        f"{_metric_text(metric.name).capitalize()} at the last epoch, mean {PM} sample standard deviation over seeds."
    ]
    gaps = [gap for group in comparison.groups for gap in group.versus.values() if gap is not None]
    if any(gap.half is not None for gap in gaps):
        sentences.append(
            f"Differences are method minus control, {'paired by seed, ' if any(g.paired for g in gaps) else ''}with "
            "the half-width of their 95 % t interval. Bold: the interval excludes zero."
        )
        sentences.append(
            f"Detectable: the true difference to {display_name(comparison.main or '')} that four of five such "
            "experiments would show, with this number of seeds and this spread."
        )
    if any(gap.half is not None and not gap.paired for gap in gaps):
        sentences.append("(u): unpaired seeds, so Welch's interval of two independent means.")
    if any(group.n == 1 for group in comparison.groups):
        sentences.append("One seed gives no spread and no interval: run more seeds before relying on such a number.")
    size = _test_size(comparison)
    if any(gap.half is not None for gap in gaps):
        sentences.append(
            "Intervals cover variation over seeds, not the choice of the test set"
            + (
                f"; one of its {size:,} examples is {metric.show(1 / size)}{metric.step}."
                if size and metric.fraction
                else "."
            )
        )
    for source, labels in _sources(comparison).items():
        sentences.append(
            f"Reported: published values for full-length training, not measured here; {_listed(labels)}: {source}."
        )
    return [*sentences, *_costs(comparison), *comparison.notes]


def _costs(comparison: Comparison) -> list[str]:
    """Say what the student of the first method that recorded it and its teacher cost; [] if no run did."""
    runs = (run for group in comparison.groups if group.same_student for run in group.counted)
    costs: list[Any] = [run.of("result").get("cost") for run in runs]
    cost: dict[str, Any] = next((found for found in costs if isinstance(found, dict)), {})
    parts = [f"{who} {_cost(cost[who])}" for who in ("student", "teacher") if isinstance(cost.get(who), dict)]
    said = [f"Cost of one sample, on the machine of the run: {'; '.join(parts)}."] if parts else []
    return [*said, *_times(cost)]


def _times(cost: dict[str, Any]) -> list[str]:
    """Say how times were measured; [] if the runs have none."""
    if not cost:
        return []
    under: dict[str, Any] = cost.get("measured") or {}
    said = ["MB are of the weights. Latency is the median of three forward passes at the end of the run"]
    said += [f"on {under['device']} with {counted(under['threads'], 'CPU thread')}"] if under.get("threads") else []
    sentences = [f"{' '.join(said)}; ms / step is the wall time of training, with the loading of data, over its steps."]
    load, cores = number(under.get("load")), number(under.get("cores"))
    if load is not None and cores is not None and load > max(1.5, cores):
        sentences.append(
            f"Other processes ran meanwhile (load {load:.1f} on {counted(cores, 'core')}), so these times are too "
            "long: repeat them on an idle machine before comparing them."
        )
    return sentences


def _cost(one: dict[str, Any]) -> str:
    units = {"parameters": (1, "parameters"), "bytes": (1e6, "MB"), "flops": (1e6, "MFLOP"), "latency_ms": (1, "ms")}
    values = {key: value for key in units if (value := number(one.get(key))) is not None}
    return ", ".join(
        f"{value:,.0f} {units[key][1]}" if key == "parameters" else f"{value / units[key][0]:.3g} {units[key][1]}"
        for key, value in values.items()
    )


def _sources(comparison: Comparison) -> dict[str, list[str]]:
    """Return source of published values -> names of the methods."""
    sources: dict[str, list[str]] = {}
    for group in comparison.groups:
        if group.reported is not None:
            sources.setdefault(group.reported[1], []).append(group.name)
    return sources


def cell(comparison: Comparison, group: RunGroup, control: str) -> tuple[str, bool]:
    """Format the difference of a method to a control, and return whether its interval excludes zero."""
    if group.label == control:
        return "control", False
    gap = group.versus.get(control)
    if gap is None:
        return "-", False
    text = comparison.metric.show(gap.mean, signed=True)
    text += " (no interval)" if gap.half is None else f" {PM} {comparison.metric.show(gap.half)}"
    if gap.half is not None and not gap.paired:
        text += " (u)"
    elif gap.paired and gap.n < group.n:
        text += f" ({counted(gap.n, 'pair')})"
    return text, gap.shown


def spread(comparison: Comparison, values: tuple[float | None, float | None]) -> str:
    """Format mean and standard deviation."""
    middle, sd = values
    text = comparison.metric.show(middle)
    return text if sd is None else f"{text} {PM} {comparison.metric.show(sd)}"


def epochs(group: RunGroup) -> str:
    """Format the range of best epochs and of last epochs over seeds, as in "16-19 of 20"."""
    best, last = (_range_text(group.epochs(which)) for which in ("best", "last"))
    return f"{best} of {last}" if best and last else last or "-"


def _range_text(values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return "" if not values else f"{low}" if low == high else f"{low}\u2013{high}"


def seeds(group: RunGroup) -> str:
    """Return how many seeds finished, and why the others did not."""
    if not group.open:
        return str(group.n)
    reasons: dict[str, list[str]] = {}
    for seed, reason in group.open.items():
        reasons.setdefault(reason, []).append(str(seed))
    parts = [f"{reason}: {', '.join(which)}" for reason, which in reasons.items()]
    return "; ".join([f"{group.n} of {group.n + len(group.open)}", *parts])


def _score_text(comparison: Comparison, group: RunGroup) -> str:
    return f"{comparison.metric.show(group.mean)}{comparison.metric.unit} {_metric_text(comparison.metric.name)}"


def _difference_text(comparison: Comparison, gap: Difference) -> str:
    metric = comparison.metric
    return f"{metric.show(gap.mean, signed=True)} {PM} {metric.show(gap.half)}{metric.step}"


def _interval_text(comparison: Comparison, gap: Difference) -> str:
    assert gap.half is not None
    low, high = (comparison.metric.show(end) for end in sorted(abs(gap.mean) + sign * gap.half for sign in (-1, 1)))
    return f"{low} to {high}{comparison.metric.step} over {_pairs_text(gap)}"


def _pairs_text(gap: Difference) -> str:
    return counted(gap.n, "seed").replace(" ", " paired " if gap.paired else " unpaired ")


def _seeds_suffix(group: RunGroup) -> str:
    return f" over {counted(group.n, 'seed')}" if group.n > 1 else " with one seed"


def _metric_text(metric: str) -> str:
    return metric.replace("/", " ")


def _listed(names: list[str], most: int = 6) -> str:
    remaining = len(names) - most
    return ", ".join(names[:most]) + (f" and {remaining} more" if remaining > 0 else "")


def _test_size(comparison: Comparison) -> int | None:
    split = comparison.metric.name.partition("/")[0]
    for group in comparison.groups:
        for run in group.runs:
            size = run.of("data").get(split)
            if isinstance(size, int) and size > 0 and math.isfinite(size):
                return size
    return None
