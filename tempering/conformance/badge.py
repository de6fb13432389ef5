"""A badge that says whether a loss conforms: an SVG file, or the JSON of a shields.io endpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tempering.utils.files import write_atomic

LABEL = "distillation loss"
GREEN, RED, GRAY = "#2a8a3a", "#d03030", "#808080"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {message}">
<title>{label}: {message}</title><rect width="{left}" height="20" fill="#444"/>
<rect x="{left}" width="{right}" height="20" fill="{color}"/>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{middle_left}" y="14">{label}</text><text x="{middle_right}" y="14">{message}</text></g></svg>
"""


def badge(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON of a shields.io endpoint for the records of one loss or more (``Report.record``).

    It is green if every invariant that is promised was checked and holds, and gray if time ran out.
    """
    records = list(records)
    counts = Counter(str(r["status"]) for record in records for r in record["results"])
    failed, passed = counts["fail"] + counts["error"], counts["pass"]
    if failed:
        message, color = f"{failed} of {passed + failed} invariants fail", RED
    elif not passed or any("stopped after seconds" in record["facts"] for record in records):
        message, color = "not checked to the end", GRAY
    else:
        message, color = f"{passed} invariants hold", GREEN
    return {"schemaVersion": 1, "label": LABEL, "message": message, "color": color}


def write_badge(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the badge to a file that ends in .svg or .json.

    Raises:
        ValueError: for another ending.
    """
    made = badge(records)
    if path.suffix == ".svg":
        left, right = (round(6.6 * len(made[name])) + 12 for name in ("label", "message"))
        sizes = {"width": left + right, "left": left, "right": right}
        text = SVG.format(**made, **sizes, middle_left=left / 2, middle_right=left + right / 2)
    elif path.suffix == ".json":
        text = json.dumps(made, indent=1) + "\n"
    else:
        raise ValueError(f"a badge is a file that ends in .svg or .json (for shields.io/endpoint); got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
