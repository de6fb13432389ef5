"""Write docs/evidence.md: the table of DTKD's authors, reproduced next to its control, from records alone.

Usage:
    python benchmarks/evidence.py                         write the page and its figures
    python benchmarks/evidence.py --teachers FOLDER       pack the trained teachers of FOLDER first
    python benchmarks/evidence.py FOLDER... --out FILE    write a page of other comparisons

Each folder is one of `tempering compare`, with plan.json and records/; `make evidence` runs them. Edited records are
rejected, and unfinished runs are shown as open.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from budget import markdown
from evidence_tables import Grid, authors, fixed_and_exact, grid_in, planned, points, teachers, temperatures
from sheets import learning, sheet
from timing import ROOT

from tempering.experiments.presets import MATCHED
from tempering.reports import figures, figures_temperature, table
from tempering.reports.intervals import Difference
from tempering.reports.records import load_run, pack, write_cell

RESULTS = ROOT / "benchmarks" / "results"
# in the order of the page: the headline is that of the first with an interval
FOLDERS = (
    "evidence-full-resnet14",
    "evidence-full-resnet20",
    "evidence-screen",
    "evidence-ablations",
    "evidence-short",
)
OURS = ("DTKD published", "DTKD exact")
HEAD = """# Evidence: DTKD's table for resnet8, reproduced next to its control

Made by `make pages` from the records under `benchmarks/results/evidence-*`; do not edit. DTKD trains with a total soft
weight of 4, a hard weight of 1 and a warm-up; the KD in published tables has 0.9, 0.1 and no warm-up. Here the
control is "KD, weight-matched": KD at temperature 4 with DTKD's total weights and its warm-up. The student is
resnet8, trained on all 50,000 images of CIFAR-100 with the standard recipe; decay and warm-up are fractions of the
run, so they scale with its length. Seeds are paired: all methods have the same initial weights and the same order of
images. Scores are those of the 10,000 test images after the last epoch; the best epoch is selected on the same
images.
"""
COMMANDS = """Run the open stages with these commands, in this order. An interrupted stage resumes, and a finished
run is never run again:

    make evidence DATA=DIR              all of them
    make evidence-teachers DATA=DIR     teacher resnet14, 240 epochs
    make evidence-screen DATA=DIR       60 epochs, 13 methods, 3 seeds
    make evidence-full DATA=DIR         240 epochs, 5 methods, 3 seeds
    make evidence-ablations DATA=DIR    the temperatures or their scale alone, in the screen; tau times weights, 1 seed
    make evidence-others DATA=DIR       CTKD, cosine and standardized temperatures, DIST, in the screen
    make evidence-resnet20 DATA=DIR     teacher resnet20, then 240 epochs, 5 methods, 3 seeds

A first look for a slow CPU, not part of `make evidence`:

    make evidence-short DATA=DIR        8 epochs, a teacher of 12: 7 methods, 3 seeds; tau, 1 seed

A stage resumes from its folder and its subfolder `work/`, which has the teacher and the checkpoints and is not
committed. Without `work/` a new teacher would be trained: a method rejects a second teacher for one seed, and a table
states if its methods had different teachers. Use PRECISION=32-true on a CPU that does not compute in bf16. Show a
stage as one HTML page:

    tempering report benchmarks/results/evidence-short --out report.html"""
AUTHORS = """Top-1 accuracy on CIFAR-100 with student resnet8, read off the charts in the README of the authors'
repository to within about 0.03 points. We do not know the number of runs, or if it is the best or the last epoch. The
release states weights for other pairs of networks; ours are its defaults: dynamic 3, soft 1, hard 1, temperature 4,
warm-up 20 epochs of 240."""
TAUGHT = """We do not know the accuracy of the authors' own teachers; the numbers from elsewhere are of the same
network trained without a teacher with this recipe."""
# figure -> title and legend
FIGURES = {
    "result": (
        "every seed, and the differences",
        "Bar: 95 % t interval. Large dot: mean, hollow if the interval includes zero. Small dots: seeds.",
    ),
    "learning": (
        "learning curves",
        "Line: mean over seeds. Band: lowest to highest seed. A single method is plotted with the control.",
    ),
    "temperatures": (
        "temperatures",
        "Line: mean over rows and seeds. Band: 5 to 95 % of the rows of a batch. By difficulty: fifths of the test "
        "images by the teacher's margin for the label.",
    ),
}


# sentences


def headline(grids: Sequence[Grid]) -> str:
    """Whether DTKD beats KD at equal weights, by the first comparison that has an interval."""
    if not sum(grid.done for grid in grids):
        return "No run of any stage is finished yet."
    for grid in grids:
        gaps = {label: gap for label in OURS if (gap := grid.gap(label, MATCHED)) and gap.half is not None}
        if not gaps:
            continue
        better = [label for label, gap in gaps.items() if gap.shown and gap.mean > 0]
        worse = [label for label, gap in gaps.items() if gap.shown and gap.mean < 0]
        so_far = ", so far" if any(gap.n < len(grid.found.seeds) for gap in gaps.values()) else ""
        below = f"{' and '.join(worse)} end{'s' * (len(worse) == 1)} below it" if worse else ""
        if len(worse) == len(gaps):
            return f"DTKD does not beat KD at its own total weights: {below} ({grid.title}{so_far})."
        said = "DTKD is not shown to beat KD at its own total weights"
        if better:
            said = f"{' and '.join(better)} beat{'s' * (len(better) == 1)} KD at DTKD's own total weights"
        said += f"; {below}" * bool(below)
        return f"{said} ({grid.title}{so_far})."
    return f"Not decided yet: no DTKD method shares two finished seeds with {MATCHED}."


def learned(grid: Grid) -> Iterator[str]:
    """The results of DTKD against KD at equal weights, one sentence per method, and the effect of the weights alone."""
    for label in OURS:
        gap = grid.gap(label, MATCHED)
        if gap is not None:
            yield f"{grid.title}: {label} minus {MATCHED} is {said_of(grid, gap)}."
    both = grid.gap("DTKD published", "KD"), grid.gap(MATCHED, "KD")
    if both[0] and both[1]:
        yield (
            f"{grid.title}: compared with KD at its usual weights, as in the authors' table, DTKD published is "
            f"{points(grid, both[0])}, and the weights and the warm-up alone ({MATCHED}) are {points(grid, both[1])}."
        )


def said_of(grid: Grid, gap: Difference) -> str:
    """A difference, whether it is shown, and the smallest difference that these seeds could have shown."""
    seeds = f"{gap.n} paired seed{'s' * (gap.n != 1)}" + (" so far" if gap.n < len(grid.found.seeds) else "")
    if gap.half is None:
        return f"{points(grid, gap)} over {seeds}, without an interval"
    zero = "excludes" if gap.shown else "includes"
    least = grid.found.metric.show(gap.half)
    said = f"{points(grid, gap)} over {seeds}, with an interval that {zero} zero"
    return f"{said}; the smallest difference that they could have shown is {least}"


# the page


def stage(grid: Grid, drawn: Mapping[str, str]) -> Iterator[str]:
    """One comparison: planned differences, all methods, temperatures, and figures (kind -> path)."""
    yield f"## {grid.name}: {grid.title}"
    yield f"{grid.done} of {len(grid.runs)} runs are done."
    yield planned(grid)
    yield fixed_and_exact(grid)
    yield table.markdown(grid.found).rstrip("\n")
    yield temperatures(grid)
    for kind, path in drawn.items():
        title, reading = FIGURES[kind]
        yield f"![{grid.title}: {title}]({path})"
        yield reading


def drawings(grid: Grid) -> dict[str, str]:
    """Kind -> SVG of a comparison; empty if it has no result."""
    found = grid.found
    panels = {
        "result": [(f.title, f.svg) for f in figures.result(found).figures],
        "learning": learning(found),
        "temperatures": [(f.title, f.svg) for f in figures_temperature.temperatures(found).figures],
    }
    return {
        kind: sheet(f"{grid.title}: {FIGURES[kind][0]}", made, found)
        for kind, made in panels.items()
        if made and grid.done
    }


def page(folders: Sequence[Path], taught: Path, places: Path, notes: Path) -> tuple[str, dict[str, str]]:
    """The whole page, and file name -> SVG of its figures.

    Args:
        folders: folders of comparisons.
        taught: the folder of the teachers' records.
        places: the folder of the figures, as the page links to it.
        notes: a Markdown file that is included unchanged, if it exists.

    Raises:
        ValueError: if a record was edited.
    """
    all_grids = {folder: grid_in(folder) for folder in folders}
    grids = [grid for grid in all_grids.values() if grid is not None]
    said = [f"- {sentence}" for grid in grids for sentence in learned(grid)]
    rows = []
    for folder, grid in all_grids.items():
        state = ["not started", "-"] if grid is None else [grid.title, f"{grid.done} of {len(grid.runs)}"]
        rows.append([f"`{folder.name}`", *state])
    parts = [HEAD.rstrip("\n"), f"**{headline(grids)}**", "\n".join(said)]
    parts.append(notes.read_text(encoding="utf-8").strip("\n") if notes.is_file() else "")
    parts += ["## Status", markdown(["folder", "content", "runs done"], rows, left=2), COMMANDS]
    svgs: dict[str, str] = {}
    for grid in grids:
        made = drawings(grid)
        names = {kind: f"{grid.name}-{kind}.svg" for kind in made}
        svgs |= {names[kind]: svg for kind, svg in made.items()}
        parts += stage(grid, {kind: (places / name).as_posix() for kind, name in names.items()})
    parts += ["## Teachers", teachers(taught, grids), TAUGHT]
    parts += ["## The authors' numbers", AUTHORS, authors()]
    return "\n\n".join(part for part in parts if part) + "\n", svgs


def collect(folder: Path, records: Path) -> None:
    """Pack every finished teacher under ``folder``, one record each."""
    for facts in sorted(folder.glob("*/facts.json")):
        if load_run(facts.parent).done:
            write_cell(records / f"{facts.parent.name}.json", pack(facts.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of comparisons; default: those of the evidence")
    parser.add_argument("--teachers", type=Path, default=None, help="a folder of trained teachers to pack")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence.md")
    args = parser.parse_args(argv)
    taught = RESULTS / "evidence-teachers"
    if args.teachers is not None:
        collect(args.teachers, taught / "records")
    folders = args.folders or [RESULTS / name for name in FOLDERS]
    notes, places = args.out.with_name("evidence-notes.md"), Path("figures", "evidence")
    text, svgs = page(folders, taught, places, notes)
    for name, svg in svgs.items():
        path = args.out.parent / places / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg, encoding="utf-8", newline="\n")
    args.out.write_text(text, encoding="utf-8", newline="\n")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
