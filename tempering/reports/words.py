"""A comparison in plain words. Every sentence follows from its numbers."""

from __future__ import annotations

import math

from tempering.reports.compare import Arm, Comparison, Difference

PM = "\u00b1"


def headline(found: Comparison) -> list[str]:
    """What the numbers say, the main thing first, a sentence each."""
    best = next(iter(found.ranked), None)
    if best is None:
        return ["No run has finished, so there is nothing to compare yet."]
    said = [_first(found, best), *_second(found, best), *_third(found, best)]
    return [sentence for sentence in said if sentence]


def _first(found: Comparison, best: Arm) -> str:
    metric, control = found.metric, next(iter(found.controls), None)
    score = f"{metric.show(best.mean)}{metric.unit} {_spoken(metric.name)}"
    others = [arm for arm in found.ranked if arm.label != control]
    if control is None:
        if len(found.ranked) == 1:
            return f"{best.label} reaches {score}{_over(best)}; there is no other arm to compare it with."
        return f"{best.label} has the highest mean, {score}, but no arm is named as the control, so no difference is taken."
    if found.arm(control).mean is None:
        return f"{best.label} leads with {score}, but {control}, the control, has no finished run yet."
    if not others:
        return f"{control} reaches {score}{_over(best)}; no other arm has finished."
    gap = others[0].versus.get(control)
    if gap is None:
        return f"{best.label} leads with {score}."
    return _verdict(found, others[0], control, gap)


def _verdict(found: Comparison, arm: Arm, control: str, gap: Difference) -> str:
    metric = found.metric
    better = (gap.mean < 0) == metric.lower and gap.mean != 0
    by = f"{metric.show(abs(gap.mean))}{metric.step}"
    score = f"{metric.show(arm.mean)}{metric.unit} {_spoken(metric.name)}"
    if gap.half is None:
        side = "above" if gap.mean > 0 else "below"
        return (
            f"{arm.label} is best of the rest at {score}, {by} {side} {control}; with so few seeds there is no "
            "interval, so this may be chance."
        )
    if gap.shown and better:
        return f"{arm.label} beats {control} by {by} ({_interval(found, gap)}), reaching {score}."
    if gap.shown:
        return f"Nothing beats {control}: the closest, {arm.label}, is worse by {by} ({_interval(found, gap)})."
    lead = f"{arm.label} has the best mean, {score}, but" if better else f"Nothing beats {control}:"
    return (
        f"{lead} {_seeds(gap.n)} cannot tell {'it' if better else arm.label} from {control}: {metric.show(gap.mean, signed=True)} "
        f"{PM} {metric.show(gap.half)}{metric.step}, an interval that holds zero."
    )


def _second(found: Comparison, best: Arm) -> list[str]:
    """The best arm beside the second control: is it the method, or its weights?"""
    if len(found.controls) < 2 or best.label in found.controls:
        return []
    matched, metric = found.controls[1], found.metric
    gap = best.versus.get(matched)
    if gap is None or gap.half is None:
        return []
    figure = f"{metric.show(gap.mean, signed=True)} {PM} {metric.show(gap.half)}{metric.step}"
    if gap.shown:
        return [f"Beside {matched} it is {figure}, an interval that excludes zero."]
    return [f"Beside {matched} it is {figure}: these seeds do not show that the gain is more than the weights."]


def _third(found: Comparison, best: Arm) -> list[str]:
    said = []
    rest = [arm for arm in found.ranked if arm.label not in found.controls[:1]]
    if len(rest) > 2 and found.controls and best is rest[0]:
        said.append(
            f"It is the best of {len(rest)} arms, which flatters it: each interval is for one comparison planned ahead."
        )
    open_runs = [f"{arm.label} seed {seed} ({why})" for arm in found.arms for seed, why in arm.open.items()]
    if open_runs:
        said.append(f"Still open: {_listed(open_runs)}.")
    return said


def reading(found: Comparison) -> list[str]:
    """How to read the table and what not to read into it, in sentences."""
    metric = found.metric
    said = [f"{_spoken(metric.name).capitalize()} at the last epoch, mean {PM} sample standard deviation over seeds."]
    gaps = [gap for arm in found.arms for gap in arm.versus.values() if gap is not None]
    if any(gap.half is not None for gap in gaps):
        said.append(
            f"Differences are arm minus control, {'paired by seed, ' if any(g.paired for g in gaps) else ''}with the "
            f"half-width of their 95 % t interval: the smallest difference these seeds could have shown. "
            "Bold: the interval excludes zero."
        )
    if any(gap.half is not None and not gap.paired for gap in gaps):
        said.append("(u): the seeds do not pair, so it is Welch's interval of two independent means.")
    if any(gap.half is None for gap in gaps) or any(arm.n == 1 for arm in found.arms):
        said.append("One seed gives no spread and no interval: run more seeds before believing such a number.")
    size = _test_size(found)
    said.append(
        "Intervals cover what changes with the seed, not the choice of the test set"
        + (f"; one of its {size} examples is {metric.show(1 / size)}{metric.step}." if size and metric.fraction else ".")
    )
    return [*said, *found.notes]


def cell(found: Comparison, arm: Arm, control: str) -> tuple[str, bool]:
    """The difference of an arm to a control as a table shows it, and whether its interval excludes zero."""
    if arm.label == control:
        return "control", False
    gap = arm.versus.get(control)
    if gap is None:
        return "-", False
    text = found.metric.show(gap.mean, signed=True)
    text += " (no interval)" if gap.half is None else f" {PM} {found.metric.show(gap.half)}"
    if gap.half is not None and not gap.paired:
        text += " (u)"
    elif gap.paired and gap.n < arm.n:
        text += f" ({gap.n} pairs)"
    return text, gap.shown


def spread(found: Comparison, values: tuple[float | None, float | None]) -> str:
    """Mean and standard deviation as a table shows them."""
    middle, sd = values
    text = found.metric.show(middle)
    return text if sd is None else f"{text} {PM} {found.metric.show(sd)}"


def seeds(arm: Arm) -> str:
    """How many seeds finished, and which are open."""
    if not arm.open:
        return str(arm.n)
    return f"{arm.n} of {arm.n + len(arm.open)}; open: {', '.join(f'{s} ({why})' for s, why in arm.open.items())}"


def _interval(found: Comparison, gap: Difference) -> str:
    assert gap.half is not None
    ends = sorted(abs(gap.mean) + sign * gap.half for sign in (-1, 1))
    low, high = (found.metric.show(end) for end in ends)
    return f"95 % interval {low} to {high}, {_seeds(gap.n)}{', paired' if gap.paired else ', not paired'}"


def _over(arm: Arm) -> str:
    return f" over {_seeds(arm.n)}" if arm.n > 1 else " with one seed"


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _spoken(metric: str) -> str:
    return metric.replace("/", " ")


def _listed(names: list[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _test_size(found: Comparison) -> int | None:
    split = found.metric.name.partition("/")[0]
    for arm in found.arms:
        for run in arm.runs:
            size = run.of("data").get(split)
            if isinstance(size, int) and size > 0 and math.isfinite(size):
                return size
    return None
