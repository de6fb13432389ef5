"""Accuracy over the number of images that a teacher is asked about: Comparative KD beside KD, each answer asked once.

Usage:
    python benchmarks/budget.py --data DIR [--images 500,1000,2000,5000] [--seeds 3] [--steps 1600] [-- RECIPE'S FLAGS]
    python benchmarks/budget.py                 table.md and curve.svg again, from the records alone

For every number of images one grid of `tempering compare cifar100` under OUT/n-IMAGES: the teacher is
trained once, on all 50,000, and is asked about each of the student's n images once; the student learns from
augmentations of them, for the same number of steps whatever n is. A killed call goes on with the same command, and
finished cells never run again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import status as compare_status
from tempering.experiments.presets import MATCHED
from tempering.reports.charts import Series, Svg, join, lines, tag
from tempering.reports.intervals import deviation, difference, mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ckd-budget"
METRIC, BATCH, WHOLE = "test/accuracy", 64, 50_000
COLORS = ("#767c85", "#0072b2", "#d55e00", "#009e73", "#b8619a", "#c98a00", "#3fa0d8")
STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff } text { fill: #454a52 } .grid { stroke: #ececec }
.axis { stroke: #767c85 } .end { text-anchor: end } .mid { text-anchor: middle } .dot { fill: var(--c) }
.line { fill: none; stroke: var(--c); stroke-width: 1.8 } .band { fill: var(--c); opacity: .13 }
"""
Curve = dict[int, dict[int, float]]  # images -> seed -> accuracy


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The comparison of every number of images."""
    out = []
    for n in args.images:
        epochs = max(1, round(args.steps / math.ceil(n / BATCH)))
        own = {"teacher": "resnet14", "student": "resnet8", "teacher-epochs": 20, "evaluate-every": max(1, epochs // 4)}
        own |= {"subset": n, "epochs": epochs, "batch-size": BATCH, "teacher-subset": WHOLE, "teacher-cache": 0}
        own |= {"teacher-dir": (args.out / "work").resolve()}
        given = {word.partition("=")[0].removeprefix("--") for word in args.flags if word.startswith("--")}
        flags = [f"--{name}={value}" for name, value in own.items() if name not in given]
        grid = ["--methods", args.methods, "--seeds", str(args.seeds), "--no-controls"]
        grid += ["--out", str(args.out / f"n-{n}")]
        machine = ["--jobs", str(args.jobs), "--threads", str(args.threads), *(["--nice"] if args.nice else [])]
        called = [sys.executable, "-m", "tempering", "compare", str(ROOT / "tempering" / "recipes" / "cifar100.py")]
        out.append([*called, *grid, *machine, "--", f"--data={args.data}", *flags, *args.flags])
    return out


def curves(folder: Path) -> tuple[dict[str, Curve], list[str]]:
    """Method -> its curve, from the records of every grid under ``folder``; and what is open.

    Raises:
        FileNotFoundError: where there is no grid.
        ValueError: for a record that was edited.
    """
    found: dict[str, Curve] = {}
    missing: list[str] = []
    places = {int(path.parent.name[2:]): path.parent for path in folder.glob("n-*/plan.json")}
    if not places:
        raise FileNotFoundError(f"{folder} holds no grid n-IMAGES. Run some: python benchmarks/budget.py --data DIR")
    for n, place in sorted(places.items()):
        for run in compare_status.records(place, compare_plan.read(place)):
            score = run.score(METRIC) if run.done else None
            curve = found.setdefault(run.label, {})
            if score is None:
                missing.append(f"{run.label}, {n} images, seed {run.seed}")
            else:
                curve.setdefault(n, {})[run.seed] = score
    return found, missing


def table(found: dict[str, Curve], missing: Sequence[str]) -> str:
    """Accuracy of every method at every number of images, and the differences to KD at the same total weights."""
    images = sorted({n for curve in found.values() for n in curve})
    head = ["method", *(f"{n:,} images (%)" for n in images)]
    parts = [
        "# A teacher that is asked about n images",
        "Made from the records beside it by `python benchmarks/budget.py`; the figure is [curve.svg](curve.svg). Test "
        "accuracy at the last epoch, mean ± sample standard deviation over seeds.",
        markdown(head, [[label, *(_spread(curve.get(n, {})) for n in images)] for label, curve in found.items()]),
    ]
    if control := found.get(MATCHED):
        rows = [
            [label, *(_gap(curve.get(n, {}), control.get(n, {})) for n in images)]
            for label, curve in found.items()
            if label != MATCHED
        ]
        parts += [
            f"Minus {MATCHED}, in points, paired by seed, with the half-width of the 95 % t interval. Bold: the "
            "interval excludes zero.",
            markdown([head[0], *(f"{n:,} images" for n in images)], rows),
        ]
    if missing:
        parts.append(f"Open: {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def figure(found: dict[str, Curve]) -> str:
    """The curves as an SVG file: means, and a band of a standard deviation to either side."""
    series, legend = [], []
    for i, (label, curve) in enumerate((label, curve) for label, curve in found.items() if curve):
        points = [(n, [100 * v for v in scores.values()]) for n, scores in sorted(curve.items())]
        middles = [mean(values) or 0.0 for _, values in points]
        spreads = [deviation(values) or 0.0 for _, values in points]
        series.append(
            Series(
                css=f"c{i % len(COLORS)}",
                name=label,
                x=[n for n, _ in points],
                y=middles,
                low=[m - s for m, s in zip(middles, spreads, strict=True)],
                high=[m + s for m, s in zip(middles, spreads, strict=True)],
                dots=True,
            )
        )
        at = 296 + 18 * i
        line = tag("line", class_="line", x1=46, x2=70, y1=at - 4, y2=at - 4)
        legend.append(tag("g", line, tag("text", label, x=78, y=at), class_=series[-1].css))
    images = sorted({n for s in series for n in s.x})
    told = "; ".join(f"{s.name}, {min(s.x):g} to {max(s.x):g}: {s.y[0]:.2f} to {s.y[-1]:.2f} %" for s in series)
    drawn = lines(
        "budget",
        "Test accuracy over the number of images the teacher is asked about",
        told,
        series,
        x_label="images the teacher is asked about",
        y_label="test accuracy, %",
        size=(560, 270),
        x_ticks=[(n, f"{n:,.0f}") for n in images],
    )
    height = 284 + 18 * len(legend)
    colors = " ".join(f".c{i} {{ --c: {color} }}" for i, color in enumerate(COLORS))
    style = tag("style", Svg(f"{STYLE}{colors}\n"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="{height}"'
    return (
        drawn.replace("<svg", head, 1)
        .replace("0 0 560 270", f"0 0 560 {height}")
        .replace("</svg>", join([style, *legend]) + "</svg>\n")
    )


def write(folder: Path) -> tuple[Path, Path]:
    """table.md and curve.svg, from the records under ``folder`` alone; their paths."""
    found, missing = curves(folder)
    paths = folder / "table.md", folder / "curve.svg"
    if not any(found.values()):
        raise ValueError(f"no cell under {folder} is done yet: there is nothing to draw.")
    for path, text in zip(paths, (table(found, missing), figure(found)), strict=True):
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


def _spread(scores: dict[int, float]) -> str:
    values = [100 * v for v in scores.values()]
    middle, spread = mean(values), deviation(values)
    if middle is None:
        return "-"
    return f"{middle:.2f}" if spread is None else f"{middle:.2f} ± {spread:.2f}"


def _gap(group: dict[int, float], control: dict[int, float]) -> str:
    gap = difference(group, control)
    if gap is None:
        return "-"
    said = f"{100 * gap.mean:+.2f} " + ("(no interval)" if gap.half is None else f"± {100 * gap.half:.2f}")
    return f"**{said}**" if gap.shown else said


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table; all columns but the first ``left`` to the right."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; those behind -- are the recipe's."""
    own, behind = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="of CIFAR-100; without it nothing is run")
    parser.add_argument("--images", default="500,1000,2000,5000", help="how many the teacher is asked about, in turn")
    parser.add_argument(
        "--methods", default="supervised,kd,kd-matched,ckd", help="methods, as `tempering list` has them"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600, help="of every student, to the nearest epoch")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--threads", type=int, default=1, help="of each cell")
    parser.add_argument("--nice", action="store_true", help="run at the lowest priority")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(own)
    args.images, args.flags = [int(n) for n in args.images.split(",")], list(behind)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is open, where there is data, and write table and figure."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    if args.data is not None:
        (args.out / "work").mkdir(parents=True, exist_ok=True)
        (args.out / "work" / ".gitignore").write_text("*\n")
        for command in commands(args):
            if code := subprocess.run(command, check=False).returncode:
                return code
    print("written: {} and {}".format(*write(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
