"""Write docs/performance.md and its plots from the CSV files of the benchmarks.

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

Made by `make bench` from the CSV files under `benchmarks/results/speed`; do not edit. All candidates of a table ran
in one process, in turn. Numbers are medians: of CPU time on a CPU, of wall time on a GPU. Speed is the median over
rounds of the first candidate's time divided by this one's, with quartiles; it is more reliable than the milliseconds.
Peak memory was measured in separate processes. Peers that are repositories, or that were not installed, are re-stated
in plain torch (`benchmarks/peers.py`) and marked as such.
"""
# sections in the order of the page
PARTS = {
    "step": "A classification step",
    "loss": "The loss alone, forward and backward",
    "fused_linear": "From hidden states to the loss",
    "chunked_losses": "Chunked losses of today",
    "whole_steps": "Whole steps beside the trainers of today",
    "memory": "Peak memory at a real vocabulary",
    "overhead": "Overhead of the trainer per step",
    "cache": "Reading cached teacher logits",
    "augment": "Augmentation",
    "images": "Images from disk",
    "startup": "Start-up time",
    "speculative": "Speculative generation",
    "growth": "How cost grows",
    "roots": "How exact the solver is",
    "roofline": "Triton's kernels on paper",
}
Line = dict[str, str]


def table(case: str, lines: list[Line]) -> Iterator[str]:
    """One case as a Markdown table."""
    peaks, notes = (any(line[name] for line in lines) for name in ("peak", "note"))
    unit = next((line["unit"] for line in lines if line["unit"]), "")
    columns = ["candidate", "ms", "speed", "quartiles"]
    columns += ([f"peak, {unit}"] if peaks else []) + (["note"] if notes else [])
    yield f"**{case}**\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * (3 + peaks) + "|---" * notes + "|"
    for line in lines:
        cells = [line["arm"], line["ms"], line["speed"], f"{line['low']} - {line['high']}"]
        cells += ([line["peak"]] if peaks else []) + ([line["note"]] if notes else [])
        yield "| " + " | ".join(cells) + " |"
    yield ""


def plain_table(lines: list[Line]) -> Iterator[str]:
    """A file with columns of its own."""
    columns = [name for name in lines[0] if name not in FACTS]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in lines:
        yield "| " + " | ".join(line[name] for name in columns) + " |"
    yield ""


def facts(lines: list[Line]) -> str:
    """What the numbers depend on beside the code; parts of a file may be of different commits."""
    return ", ".join(f"{fact} {_different(lines, fact)}" for fact in FACTS)


def _different(lines: list[Line], column: str) -> str:
    return " and ".join(dict.fromkeys(line[column] for line in lines))


def plots(name: str, lines: list[Line]) -> dict[str, tuple[str, str]]:
    """Title -> (file name, SVG): bars of speed per case, or curves for all cases with the same kind of size."""
    cases = [(case, list(found)) for case, found in groupby(lines, key=lambda line: line["case"])]
    if name != "growth":
        made = {case: bars(case, [(x["arm"], float(x["speed"])) for x in found]) for case, found in cases}
    else:
        kinds: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
        for case, found in cases:
            kind, _, label = case.partition(": ")
            kinds.setdefault(kind, []).append((label, [(float(x["arm"]), float(x["ms"])) for x in found]))
        made = {kind: curves(kind, kind.split(",")[0], series) for kind, series in kinds.items()}
    return {title: (f"{name}-{i}.svg", svg) for i, (title, svg) in enumerate(made.items())}


def page(results: Path, figures: Path | None = None) -> str:
    """The page; benchmarks without results are named as missing. Plots are written to ``figures``."""
    read = {name: found for name in PARTS if (found := _lines(results / f"{name}.csv"))}
    out, missing = [HEAD, "## Goals\n", *goals.table(read)], [name for name in PARTS if name not in read]
    for name, lines in read.items():
        title = PARTS[name]
        out.append(f"## {title}\n")
        out.append(f"`python benchmarks/{name}.py`\n")
        if "arm" not in lines[0]:
            out += [*plain_table(lines), facts(lines) + ".\n"]
            continue
        for title, (file_name, svg) in plots(name, lines).items() if figures is not None else ():
            figures.mkdir(parents=True, exist_ok=True)
            (figures / file_name).write_text(svg + "\n", encoding="utf-8")
            out.append(f"![{title}]({figures.parent.name}/{figures.name}/{file_name})\n")
        for case, found in groupby(lines, key=lambda line: line["case"]):
            out += table(case, list(found))
        out.append(f"{facts(lines)}, rounds {_different(lines, 'rounds')}.\n")
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
