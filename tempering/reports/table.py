"""The comparison as a table: markdown for a page in git, rich for a terminal. The HTML page has its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tempering.reports import words
from tempering.reports.compare import Arm, Comparison, Difference, compare, deviation, mean

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Arm", "Comparison", "Difference", "cells", "columns", "compare", "markdown", "rich_table"]


def columns(found: Comparison) -> list[str]:
    """The table's headings."""
    metric = found.metric
    unit = " (%)" if metric.fraction else ""
    step = " (points)" if metric.fraction else ""
    return [
        "arm",
        "seeds",
        f"{metric.name.replace('/', ' ')}, last{unit}",
        f"best{unit}",
        *(f"vs {control}{step}" for control in found.controls),
        "ms / step",
        "peak MB",
    ]


def cells(found: Comparison, arm: Arm) -> list[tuple[str, bool]]:
    """A row of the table: each cell's text, and whether it is to stand out."""
    best = list(arm.best.values())
    step_ms, peak = arm.result("step_ms"), arm.result("peak_mb")
    return [
        (arm.label, False),
        (words.seeds(arm), False),
        (words.spread(found, (arm.mean, arm.sd)), False),
        (words.spread(found, (mean(best), deviation(best))), False),
        *(words.cell(found, arm, control) for control in found.controls),
        ("-" if step_ms is None else f"{step_ms:.1f}", False),
        ("-" if peak is None else f"{peak:.0f}", False),
    ]


def markdown(found: Comparison) -> str:
    """The headline, the table and how to read it, as GitHub's markdown, ending in a newline."""
    rows = [
        [f"**{_plain(text)}**" if strong else _plain(text) for text, strong in cells(found, arm)] for arm in found.arms
    ]
    heads = [_plain(head) for head in columns(found)]
    lines = [" ".join(_plain(sentence) for sentence in words.headline(found)), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', '---', *['---:'] * (len(heads) - 2)])}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {_plain(sentence)}" for sentence in words.reading(found))]
    return "\n".join(lines) + "\n"


def rich_table(found: Comparison) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None, header_style="bold", caption=words.headline(found)[0], caption_justify="left")
    for i, head in enumerate(columns(found)):
        table.add_column(Text(head), justify="left" if i < 2 else "right", overflow="fold")
    for arm in found.arms:
        table.add_row(*(Text(text, style="bold" if strong else "") for text, strong in cells(found, arm)))
    return table


def _plain(text: str) -> str:
    """``text`` that markdown and the HTML in it leave alone."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
