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
from tempering.reports.leaderboard import Leaderboard, cells, leaderboard, reading
from tempering.reports.paper_results import PUBLISHED
from tempering.reports.records import RunRecord, load_run

ROOT = Path(__file__).parents[1]
STAGES = {"grid": "The grid", "pilot": "The pilot"}
CLAIMS = {"dtkd": "DTKD", "lskd": "Standardized (LSKD)", "itkd": "ITKD", "ctkd": "CTKD"}
HEAD = """# Leaderboard: does a dynamic temperature beat the best fixed one?

Made by `make pages` from the records under `benchmarks/results/arena16`; do not edit. The question, the protocol and the
comparisons that count were [planned](decisions/arena-16.md) before the grid was run. To place a method of your own among
these, on the recorded seeds:

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
    scores = {split: run.score(f"{split}/accuracy") or 0.0 for split in ("test", "validation")}
    epochs = run.of("settings").get("epochs")
    return (
        f"The teacher is {run.of('student').get('name')} after {epochs} epochs, with a test accuracy of "
        f"{100 * scores['test']:.2f} % and a validation accuracy of {100 * scores['validation']:.2f} %; its weights are "
        "beside the records.\n"
    )


def _stage(folder: Path) -> list[str]:
    if not (folder / "plan.json").is_file():
        return ["Not started.\n"]
    plan = read(folder)
    runs = records(folder, plan)
    done = [run for run in runs if run.done]
    lines = [f"{plan.flags.get('epochs')} epochs; {len(done)} of {len(runs)} planned runs are done.\n"]
    if not any(run.label not in (CONTROL,) for run in done):
        return [*lines, "Too few to compare.\n"]
    board = leaderboard(done)
    return [*lines, _answer(board), _table(cells(board)), *(f"- {line}" for line in reading(board)), "", *_power(board)]


def _answer(board: Leaderboard) -> str:
    metric, better = board.comparison.metric, []
    for label, p in board.p.items():
        gap = board.comparison.arm(label).versus[board.best]
        if gap is not None and p <= 0.05 and gap.mean > 0:
            better.append(display_name(label))
    control, fewest = display_name(board.best), min((arm.n for arm in board.comparison.arms if arm.label in board.p), default=0)
    if better:
        return f"**Shown to be better than {control}: {', '.join(better)}.**\n"
    return f"**Of {len(board.p)} methods none is shown to beat {control} in {metric.name.replace('/', ' ')}, with {fewest} pairs or more.**\n"


def _table(rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'|'.join('---' for _ in rows[0])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows), ""])


def _power(board: Leaderboard) -> list[str]:
    """Return the seeds that half of what papers claim needs, at the spread of these runs."""
    if board.spread is None:
        return []
    rows: list[dict[str, str]] = []
    for name, claim in claims().items():
        needed = board.pairs_needed(claim / 2)
        rows.append({"claim over KD": name, "points": f"{100 * claim:.2f}", "pairs for half of it": str(needed)})
    for points in (0.5, 0.25, 0.1):
        needed = board.pairs_needed(points / 100)
        rows.append({"claim over KD": "a difference of", "points": f"{points:.2f}", "pairs for half of it": f"{needed} for all of it"})
    text = (
        f"Differences of pairs have a standard deviation of {100 * board.spread:.2f} points, pooled over methods. At that "
        "spread a paired t test shows, with a power of 80 % (claims: means over the published CIFAR-100 pairs, at the "
        "papers' own weights):\n"
    )
    return [text, _table(rows)]


def claims() -> dict[str, float]:
    """Return the mean published gain over KD, in [0, 1], over all pairs of networks for which both are known."""
    values = PUBLISHED["cifar100"]
    found: dict[str, float] = {}
    for method, name in CLAIMS.items():
        gains = [values[key].value - values["kd", *key[1:]].value for key in values if key[0] == method and ("kd", *key[1:]) in values]
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
