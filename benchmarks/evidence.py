"""docs/evidence.md: the table of DTKD's authors run again beside its control, from records alone.

Usage:
    python benchmarks/evidence.py                         the page and its figures
    python benchmarks/evidence.py --teachers FOLDER       pack the trained teachers that lie there, then the page
    python benchmarks/evidence.py FOLDER... --out FILE    a page of other comparisons, to look at it

Each folder is one of `tempering compare`, plan.json and records/; `make evidence` runs them. A record that was edited
is refused, and what is open is shown as open.
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
# in the order of the page: the first that has an interval decides
FOLDERS = (
    "evidence-full-resnet14",
    "evidence-full-resnet20",
    "evidence-screen",
    "evidence-ablations",
    "evidence-short",
)
OURS = ("DTKD published", "DTKD exact")
HEAD = """# Evidence: DTKD's table of resnet8, run again beside its control

Made by `make docs` from the records under `benchmarks/results/evidence-*`; not edited by hand. DTKD trains with a
total soft weight of 4, a hard weight of 1 and a warm-up; the KD that tables set beside it has 0.9, 0.1 and none. Here
it stands beside "KD, weight-matched": KD at temperature 4 with DTKD's total weights and its warm-up. Student resnet8
on all 50,000 images of CIFAR-100 by the field's recipe; decay and warm-up are shares of the run, so they scale with
its length. Seeds are paired: the same first weights and the same order of images in every arm. Tested on the 10,000
test images after the last epoch; "best" is chosen by the same images.
"""
COMMANDS = """What is open is run by these, in this order; a killed one goes on, and a finished run is never run again:

    make evidence DATA=DIR              all of them
    make evidence-teachers DATA=DIR     teacher resnet14, 240 epochs
    make evidence-screen DATA=DIR       60 epochs, 13 arms, 3 seeds
    make evidence-full DATA=DIR         240 epochs, 5 arms, 3 seeds
    make evidence-ablations DATA=DIR    the temperatures or their scale alone, in the screen; tau times weights, 1 seed
    make evidence-others DATA=DIR       CTKD, cosine and standardized temperatures, DIST, in the screen
    make evidence-resnet20 DATA=DIR     teacher resnet20, then 240 epochs, 5 arms, 3 seeds

And a first look, which is none of them, where hours of a slow core are all there is:

    make evidence-short DATA=DIR        8 epochs, a teacher of 12: 7 arms, 3 seeds; tau, 1 seed

A stage goes on from its folder and the `work/` in it, where teacher and checkpoints lie; those are not committed. From
the records alone a new teacher would be trained: an arm refuses a second teacher for one seed, and a table says where
its arms had not the same. PRECISION=32-true is for a CPU that does not compute in bf16. A stage as one HTML page:

    tempering report benchmarks/results/evidence-short --out report.html"""
AUTHORS = """Top-1 on CIFAR-100, student resnet8, read off the charts in the README of the authors' repository to within
about 0.03 points. Over how many runs they are, and of the best or of the last epoch, is not known to us. The release
states weights for other pairs of nets; ours are its defaults: dynamic 3, soft 1, hard 1, temperature 4, warm-up 20
epochs of 240."""
TAUGHT = """What the authors' own teachers reach is not known to us; the numbers from elsewhere are those of the same
net trained alone by this recipe."""
# figure -> its title, and how to read it
FIGURES = {
    "result": (
        "every seed, and the differences",
        "Bar: 95 % t interval. Large dot: mean, hollow unless the interval excludes zero. Small dots: seeds.",
    ),
    "learning": (
        "learning curves",
        "Line: mean over seeds. Band: lowest to highest seed. A single arm stands beside the control.",
    ),
    "temperatures": (
        "temperatures",
        "Line: mean over rows and seeds. Band: 5 to 95 % of the rows of a batch. By difficulty: fifths of the test "
        "images by the teacher's margin for the label.",
    ),
}


# words


def headline(grids: Sequence[Grid]) -> str:
    """Whether DTKD beats KD at its own weights, by the first comparison that can say so."""
    if not sum(grid.done for grid in grids):
        return "Nothing has been finished yet: no run of any stage has a record."
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
    return f"Not decided yet: no DTKD arm shares two finished seeds with {MATCHED}."


def learned(grid: Grid) -> Iterator[str]:
    """What a comparison says of DTKD against KD at its weights, a sentence an arm, and what the weights alone do."""
    for label in OURS:
        gap = grid.gap(label, MATCHED)
        if gap is not None:
            yield f"{grid.title}: {label} minus {MATCHED} is {said_of(grid, gap)}."
    both = grid.gap("DTKD published", "KD"), grid.gap(MATCHED, "KD")
    if both[0] and both[1]:
        yield (
            f"{grid.title}: to KD with its usual weights, which is what the authors compare with, DTKD published is "
            f"{points(grid, both[0])}, and the weights and the warm-up alone ({MATCHED}) are {points(grid, both[1])}."
        )


def said_of(grid: Grid, gap: Difference) -> str:
    """A difference, what follows from it, and the smallest that these seeds could have shown."""
    seeds = f"{gap.n} paired seed{'s' * (gap.n != 1)}" + (" so far" if gap.n < len(grid.found.seeds) else "")
    if gap.half is None:
        return f"{points(grid, gap)} over {seeds}, without an interval"
    zero = "excludes" if gap.shown else "holds"
    least = grid.found.metric.show(gap.half)
    said = f"{points(grid, gap)} over {seeds}, an interval that {zero} zero"
    return f"{said}; the smallest difference that they could have shown is {least}"


# the page


def stage(grid: Grid, drawn: Mapping[str, str]) -> Iterator[str]:
    """One comparison: planned differences, all arms, temperatures, and figures, kind -> where it lies."""
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
    """Kind -> SVG of a comparison; none before there is a result."""
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
        folders: of the comparisons.
        taught: the folder of the teachers' records.
        places: of the figures, as the page links them.
        notes: a page in somebody's own words, taken over as it is where it is there.

    Raises:
        ValueError: for a record that was edited.
    """
    all_grids = {folder: grid_in(folder) for folder in folders}
    grids = [grid for grid in all_grids.values() if grid is not None]
    said = [f"- {sentence}" for grid in grids for sentence in learned(grid)]
    rows = []
    for folder, grid in all_grids.items():
        state = ["not begun", "-"] if grid is None else [grid.title, f"{grid.done} of {len(grid.runs)}"]
        rows.append([f"`{folder.name}`", *state])
    parts = [HEAD.rstrip("\n"), f"**{headline(grids)}**", "\n".join(said)]
    parts.append(notes.read_text(encoding="utf-8").strip("\n") if notes.is_file() else "")
    parts += ["## How it stands", markdown(["folder", "what", "runs done"], rows, left=2), COMMANDS]
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
    """Pack every teacher that was trained to its end under ``folder``, one record each."""
    for facts in sorted(folder.glob("*/facts.json")):
        if load_run(facts.parent).done:
            write_cell(records / f"{facts.parent.name}.json", pack(facts.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Write page and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of comparisons; by itself those of the evidence")
    parser.add_argument("--teachers", type=Path, default=None, help="a folder of trained teachers, to be packed")
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
