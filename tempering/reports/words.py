"""A comparison in plain words. Every sentence follows from its numbers."""

from __future__ import annotations

import math

from tempering.reports.compare import NOT_RUN, Arm, Comparison, Difference

PM = "\u00b1"


def headline(found: Comparison) -> list[str]:
    """What the numbers say, the main thing first, a sentence each."""
    best = next(iter(found.ranked), None)
    if best is None:
        return ["No run has finished, so there is nothing to compare yet.", *_open(found)]
    return [*_first(found, best), *_second(found, best), *_flattery(found, best), *_open(found)]


def _first(found: Comparison, best: Arm) -> list[str]:
    control = next(iter(found.controls), None)
    score = _score(found, best)
    if control is None:
        if len(found.ranked) == 1:
            return [f"{best.label} reaches {score}{_over(best)}.", "There is no other arm to compare it with."]
        return [
            f"{best.label} has the highest mean, {score}.",
            "No arm is named as the control: no difference is taken.",
        ]
    if found.arm(control).mean is None:
        return [f"{best.label} leads with {score}.", f"{control}, the control, has no finished run yet."]
    other = next((arm for arm in found.ranked if arm.label != control), None)
    gap = None if other is None else other.versus.get(control)
    if other is None or gap is None:
        return [f"{control} reaches {score}{_over(best)}.", "No other arm has finished."]
    return _verdict(found, other, control, gap)


def _verdict(found: Comparison, arm: Arm, control: str, gap: Difference) -> list[str]:
    """The best arm that is not the control, against the control."""
    metric = found.metric
    better = gap.mean != 0 and (gap.mean < 0) == metric.lower
    by = f"{metric.show(abs(gap.mean))}{metric.step}"
    figure = f"{metric.show(gap.mean, signed=True)} {PM} {metric.show(gap.half)}{metric.step}"
    if gap.half is None:
        side = "better" if better else "worse"
        return [
            f"{arm.label} is {by} {side} than {control}, on one seed.",
            f"It reaches {_score(found, arm)}. Without a second seed there is no interval, so this may be chance.",
        ]
    if gap.shown and better:
        return [
            f"{arm.label} beats {control} by {by}.",
            f"It reaches {_score(found, arm)}; the 95 % interval of the gain, {_interval(found, gap)}, excludes zero.",
        ]
    if gap.shown:
        return [
            f"Nothing beats {control}.",
            f"The closest, {arm.label}, is worse by {by}; the 95 % interval, {_interval(found, gap)}, excludes zero.",
        ]
    seen = f"{arm.label} against {control}: {figure} over {_seeds(gap.n)}, an interval that holds zero."
    need = f"A difference had to reach {metric.show(gap.half)}{metric.step} to show."
    if better:
        return [f"{arm.label} has the best mean, but these seeds cannot tell it from {control}.", f"{seen} {need}"]
    return [f"Nothing here beats {control}.", f"{seen} {need}"]


def _second(found: Comparison, best: Arm) -> list[str]:
    """The best arm against the second control: is it the method, or its weights?"""
    if len(found.controls) < 2 or best.label in found.controls:
        return []
    matched, metric = found.controls[1], found.metric
    gap = best.versus.get(matched)
    if gap is None or gap.half is None:
        return []
    figure = f"{metric.show(gap.mean, signed=True)} {PM} {metric.show(gap.half)}{metric.step}"
    if gap.shown:
        return [f"Against {matched} it is {figure}, an interval that excludes zero."]
    return [f"Against {matched} it is {figure}: these seeds do not show that the gain is more than the weights."]


def _flattery(found: Comparison, best: Arm) -> list[str]:
    rest = [arm for arm in found.ranked if arm.label not in found.controls[:1]]
    if len(rest) < 3 or not found.controls or best is not rest[0] or best.n < 2:
        return []
    return [f"Being picked as the best of {len(rest)} flatters it: each interval is for one comparison planned ahead."]


def _open(found: Comparison) -> list[str]:
    begun = [(arm, seed, why) for arm in found.arms for seed, why in arm.open.items() if why != NOT_RUN]
    missing = sum(why == NOT_RUN for arm in found.arms for why in arm.open.values())
    said = (
        [f"Still open: {_listed([f'{arm.label} seed {seed} ({why})' for arm, seed, why in begun])}."] if begun else []
    )
    if missing:
        said.append(f"{_seeds(missing)} of other arms {'was' if missing == 1 else 'were'} not run here.")
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
    if any(gap.half is not None for gap in gaps):
        said.append(
            "Intervals cover what changes with the seed, not the choice of the test set"
            + (
                f"; one of its {size} examples is {metric.show(1 / size)}{metric.step}."
                if size and metric.fraction
                else "."
            )
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
    """How many seeds finished, and why the others did not."""
    if not arm.open:
        return str(arm.n)
    reasons: dict[str, list[str]] = {}
    for seed, why in arm.open.items():
        reasons.setdefault(why, []).append(str(seed))
    said = [f"{why}: {', '.join(which)}" for why, which in reasons.items()]
    return "; ".join([f"{arm.n} of {arm.n + len(arm.open)}", *said])


def _score(found: Comparison, arm: Arm) -> str:
    return f"{found.metric.show(arm.mean)}{found.metric.unit} {_spoken(found.metric.name)}"


def _interval(found: Comparison, gap: Difference) -> str:
    assert gap.half is not None
    low, high = (found.metric.show(end) for end in sorted(abs(gap.mean) + sign * gap.half for sign in (-1, 1)))
    return f"{low} to {high}{found.metric.step} over {_seeds(gap.n)} {'paired' if gap.paired else 'not paired'}"


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
