"""A comparison in plain words. Every sentence follows from its numbers."""

from __future__ import annotations

import math
from collections import Counter

from tempering.reports.compare import NOT_RUN, Arm, Comparison
from tempering.reports.intervals import Difference

PM = "\u00b1"


def headline(found: Comparison) -> list[str]:
    """What the numbers say, the main thing first, a sentence each."""
    best = next(iter(found.ranked), None)
    if best is None:
        return ["No run has finished, so there is nothing to compare yet.", *_open(found)]
    rivals = [arm for arm in found.ranked if arm.label not in found.controls]
    return [*_first(found, best, rivals), *_counted(found, rivals), *_open(found)]


def _first(found: Comparison, best: Arm, rivals: list[Arm]) -> list[str]:
    """The best arm that is no control against the one that decides, then against the other."""
    main, score = found.main, _score(found, best)
    if not found.controls:
        if len(found.ranked) == 1:
            return [f"{best.label} reaches {score}{_over(best)}.", "There is no other arm to compare it with."]
        return [
            f"{best.label} has the highest mean, {score}.".replace(
                "highest", "lowest" if found.metric.lower else "highest"
            ),
            "No arm is named as the control: no difference is taken.",
        ]
    if main is None or found.arm(main).mean is None:
        return [
            f"{best.label} leads with {score}.",
            f"{main or found.controls[0]}, the control, has no finished run yet.",
        ]
    if not rivals:  # two controls, or one alone
        rivals = [arm for arm in found.ranked if arm.label in found.controls[1:]]
        main = found.controls[0]
    gap = rivals[0].versus.get(main) if rivals else None
    if gap is None:
        return [f"{best.label} reaches {score}{_over(best)}.", "No other arm has finished."]
    return [*_verdict(found, rivals[0], main, gap), *_beside(found, rivals[0], main)]


def _verdict(found: Comparison, arm: Arm, control: str, gap: Difference) -> list[str]:
    """The best arm that is not the control, against the control."""
    metric = found.metric
    better = gap.mean != 0 and (gap.mean < 0) == metric.lower
    by = f"{metric.show(abs(gap.mean))}{metric.step}"
    if gap.half is None:
        how = f"is {by} {'better' if better else 'worse'} than" if abs(gap.mean) > 1e-12 else "does as well as"
        why = "Without a second seed there is no interval, so this may be chance."
        if gap.n > 1:
            why = "The seeds do not differ in it, so there is no interval; with so few of them this may be chance."
        over = "on one seed" if gap.n == 1 else f"over {_pairs(gap)}"
        return [f"{arm.label} {how} {control}, {over}.", f"It reaches {_score(found, arm)}. {why}"]
    if gap.shown and better:
        return [
            f"{arm.label} beats {control} by {by}.",
            f"It reaches {_score(found, arm)}; the 95 % interval of the gain, {_interval(found, gap)}, excludes zero.",
        ]
    if gap.shown:
        return [
            f"Nothing here beats {control}.",
            f"The closest, {arm.label}, is worse by {by}; the 95 % interval, {_interval(found, gap)}, excludes zero.",
        ]
    seen = f"{arm.label} against {control}: {_figure(found, gap)} over {_pairs(gap)}, an interval that holds zero."
    need = (
        f"A difference had to reach {metric.show(gap.half)}{metric.step} to show; a true one of "
        f"{metric.show(gap.detectable)}{metric.step} would show in four of five such experiments."
    )
    if better:
        return [f"{arm.label} has the best mean, but these seeds cannot tell it from {control}.", seen, need]
    return [f"Nothing here beats {control}.", seen, need]


def _beside(found: Comparison, arm: Arm, main: str) -> list[str]:
    """The same arm against the other control."""
    said = []
    for control in found.controls:
        gap = arm.versus.get(control)
        if control != main and gap is not None and gap.half is not None:
            zero = "excludes" if gap.shown else "holds"
            said.append(f"Against {control} it is {_figure(found, gap)}, an interval that {zero} zero.")
    return said


def _counted(found: Comparison, rivals: list[Arm]) -> list[str]:
    """How many arms are shown to be better or worse than the main control, and that the best was picked."""
    gaps = [gap for arm in rivals if found.main and (gap := arm.versus.get(found.main)) and gap.half is not None]
    if len(gaps) < 2:
        return []
    better = sum(gap.shown and (gap.mean < 0) == found.metric.lower for gap in gaps)
    worse = sum(gap.shown for gap in gaps) - better
    said = [
        f"Of {len(gaps)} arms {better or 'none'} {'are' if better > 1 else 'is'} shown to be better than {found.main}, "
    ]
    said[0] += f"{worse or 'none'} to be worse; {len(gaps) - better - worse} cannot be told from it."
    if len(gaps) > 2:
        said.append(
            "The best of them was picked, which flatters it: each interval is for one comparison planned ahead."
        )
    return said


def _open(found: Comparison) -> list[str]:
    begun = [(arm, seed, why) for arm in found.arms for seed, why in arm.open.items() if why != NOT_RUN]
    missing = sum(why == NOT_RUN for arm in found.arms for why in arm.open.values())
    said = []
    if len(begun) > 3:
        counts = Counter(why for _, _, why in begun)
        said = [f"Runs still open: {', '.join(f'{count} {why}' for why, count in counts.items())}."]
    elif begun:
        said = [f"Still open: {', '.join(f'{arm.label} seed {seed} ({why})' for arm, seed, why in begun)}."]
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
            "half-width of their 95 % t interval. Bold: the interval excludes zero."
        )
        said.append(
            f"Detectable: the true difference to {found.main} that four of five such experiments would show, with this "
            "many seeds and this spread between them."
        )
    if any(gap.half is not None and not gap.paired for gap in gaps):
        said.append("(u): the seeds do not pair, so it is Welch's interval of two independent means.")
    if any(arm.n == 1 for arm in found.arms):
        said.append("One seed gives no spread and no interval: run more seeds before believing such a number.")
    size = _test_size(found)
    if any(gap.half is not None for gap in gaps):
        said.append(
            "Intervals cover what changes with the seed, not the choice of the test set"
            + (
                f"; one of its {size:,} examples is {metric.show(1 / size)}{metric.step}."
                if size and metric.fraction
                else "."
            )
        )
    for source, labels in _sources(found).items():
        said.append(
            f"Reported: not measured here but published, for full-length training; {_listed(labels)}: {source}."
        )
    return [*said, *found.notes]


def _sources(found: Comparison) -> dict[str, list[str]]:
    """Where published numbers are from, and of which arms."""
    sources: dict[str, list[str]] = {}
    for arm in found.arms:
        if arm.reported is not None:
            sources.setdefault(arm.reported[1], []).append(arm.label)
    return sources


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


def epochs(arm: Arm) -> str:
    """The best epoch of the seeds and the last, as in "16-19 of 20"; they need not be one."""
    best, last = (_range(arm.epochs(which)) for which in ("best", "last"))
    return f"{best} of {last}" if best and last else last or "-"


def _range(values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return "" if not values else f"{low}" if low == high else f"{low}\u2013{high}"


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


def _figure(found: Comparison, gap: Difference) -> str:
    return f"{found.metric.show(gap.mean, signed=True)} {PM} {found.metric.show(gap.half)}{found.metric.step}"


def _interval(found: Comparison, gap: Difference) -> str:
    assert gap.half is not None
    low, high = (found.metric.show(end) for end in sorted(abs(gap.mean) + sign * gap.half for sign in (-1, 1)))
    return f"{low} to {high}{found.metric.step} over {_pairs(gap)}"


def _pairs(gap: Difference) -> str:
    return _seeds(gap.n).replace(" ", " paired " if gap.paired else " unpaired ")


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
