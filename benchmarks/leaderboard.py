"""Write docs/leaderboard.md from the records of the arena at 16 x 16.

Usage: ``python benchmarks/leaderboard.py [ROOT]``. The plan is docs/decisions/arena-16.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tempering.experiments.compare.plan import read
from tempering.experiments.compare.status import records
from tempering.reports.compare import CONTROL, display_name
from tempering.reports.intervals import mean
from tempering.reports.leaderboard import LEVEL, Leaderboard, cells, leaderboard, reading
from tempering.reports.paper_results import PUBLISHED
from tempering.reports.records import RunRecord, load_run

ROOT = Path(__file__).parents[1]
STAGES = {"grid": "The grid", "pilot": "The pilot"}
CLAIMS = {"dtkd": "DTKD", "lskd": "Standardized (LSKD)", "itkd": "ITKD", "ctkd": "CTKD"}
HEAD = """# Leaderboard: does a dynamic temperature beat the best fixed one?

Made by `make pages` from the records under `benchmarks/results/arena16`; do not edit. The question, the protocol and
the comparisons that count were [planned](decisions/arena-16.md) before the grid was run. To place a method of your own
among these, on the recorded seeds:

```bash
tempering bench mine.py -- --data DIR
```
"""


def page(root: Path) -> str:
    """Return the page."""
    arena = root / "benchmarks" / "results" / "arena16"
    parts = [HEAD, _teacher(load_run(arena / "teacher" / "record.json"))]
    for name, title in STAGES.items():
        parts += [f"## {title}\n", *_stage(arena / name)]
    return "\n".join(parts)


def _teacher(run: RunRecord) -> str:
    test, validation = (100 * (run.score(f"{split}/accuracy") or 0.0) for split in ("test", "validation"))
    return (
        f"The teacher is {run.of('student').get('name')} after {run.of('settings').get('epochs')} epochs, with an "
        f"accuracy of {test:.2f} % on the test split and of {validation:.2f} % on the validation split. Its weights "
        "are beside the records.\n"
    )


def _stage(folder: Path) -> list[str]:
    if not (folder / "plan.json").is_file():
        return ["Not started.\n"]
    plan = read(folder)
    runs = records(folder, plan)
    done = [run for run in runs if run.done]
    lines = [f"{plan.flags.get('epochs')} epochs; {len(done)} of {len(runs)} runs planned so far are done.\n"]
    if not any(run.label != CONTROL for run in done):
        return [*lines, "Too few to compare.\n"]
    board = leaderboard(done)
    return [*lines, _answer(board), _table(cells(board)), *(f"- {line}" for line in reading(board)), "", *_power(board)]


def _answer(board: Leaderboard) -> str:
    if not board.p:
        return "**Nothing is decided: a test needs two seeds or more of each method.**\n"
    gaps = {label: board.comparison.arm(label).versus[board.best] for label in board.p}
    better = [display_name(name) for name, p in board.p.items() if p <= LEVEL and (gap := gaps[name]) and gap.mean > 0]
    fewest, control = min(gap.n for gap in gaps.values() if gap is not None), display_name(board.best)
    shown = f"{', '.join(better)} {'is' if len(better) == 1 else 'are'}" if better else "none is"
    return f"**Of {len(board.p)} methods {shown} shown to beat {control}, with {fewest} pairs or more of each.**\n"


def _table(rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'|'.join('---' for _ in rows[0])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows), ""])


def _power(board: Leaderboard) -> list[str]:
    """Return the seeds that half of what papers claim needs, at the spread of these runs."""
    if board.spread is None:
        return []
    effects = {f"half of {name}'s gain over KD": claim / 2 for name, claim in claims().items()}
    effects |= {"half a point": 0.005, "a quarter": 0.0025, "a tenth": 0.001}
    rows: list[dict[str, str]] = []
    for name, effect in effects.items():
        pairs = str(board.pairs_needed(effect))
        rows.append({"difference": name, "points": f"{100 * effect:.2f}", "pairs needed": pairs})
    text = (
        f"Differences of pairs have a standard deviation of {100 * board.spread:.2f} points, pooled over methods. At "
        "that spread a paired t test shows, with a power of 80 % (gains are means over the published pairs of networks "
        "on CIFAR-100, at the papers' own weights):\n"
    )
    return [text, _table(rows)]


def claims() -> dict[str, float]:
    """Return the mean published gain over KD, in [0, 1], over all pairs of networks for which both are known."""
    values = PUBLISHED["cifar100"]
    found: dict[str, float] = {}
    for method, name in CLAIMS.items():
        gains = [
            values[key].value - values["kd", *key[1:]].value
            for key in values
            if key[0] == method and ("kd", *key[1:]) in values
        ]
        found[name] = mean(gains) or 0.0
    return found


def main(root: Path) -> int:
    """Write docs/leaderboard.md under ``root``."""
    path = root / "docs" / "leaderboard.md"
    path.write_text(page(root), encoding="utf-8", newline="\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
