"""Render a comparison as a table: markdown, or rich for a terminal. The HTML page shows the same cells."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from tempering.reports import text as words
from tempering.reports.compare import Comparison, Metric, RunGroup, compare, display_name
from tempering.reports.intervals import deviation, mean

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cells", "compare", "markdown", "rich_table"]

# columns with these prefixes are left out of the terminal table, which has 80 columns
WIDE = ("best", "reported", "detectable", "train", "peak")


def cells(comparison: Comparison, group: RunGroup) -> dict[str, tuple[str, bool]]:
    """Return a row of the table: heading -> (text, whether it is bold). All methods have the same headings.

    There is a column of published values if some method has one.
    """
    metric, best = comparison.metric, list(group.best.values())
    unit, step = (" (%)", " (points)") if metric.fraction else ("", "")
    step_ms, peak, seconds = group.result("step_ms"), group.result("peak_mb"), group.result("seconds")
    row = {
        "method": (group.name, False),
        "seeds": (words.seeds(group), False),
        f"{metric.name.replace('/', ' ')}, last{unit}": (words.spread(comparison, (group.mean, group.sd)), False),
        f"best{unit}": (words.spread(comparison, (mean(best), deviation(best))), False),
        "best epoch": (words.epochs(group), False),
    }
    averaged = Metric(metric.name.replace("/", "_ema/"))
    if any(other.scores(averaged) for other in comparison.groups):
        row[f"EMA{unit}"] = (_spread(metric, group.scores(averaged)), False)
    if any(other.reported for other in comparison.groups):
        row[f"reported{unit}"] = (metric.show(group.reported and group.reported[0]), False)
    row |= {_head(other): (_spread(other, group.scores(other)), False) for other in comparison.columns}
    row |= {
        f"vs {display_name(control)}{step}": words.cell(comparison, group, control) for control in comparison.controls
    }
    if comparison.main is not None:
        gap = group.versus.get(comparison.main)
        row[f"detectable{step}"] = (metric.show(gap and gap.detectable), False)
    row["train min"] = ("-" if seconds is None else f"{seconds / 60:.3g}", False)
    row["ms / step"] = ("-" if step_ms is None else f"{step_ms:.1f}", False)
    row["peak MB"] = ("-" if peak is None else f"{peak:.0f}", False)
    return row


def markdown(comparison: Comparison) -> str:
    """Return the headline, the table and notes on reading it, as GitHub markdown, ending in a newline."""
    rows = [
        [f"**{_plain(text)}**" if strong else _plain(text) for text, strong in cells(comparison, group).values()]
        for group in comparison.groups
    ]
    heads = [_plain(head) for head in cells(comparison, comparison.groups[0])]
    lines = [" ".join(_plain(sentence) for sentence in words.headline(comparison)), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', '---', *['---:'] * (len(heads) - 2)])}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {_plain(sentence)}" for sentence in words.reading(comparison))]
    return "\n".join(lines) + "\n"


def rich_table(comparison: Comparison) -> Table:
    """Return the table for a terminal, without the columns that would make it too wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    caption = Text(" ".join(words.headline(comparison)[:2]))
    table = Table(box=SIMPLE_HEAD, header_style="bold", caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    wide = (*WIDE, *map(_head, comparison.columns))
    for i, head in enumerate(head for head in cells(comparison, comparison.groups[0]) if not head.startswith(wide)):
        lines = textwrap.wrap(head, 12, break_long_words=False)
        table.add_column(Text("\n".join(lines)), justify="left" if i < 2 else "right", overflow="fold", no_wrap=i > 1)
    for group in comparison.groups:
        row = [cell for head, cell in cells(comparison, group).items() if not head.startswith(wide)]
        table.add_row(*(Text(text, style="bold" if strong else "") for text, strong in row))
    return table


def _head(metric: Metric) -> str:
    return metric.name.replace("/", " ").replace("_", " ") + (" (%)" if metric.fraction else "")


def _spread(metric: Metric, values: list[float]) -> str:
    """Format mean and standard deviation of another metric."""
    text, sd = metric.show(mean(values)), deviation(values)
    return text if sd is None else f"{text} {words.PM} {metric.show(sd)}"


def _plain(text: str) -> str:
    """Escape ``text`` for markdown and HTML."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
