"""docs/performance.md and its plots, from the CSVs that the benchmarks wrote; nothing in it is typed by hand.

Usage:
    python benchmarks/page.py [--results benchmarks/results/speed] [--out docs/performance.md]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import goals
from plots import bars, curves
from timing import FACTS, RESULTS, ROOT

HEAD = """# Performance

Made by `make bench` from the CSVs under `benchmarks/results/speed`; not edited by hand. All arms of a table ran in one
process, in turn, and the numbers are medians: of CPU time on a CPU, of the clock on a device. Speed is the median over
the rounds of the first arm's time over this one's, with the quartiles beside it: trust it more than the milliseconds.
Peaks were measured in processes of their own. A peer that is a repository, or was not installed, is stated again
in plain torch (`benchmarks/peers.py`) and marked so.
"""
# the order of the page, and what a table shows
PARTS = {
    "step": "A classification step",
    "loss": "The loss alone, forward and backward",
    "fused_linear": "From hidden states to the loss",
    "memory": "Peak memory at a real vocabulary",
    "overhead": "What the engine adds",
    "cache": "Reading stored teacher answers",
    "augment": "Augmentation",
    "startup": "Start-up",
    "speculative": "Speculative generation",
    "growth": "How cost grows",
}
Line = dict[str, str]


def table(case: str, lines: list[Line]) -> Iterator[str]:
    """One case as markdown."""
    peaks, notes = (any(line[name] for line in lines) for name in ("peak", "note"))
    unit = next((line["unit"] for line in lines if line["unit"]), "")
    columns = ["arm", "ms", "speed", "quartiles"]
    columns += ([f"peak, {unit}"] if peaks else []) + (["note"] if notes else [])
    yield f"**{case}**\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * (3 + peaks) + "|---" * notes + "|"
    for line in lines:
        cells = [line["arm"], line["ms"], line["speed"], f"{line['low']} - {line['high']}"]
        cells += ([line["peak"]] if peaks else []) + ([line["note"]] if notes else [])
        yield "| " + " | ".join(cells) + " |"
    yield ""


def plots(name: str, lines: list[Line]) -> dict[str, tuple[str, str]]:
    """Title -> (file name, SVG): bars of speed a case, or one set of curves for all cases of one kind of size."""
    cases = [(case, list(found)) for case, found in groupby(lines, key=lambda line: line["case"])]
    if name != "growth":
        made = {case: bars(case, [(x["arm"], float(x["speed"])) for x in found]) for case, found in cases}
    else:
        kinds: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
        for case, found in cases:
            kind, _, said = case.partition(": ")
            kinds.setdefault(kind, []).append((said, [(float(x["arm"]), float(x["ms"])) for x in found]))
        made = {kind: curves(kind, kind.split(",")[0], series) for kind, series in kinds.items()}
    return {title: (f"{name}-{i}.svg", svg) for i, (title, svg) in enumerate(made.items())}


def page(results: Path, figures: Path | None = None) -> str:
    """The whole page; a benchmark that has not been run is named as missing. Plots are written into ``figures``."""
    read = {name: found for name in PARTS if (found := _lines(results / f"{name}.csv"))}
    out, missing = [HEAD, "## Goals\n", *goals.table(read)], [name for name in PARTS if name not in read]
    for name, lines in read.items():
        title = PARTS[name]
        out.append(f"## {title}\n")
        out.append(f"`python benchmarks/{name}.py`\n")
        for title, (file_name, svg) in plots(name, lines).items() if figures is not None else ():
            figures.mkdir(parents=True, exist_ok=True)
            (figures / file_name).write_text(svg + "\n", encoding="utf-8")
            out.append(f"![{title}]({figures.parent.name}/{figures.name}/{file_name})\n")
        for case, found in groupby(lines, key=lambda line: line["case"]):
            out += table(case, list(found))
        out.append(", ".join(f"{fact} {lines[0][fact]}" for fact in FACTS) + f", {lines[0]['rounds']} rounds.\n")
    if missing:
        out.append(f"Not measured here yet: {', '.join(missing)}.\n")
    return "\n".join(out)


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    args.out.write_text(page(args.results, args.out.parent / "figures" / "performance"), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
