"""Rank methods against the best fixed temperature, which is chosen on the validation split."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tempering.reports.compare import CONTROL, Comparison, RunGroup, compare, display_name
from tempering.reports.intervals import deviation, holm, mean, pairs_needed
from tempering.reports.records import RunRecord
from tempering.reports.text import PM
from tempering.utils.text import counted

if TYPE_CHECKING:
    from rich.table import Table

CHOSEN_BY = "validation/accuracy"
LEVEL = 0.05  # of the corrected p-values


@dataclass(frozen=True)
class Leaderboard:
    """A comparison with the best fixed temperature.

    Attributes:
        comparison: of all groups; its main control is ``best``.
        best: label of the group that the others are compared with.
        fixed: label -> mean validation accuracy, of the groups that it was chosen from; empty if there were none.
        p: label -> p-value of the paired t test on the test scores, corrected by Holm for the number of methods.
    """

    comparison: Comparison
    best: str
    fixed: dict[str, float]
    p: dict[str, float]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the paired differences, pooled over methods; None without any."""
        sums = [(len(each) - 1, sd) for each in self._gaps() if (sd := deviation(each)) is not None]
        freedom = sum(n for n, _ in sums)
        return (sum(n * sd**2 for n, sd in sums) / freedom) ** 0.5 if freedom else None

    def _gaps(self) -> list[list[float]]:
        gaps = [group.versus.get(self.best) for group in self.comparison.groups if group.label in self.p]
        return [list(gap.each.values()) for gap in gaps if gap is not None]

    def pairs_needed(self, effect: float) -> int | None:
        """Return the number of seeds that show a true ``effect`` with 80 % power at ``spread``; None without one."""
        return None if self.spread is None else pairs_needed(effect, self.spread)


def leaderboard(runs: Sequence[RunRecord]) -> Leaderboard:
    """Rank the methods of these runs.

    The control is the fixed temperature with the best mean accuracy on the validation split, over the seeds that all
    fixed temperatures have: KD with a static temperature, at the weights that most of these have. The test split plays
    no part in the choice. Without runs that have such scores, it is the control of ``compare``.

    Raises:
        ValueError: as ``compare``; or if there is no control.
    """
    by_label: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.done and (weights := _fixed_weights(run)) and run.score(CHOSEN_BY) is not None:
            by_label.setdefault(run.label, []).append(run)
    weights = [_fixed_weights(members[0]) for members in by_label.values()]
    usual = max(weights, key=weights.count) if weights else None
    by_label = {label: members for label, members in by_label.items() if _fixed_weights(members[0]) == usual}
    seeds = set.intersection(*({run.seed for run in members} for members in by_label.values())) if by_label else set()
    fixed = {
        label: mean([run.score(CHOSEN_BY) or 0.0 for run in members if run.seed in seeds]) or 0.0
        for label, members in by_label.items()
        if seeds
    }
    comparison = compare(runs, max(fixed, key=lambda label: fixed[label]) if fixed else None)
    if comparison.main is None:
        raise ValueError("a leaderboard needs finished runs of a control: KD with a fixed temperature.")
    others = [group for group in comparison.groups if group.label not in (*fixed, comparison.main, CONTROL)]
    p = {
        group.label: value
        for group in others
        if (gap := group.versus.get(comparison.main)) and (value := gap.p) is not None
    }
    return Leaderboard(comparison, comparison.main, fixed, holm(p))


def _fixed_weights(run: RunRecord) -> tuple[Any, ...] | None:
    """Return the weights and the warm-up of KD with a static temperature; None for another method."""
    method = run.of("method")
    temperature = method.get("temperature")
    if method.get("name") != "KD" or not isinstance(temperature, dict) or temperature.get("name") != "Static":
        return None
    return tuple(method.get(name) for name in ("soft", "hard", "warmup"))


def cells(board: Leaderboard, own: Collection[str] = ()) -> list[dict[str, str]]:
    """Return the rows of the table, best mean first: heading -> text. ``own`` are labels to mark."""
    metric, unit = board.comparison.metric, " (%)" if board.comparison.metric.fraction else ""
    rows = []
    for place, group in enumerate(board.comparison.ranked, 1):
        row = {"": str(place), "method": group.name + (" (yours)" if group.label in own else ""), "seeds": str(group.n)}
        row[f"{metric.name.replace('/', ' ')}{unit}"] = metric.show(group.mean) + _plus_minus(metric.show(group.sd))
        rows.append(row | _against(board, group))
    return rows


def _against(board: Leaderboard, group: RunGroup) -> dict[str, str]:
    metric, gap = board.comparison.metric, group.versus.get(board.best)
    heads = (f"vs {display_name(board.best)}", "p (Holm)", "verdict")
    if group.label == board.best:
        return dict(zip(heads, ("control", "", ""), strict=True))
    if gap is None:
        return dict(zip(heads, ("-", "", "no pairs"), strict=True))
    p = board.p.get(group.label)
    better = (gap.mean < 0) == metric.lower
    verdict = "not compared" if p is None else "not decided" if p > LEVEL else "better" if better else "worse"
    shown = metric.show(gap.mean, signed=True) + _plus_minus(metric.show(gap.half))
    return dict(zip(heads, (shown, "" if p is None else f"{p:.2g}", verdict), strict=True))


def _plus_minus(text: str) -> str:
    return "" if text == "-" else f" {PM} {text}"


def reading(board: Leaderboard) -> list[str]:
    """Return sentences on how the table is made."""
    metric = board.comparison.metric
    chosen = ", ".join(f"{display_name(name)} {metric.show(value)}" for name, value in board.fixed.items())
    lines = (
        [f"The control, {display_name(board.best)}, was chosen on the validation split: {chosen}."] if chosen else []
    )
    lines += [
        "Scores are those after the last epoch, mean and standard deviation over seeds; differences are paired by "
        "seed, with the half-width of their 95 % interval.",
        f"p is that of the paired t test, corrected by Holm for {counted(len(board.p), 'method')}; above {LEVEL} "
        "nothing is decided.",
    ]
    return lines + list(board.comparison.notes)


def rich_table(board: Leaderboard, own: Collection[str] = ()) -> Table:
    """Return the table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = cells(board, own)
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for head in rows[0]:
        table.add_column(Text(head), justify="left" if head in ("method", "verdict") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text, style="bold" if "(yours)" in row["method"] else "") for text in row.values()))
    return table
