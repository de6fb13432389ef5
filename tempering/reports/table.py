"""The comparison as a table: markdown for a page in git, rich for a terminal. The HTML page shows the same cells."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from tempering.reports import text as words
from tempering.reports.compare import Arm, Comparison, Metric, compare
from tempering.reports.intervals import deviation, mean

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cells", "compare", "markdown", "rich_table"]

# headings that begin so are left to the page: 80 columns are few
WIDE = ("best", "reported", "detectable", "train", "peak")


def cells(found: Comparison, arm: Arm) -> dict[str, tuple[str, bool]]:
    """A row of the table: heading -> the cell's text, and whether it is to stand out. All arms have the same headings.

    A published number has a column where some arm's record carries one.
    """
    metric, best = found.metric, list(arm.best.values())
    unit, step = (" (%)", " (points)") if metric.fraction else ("", "")
    step_ms, peak, seconds = arm.result("step_ms"), arm.result("peak_mb"), arm.result("seconds")
    row = {
        "arm": (arm.label, False),
        "seeds": (words.seeds(arm), False),
        f"{metric.name.replace('/', ' ')}, last{unit}": (words.spread(found, (arm.mean, arm.sd)), False),
        f"best{unit}": (words.spread(found, (mean(best), deviation(best))), False),
        "best epoch": (words.epochs(arm), False),
    }
    if any(other.reported for other in found.arms):
        row[f"reported{unit}"] = (metric.show(arm.reported and arm.reported[0]), False)
    row |= {_head(other): (_spread(other, arm.scores(other)), False) for other in found.columns}
    row |= {f"vs {control}{step}": words.cell(found, arm, control) for control in found.controls}
    if found.main is not None:
        gap = arm.versus.get(found.main)
        row[f"detectable{step}"] = (metric.show(gap and gap.detectable), False)
    row["train min"] = ("-" if seconds is None else f"{seconds / 60:.3g}", False)
    row["ms / step"] = ("-" if step_ms is None else f"{step_ms:.1f}", False)
    row["peak MB"] = ("-" if peak is None else f"{peak:.0f}", False)
    return row


def markdown(found: Comparison) -> str:
    """The headline, the table and how to read it, as GitHub's markdown, ending in a newline."""
    rows = [
        [f"**{_plain(text)}**" if strong else _plain(text) for text, strong in cells(found, arm).values()]
        for arm in found.arms
    ]
    heads = [_plain(head) for head in cells(found, found.arms[0])]
    lines = [" ".join(_plain(sentence) for sentence in words.headline(found)), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', '---', *['---:'] * (len(heads) - 2)])}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {_plain(sentence)}" for sentence in words.reading(found))]
    return "\n".join(lines) + "\n"


def rich_table(found: Comparison) -> Table:
    """The table for a terminal, without the columns that would make it too wide for one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    said = Text(" ".join(words.headline(found)[:2]))
    table = Table(box=SIMPLE_HEAD, header_style="bold", caption=said, caption_justify="left", padding=(0, 1, 0, 0))
    wide = (*WIDE, *map(_head, found.columns))
    for i, head in enumerate(head for head in cells(found, found.arms[0]) if not head.startswith(wide)):
        lines = textwrap.wrap(head, 12, break_long_words=False)
        table.add_column(Text("\n".join(lines)), justify="left" if i < 2 else "right", overflow="fold", no_wrap=i > 1)
    for arm in found.arms:
        row = [cell for head, cell in cells(found, arm).items() if not head.startswith(wide)]
        table.add_row(*(Text(text, style="bold" if strong else "") for text, strong in row))
    return table


def _head(metric: Metric) -> str:
    return metric.name.replace("/", " ").replace("_", " ") + (" (%)" if metric.fraction else "")


def _spread(metric: Metric, values: list[float]) -> str:
    """Mean and standard deviation of another metric, as its column shows them."""
    text, sd = metric.show(mean(values)), deviation(values)
    return text if sd is None else f"{text} {words.PM} {metric.show(sd)}"


def _plain(text: str) -> str:
    """``text`` that markdown and the HTML in it leave alone."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
