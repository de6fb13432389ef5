"""What audits found of the runs, as tables: numbers, intervals, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempering.reports import audit_figures
from tempering.reports.compare import Comparison
from tempering.reports.figures import Figure, styles
from tempering.reports.records import number
from tempering.reports.trees import tree_figure, whole

TITLES = {
    "calibration": "Calibration",
    "explanation": "Explanation: what came over from the teacher",
    "robustness": "Robustness",
    "privacy": "Privacy",
}


@dataclass(frozen=True)
class FindingText:
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
    parts: Sequence[tuple[str, Sequence[FindingText]]]
    figures: Sequence[Figure] = ()


def audits(found: Comparison) -> list[Audited]:
    """Every run that was audited, in the order of the arms."""
    css, out = styles(found), []
    for arm in found.arms:
        for run in arm.runs:
            there = (run.audits or {}).get("audits") or {}
            parts = [
                (title, [finding_text(f) for f in there[k]["findings"]]) for k, title in TITLES.items() if there.get(k)
            ]
            if parts:
                color = css[arm.label]
                out.append(Audited(arm.label, color, run.seed, parts, _figures(there, color, len(out))))
    return out


def _figures(there: Mapping[str, Any], css: str, number: int) -> list[Figure]:
    """What the audits of a run drew."""
    drawn = {kind: (there.get(kind) or {}).get("drawn") or {} for kind in TITLES}
    return [
        *audit_figures.reliability(drawn["calibration"], css, f"reliability-{number}"),
        *audit_figures.temperatures(drawn["explanation"], css, f"hardness-{number}"),
        *_tree(drawn["explanation"], css, f"tree-{number}"),
    ]


def _tree(drawn: Mapping[str, Any], css: str, key: str) -> list[Figure]:
    """The concept tree of a student that has one."""
    tree = drawn.get("tree") or ()
    if not whole(tree):
        return []
    caption = (
        "Each class hangs on the expert that it hears first, and so on back to the image; a line is as strong as the "
        "share it takes. Experts on no class's way are left out."
    )
    svg = tree_figure(key, tree, drawn.get("class_names") or (), css=css)
    return [Figure("KDExplainer's tree where it was used", svg, caption)]


def finding_text(finding: Mapping[str, Any]) -> FindingText:
    """A finding with its numbers written out: shares in percent, others with four digits."""
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
