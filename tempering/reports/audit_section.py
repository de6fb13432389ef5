"""Findings of audits as tables: values, intervals and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import audit_figures
from tempering.reports.compare import Comparison
from tempering.reports.figures import Figure, styles
from tempering.reports.records import number
from tempering.reports.trees import is_complete, tree_figure

TITLES = {
    "calibration": "Calibration",
    "explanation": "Explanation: similarity to the teacher",
    "robustness": "Robustness",
    "privacy": "Privacy",
}


@dataclass(frozen=True)
class FindingText:
    """One finding, formatted for the page."""

    of: str
    name: str
    value: str
    interval: str
    n: str
    meaning: str


@dataclass(frozen=True)
class Audited:
    """Findings on one run, grouped by audit."""

    label: str
    css: str
    seed: int
    parts: Sequence[tuple[str, Sequence[FindingText]]]
    figures: Sequence[Figure] = ()


def audits(comparison: Comparison) -> list[Audited]:
    """Return every audited run, in the order of the comparison."""
    css, out = styles(comparison), []
    for group in comparison.groups:
        for run in group.runs:
            content = (run.audits or {}).get("audits") or {}
            parts = [
                (title, [finding_text(f) for f in content[k]["findings"]])
                for k, title in TITLES.items()
                if content.get(k)
            ]
            if parts:
                color = css[group.label]
                out.append(Audited(group.name, color, run.seed, parts, _figures(content, color, len(out))))
    return out


def _figures(content: Mapping[str, Any], css: str, number: int) -> list[Figure]:
    """Return the figures of a run's audits."""
    report_data = {kind: (content.get(kind) or {}).get("drawn") or {} for kind in TITLES}
    return [
        *audit_figures.reliability(report_data["calibration"], css, f"reliability-{number}"),
        *audit_figures.temperatures(report_data["explanation"], css, f"hardness-{number}"),
        *_tree(report_data["explanation"], css, f"tree-{number}"),
    ]


def _tree(report_data: Mapping[str, Any], css: str, key: str) -> list[Figure]:
    """Return the concept tree, if the student has one."""
    tree = report_data.get("tree") or ()
    if not is_complete(tree):
        return []
    caption = (
        "Each class is connected to its strongest expert, and so on back to the image; the opacity of a line is the "
        "attention weight. Experts on no path are left out."
    )
    svg = tree_figure(key, tree, report_data.get("class_names") or (), css=css)
    return [Figure("KDExplainer's concept tree", svg, caption)]


def finding_text(finding: Mapping[str, Any]) -> FindingText:
    """Format a finding: fractions in percent, other values with four significant digits."""
    scale, unit = (100.0, " %") if finding.get("share") else (1.0, "")

    def text(key: str) -> str | None:
        value = number(finding.get(key))
        if value is None:
            return None
        return f"{scale * value:.1f}" if unit else f"{value:.4g}"

    value, low, high = map(text, ("value", "low", "high"))
    return FindingText(
        str(finding["of"]),
        str(finding["name"]).replace("_", " "),
        "-" if value is None else value + unit,
        "" if low is None or high is None or value is None else f"{low} to {high}{unit}",
        str(finding.get("n") or ""),
        str(finding["meaning"]),
    )
