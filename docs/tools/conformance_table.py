"""Write docs/conformance-table.md: which distillation losses of which libraries hold the invariants, from records.

Usage: ``python docs/tools/conformance_table.py .``. Reads benchmarks/results/conformance; ``make conformance`` runs it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

OURS = "tempering"
COLUMNS = ("pass", "fail", "not promised", "not applicable", "not checked")
HEAD = """# Which distillation losses hold the invariants

Made by `make conformance` from the records in `benchmarks/results/conformance`; do not edit. Each library is installed
with pinned versions into an environment of its own, on the CPU, and every loss goes through
`tempering.conformance.check` with the promises that its documentation makes. `benchmarks/conformance/peers` has the
adapters, a few lines each, and what is promised.

- **pass**: held for every input tried.
- **fail**: broken, and promised by the documentation, by the name, or by what the loss computes elsewhere. The smallest
  input found is given with the expected and the found value.
- **not promised**: broken, and the documentation says nothing of it. This is no fault.
- **not applicable**: the loss has no such input, or refuses it.
- **not checked**: an invariant that another failure explains.

A loss that differs from its definition by intention fails nothing if its documentation says so; if a sentence here is
unfair to a library, its file in `benchmarks/conformance/peers` is the place to mend it. Reports with reproductions of a
few lines are in `docs/upstream`. `tempering conformance MODULE:LOSS --badge FILE.svg` (or `.json`, for
shields.io/endpoint) writes a badge from a record: green with the number of invariants if none fails.
"""
SHARED = """
## Faults that libraries share

Current releases of other libraries: in how many of them a loss fails the invariant, which it promises, and in how many
more it is broken without a promise. Two are shared most and are no fault by a broken promise, yet give silent wrong
numbers: [classes masked on both sides](upstream/shared-masked-classes.md) make the value NaN, and
[bfloat16 logits near agreement](upstream/shared-bfloat16-near-agreement.md) give a value of the wrong size or sign.
"""


def page(results: Path) -> str:
    """The page; ``results`` is the folder of the records."""
    records = sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")),
        key=lambda r: (r["library"] != OURS, bool(r["dated"]), r["library"].lower()),
    )
    current = [r for r in records if r["library"] != OURS and not r["dated"]]
    losses = sum(len(r["losses"]) for r in current)
    lines = [HEAD, f"{len(current)} libraries with {losses} losses, this one first; then older releases.", ""]
    lines += [_row("library", "version", "losses", *COLUMNS), _row("---", "---", *["---:"] * (1 + len(COLUMNS)))]
    lines += [_summary(r) for r in records]
    return "\n".join([*lines, *shared(current), *(line for r in records for line in _library(r))]) + "\n"


def shared(records: list[dict[str, Any]]) -> list[str]:
    """The section on the invariants that libraries fail, most shared first."""
    failed: dict[str, set[str]] = {}
    broken: dict[str, set[str]] = {}
    for r in records:
        for result in (x for loss in r["losses"] for x in loss.get("results", ())):
            if result["status"] in ("fail", "error"):
                failed.setdefault(result["name"], set()).add(r["library"])
            elif result["status"] == "not promised":
                broken.setdefault(result["name"], set()).add(r["library"])
    lines = [SHARED, _row("invariant", "fails in", "not promised, in"), _row("---", "---", "---")]
    for name in sorted({*failed, *broken}, key=lambda n: (-len(failed.get(n, ())), -len(broken.get(n, ())), n)):
        both = failed.get(name, set()), broken.get(name, set()) - failed.get(name, set())
        lines.append(_row(name, *(_named(libraries) for libraries in both)))
    return lines


def _named(libraries: set[str]) -> str:
    return f"{len(libraries)}: {', '.join(sorted(libraries, key=str.lower))}" if libraries else "none"


def _summary(record: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for loss in record["losses"]:
        counts += _counts(loss)
    link = f"[{record['library']}](#{_anchor(record)})"
    return _row(link, record["version"], len(record["losses"]), *(counts[c] for c in COLUMNS))


def _library(record: dict[str, Any]) -> list[str]:
    lines = ["", f"## {record['library']} {record['version']}", ""]
    if record["dated"]:
        lines += [f"{record['dated']}", ""]
    lines += [_row("function", "kind", *COLUMNS), _row("---", "---", *["---:"] * len(COLUMNS))]
    lines += [
        _row(f"`{loss['path']}`", loss["kind"], *(_counts(loss)[c] for c in COLUMNS)) for loss in record["losses"]
    ]
    for loss in record["losses"]:
        lines += ["", f"`{loss['path']}`. Documented: {loss['documented']}"]
        if "not loaded" in loss:
            lines += ["", f"Not loaded: {loss['not loaded']}"]
        failures = [r for r in loss.get("results", ()) if r["status"] in ("fail", "error")]
        lines += ["", *(_failure(r, loss["counterexamples"].get(r["name"], {})) for r in failures)] if failures else []
    return lines


def _failure(result: dict[str, Any], inputs: dict[str, Any]) -> str:
    values = (
        "" if result["found"] is None else f": expected {_text(result['expected'])}, found {_text(result['found'])}"
    )
    given = ", ".join(f"{name} {_text(x)}" for name, x in inputs.items())
    return f"- **{result['name']}**: {result['message']}{values}." + (f" Inputs: `{given}`" if given else "")


def _counts(loss: dict[str, Any]) -> Counter[str]:
    names = {"error": "fail", "explained": "not checked"}
    return Counter(str(names.get(r["status"], r["status"])) for r in loss.get("results", ()))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _anchor(record: dict[str, Any]) -> str:
    title = f"{record['library']} {record['version']}".lower()
    return "".join(c for c in title.replace(" ", "-") if c.isalnum() or c in "-_")


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def main(root: Path) -> None:
    text = page(root / "benchmarks" / "results" / "conformance")
    (root / "docs" / "conformance-table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
