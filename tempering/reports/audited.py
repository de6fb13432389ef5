"""What audits found of the runs, as tables: numbers, intervals, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports.compare import Comparison
from tempering.reports.figures import styles
from tempering.reports.read import number

TITLES = {
    "calibration": "Calibration",
    "explanation": "Explanation: what came over from the teacher",
    "robustness": "Robustness",
    "privacy": "Privacy",
}


@dataclass(frozen=True)
class Said:
    """One finding as a reader sees it."""

    of: str
    name: str
    value: str
    interval: str
    n: str
    meaning: str


@dataclass(frozen=True)
class Audited:
    """The findings on one run, audit by audit."""

    label: str
    css: str
    seed: int
    parts: Sequence[tuple[str, Sequence[Said]]]


def audits(found: Comparison) -> list[Audited]:
    """Every run that was audited, in the order of the arms."""
    css, out = styles(found), []
    for arm in found.arms:
        for run in arm.runs:
            there = (run.audits or {}).get("audits") or {}
            parts = [(title, [said(f) for f in there[k]["findings"]]) for k, title in TITLES.items() if there.get(k)]
            if parts:
                out.append(Audited(arm.label, css[arm.label], run.seed, parts))
    return out


def said(finding: Mapping[str, Any]) -> Said:
    """A finding with its numbers written out: shares in percent, others with four digits."""
    scale, unit = (100.0, " %") if finding.get("share") else (1.0, "")

    def text(key: str) -> str | None:
        value = number(finding.get(key))
        if value is None:
            return None
        return f"{scale * value:.1f}" if unit else f"{value:.4g}"

    value, low, high = map(text, ("value", "low", "high"))
    return Said(
        str(finding["of"]),
        str(finding["name"]).replace("_", " "),
        "-" if value is None else value + unit,
        "" if low is None or high is None or value is None else f"{low} to {high}{unit}",
        str(finding.get("n") or ""),
        str(finding["meaning"]),
    )
