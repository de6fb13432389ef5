"""Tables of the evidence, made from records, for the page that `evidence.py` writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from budget import markdown

from tempering.experiments.compare import plan as compare_plan
from tempering.experiments.compare import status as compare_status
from tempering.experiments.compare.plan import Plan
from tempering.experiments.presets import MATCHED, method_of
from tempering.methods import DTKD, KD
from tempering.reports import figures, figures_temperature
from tempering.reports.compare import CONTROL, Comparison, RunGroup, compare
from tempering.reports.intervals import Difference, difference, mean
from tempering.reports.paper_results import published
from tempering.reports.records import RunRecord, load_run, number
from tempering.temperature import Sharpness, Static

TARGET, REST = "DKD, target only", "DKD, rest only"
# method, control, and the question that the difference answers
PLANNED = (
    ("DTKD published", MATCHED, "Does DTKD as released beat KD at equal weights?"),
    ("DTKD exact", MATCHED, "Does exact DTKD?"),
    ("DTKD exact", "DTKD published", "Is exact better than released?"),
    ("DTKD published", "KD", "The comparison of the authors"),
    (MATCHED, "KD", "The weights and the warm-up alone"),
    ("KD", CONTROL, "KD with its usual weights"),
    ("DTKD, dynamic term only", CONTROL, "The dynamic term and the labels alone"),
    ("DTKD, T_t and T_s alone", MATCHED, "Dynamic temperatures, rows weighted equally"),
    ("DTKD, scale T_t T_s alone", MATCHED, "Rows weighted by T_t T_s, fixed temperatures"),
    (f"{TARGET}, dynamic", TARGET, "Dynamic temperatures on target-only DKD"),
    (f"{REST}, dynamic", REST, "Dynamic temperatures on rest-only DKD"),
)
DEPTHS = (14, 20, 32, 44, 56, 110)
# published accuracies of our teachers' networks, trained without a teacher with the same recipe; none for resnet14
ELSEWHERE = {"resnet20": "69.06 (TTM's README)", "resnet56": "72.34 (TTM's README)"}


@dataclass(frozen=True)
class Grid:
    """One comparison: the folder's name, its plan, and its records."""

    name: str
    plan: Plan
    found: Comparison

    @property
    def title(self) -> str:
        """Length and networks, and the teacher's epochs if they are not the full recipe's."""
        said = self.plan.flags
        taught = said.get("teacher_epochs", "240")
        teacher = said.get("teacher", "?") + f" of {taught}" * (taught != "240")
        images = f", {said['subset']} images" if "subset" in said else ""
        return f"{said.get('epochs', '?')} epochs, {teacher} to {said.get('student', '?')}{images}"

    @property
    def done(self) -> int:
        """Cells with a result."""
        return sum(run.done for run in self.runs)

    @property
    def runs(self) -> list[RunRecord]:
        """All cells."""
        return [run for group in self.found.groups for run in group.runs]

    def gap(self, label: str, control: str, seeds: Collection[int] | None = None) -> Difference | None:
        """Method minus control over the seeds (of ``seeds``) that both have finished; None if there are none."""
        groups = {group.label: group.last for group in self.found.groups}
        a, b = groups.get(label, {}), groups.get(control, {})
        common = a.keys() & b.keys() & set(a if seeds is None else seeds)
        return difference({s: a[s] for s in common}, {s: b[s] for s in common})

    def has(self, *labels: str) -> bool:
        """Whether all these methods are planned."""
        return set(labels) <= {group.label for group in self.found.groups}


def grid_in(folder: Path) -> Grid | None:
    """The comparison in a folder; None if it was not started.

    Raises:
        ValueError: if a record was edited.
    """
    if not (folder / compare_plan.FILE).is_file():
        return None
    plan = compare_plan.read(folder)
    found = compare(compare_status.records(folder, plan), plan.control, metric="test/accuracy")
    return Grid(folder.name.removeprefix("evidence-"), plan, found)


def points(grid: Grid, gap: Difference) -> str:
    """A difference with the half-width of its interval."""
    show = grid.found.metric.show
    return show(gap.mean, signed=True) + ("" if gap.half is None else f" ± {show(gap.half)}") + " points"


def planned(grid: Grid) -> str:
    """The planned comparisons, with the smallest difference that these seeds could have shown."""
    groups, rows = {group.label: group for group in grid.found.groups}, []
    for label, control, question in PLANNED:
        if not grid.has(label, control):
            continue
        gap, theirs = grid.gap(label, control), _theirs(groups[label], groups[control])
        show = grid.found.metric.show
        value = "open" if gap is None else points(grid, gap).removesuffix(" points")
        least = show(gap.half) if gap and gap.half is not None else "-"
        pairs = f"{gap.n if gap else 0} of {len(grid.found.seeds)}"
        rows.append([question, f"{label} minus {control}", pairs, f"**{value}**" if gap and gap.shown else value])
        rows[-1] += [least, "-" if theirs is None else show(theirs, signed=True)]
    head = ["question", "difference", "seeds", "points", "smallest detectable", "authors' chart"]
    return markdown(head, rows, left=2) if rows else ""


def _theirs(group: RunGroup, control: RunGroup) -> float | None:
    """The authors' difference, with 240 epochs."""
    return group.reported[0] - control.reported[0] if group.reported and control.reported else None


def fixed_and_exact(grid: Grid) -> str:
    """Exact and fixed temperatures at the same weights, by tau; empty if a plan does not have both.

    Uses the seeds that all of them have finished. KD at the same total weights and warm-up is a fixed temperature.
    """
    show, rows, said = grid.found.metric.show, [], []
    for weights, exact, fixed in _places(grid):
        groups = [*exact.values(), *fixed.values()]
        seeds = sorted(set.intersection(*done)) if (done := [set(group.last) for group in groups if group.n]) else []
        score = {group.label: mean([group.last[seed] for seed in seeds]) if group.n else None for group in groups}
        whole = all(score[group.label] is not None for group in fixed.values())
        best = max(fixed, key=lambda tau: score[fixed[tau].label] or 0.0) if whole else None
        above = []
        for tau in sorted(set(fixed) & set(exact)):
            others = [fixed[tau], *([] if best is None else [fixed[best]])]
            gaps = [grid.gap(exact[tau].label, other.label, seeds) for other in others]
            above += [f"{tau:g}"] if best is not None and gaps[1] and gaps[1].mean > 0 else []
            texts = ["open" if gap is None else points(grid, gap).removesuffix(" points") for gap in gaps]
            scores = [score[group.label] for group in (exact[tau], fixed[tau])]
            texts = [*("open" if value is None else show(value) for value in scores), *texts]
            rows.append([weights, f"{tau:g}", *texts, *["open"] * (4 - len(texts))])
        if best is not None and any(score[group.label] is not None for group in exact.values()):
            where = f"at tau {', '.join(above)}" if above else "nowhere"
            said.append(
                f"- With weights {weights} the best fixed temperature is {best:g} ({show(score[fixed[best].label])} %, "
                f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}); exact is above it {where}."
            )
    if not rows:
        return ""
    head = ["dynamic, soft, hard", "tau", "exact (%)", "fixed (%)", "minus fixed at tau", "minus the best fixed"]
    return "\n\n".join([markdown(head, rows), *(["\n".join(said)] if said else [])])


def _places(grid: Grid) -> list[tuple[str, dict[float, RunGroup], dict[float, RunGroup]]]:
    """DTKD's weights, and its methods with exact and with fixed temperatures by tau, at least two fixed ones."""
    found: dict[tuple[float, float, float, float], tuple[dict[float, RunGroup], dict[float, RunGroup]]] = {}
    plain: list[tuple[KD, RunGroup]] = []
    for cell in grid.plan.cells:
        method, group = method_of(cell.method, cell.temperature), grid.found.group(cell.label)
        if not isinstance(method, DTKD | KD):
            continue
        policy = method.temperature
        if isinstance(method, KD):
            plain += [(method, group)] if isinstance(policy, Static) else []
        elif isinstance(policy, Static) or (isinstance(policy, Sharpness) and policy.solve == "exact"):
            place = found.setdefault((method.dynamic, method.soft, method.hard, method.warmup), ({}, {}))
            place[isinstance(policy, Static)][policy.tau] = group
    for (dynamic, soft, hard, warmup), (_, fixed) in found.items():
        for method, group in plain:
            if (method.soft, method.hard, method.warmup) == (dynamic + soft, hard, warmup):
                fixed.setdefault(method.temperature.tau, group)
    return [(f"{d:g}, {s:g}, {h:g}", *groups) for (d, s, h, _), groups in found.items() if len(groups[1]) > 1]


def temperatures(grid: Grid) -> str:
    """First and last temperatures of both models, and those of the hardest and the easiest fifth of the test images."""
    rows = []
    for group in grid.found.groups:
        if not group.n or not figures_temperature.is_dynamic(group.counted):
            continue
        moved = []
        for side in ("T_teacher", "T_student"):
            parts = ("mean", "p5", "p95")
            lines = [figures.curve(group.counted, "steps", "step", figures.inside(side, part)) for part in parts]
            ends = [f"{line.y[-1]:.2f}" for line in lines if line is not None]
            moved.append("-" if lines[0] is None else f"{lines[0].y[0]:.2f}, {ends[0]} ({' to '.join(ends[1:])})")
        rows.append([group.label, *moved, *(_of_fifth(group, i) for i in (0, -1))])
    head = ["method", "T_t first, last (5 to 95 %)", "T_s", "T_t, T_s of the hardest fifth", "of the easiest"]
    return markdown(head, rows) if rows else ""


def _of_fifth(group: RunGroup, i: int) -> str:
    found = [((run.analysis or {}).get("temperatures") or {}).get("by_difficulty") for run in group.counted]
    bins = [part[i] for part in found if part]
    sides = [mean([v for b in bins if (v := number(b.get(side))) is not None]) for side in ("T_teacher", "T_student")]
    return ", ".join("-" if value is None else f"{value:.2f}" for value in sides)


def teachers(folder: Path, grids: Sequence[Grid]) -> str:
    """Our teachers next to published accuracies: packed runs, and teachers that only the records of students name."""
    rows: dict[tuple[str, float], list[str]] = {}
    for path in sorted((folder / "records").glob("*.json")):
        run = load_run(path)
        last, best = (run.score("test/accuracy", which) for which in ("last", "best"))
        epoch, whole = ((run.of("result").get(which) or {}).get("epoch") for which in ("best", "last"))
        if last is not None:
            row = [f"{100 * last:.2f}", "-" if best is None else f"{100 * best:.2f}", f"{epoch} of {whole}"]
            rows[str(run.of("student").get("name")), last] = row
    for grid in grids:
        for run in grid.runs:
            taught = run.of("teacher")
            scores = taught.get("scores")
            last = number((scores.get("test") or {}).get("accuracy")) if isinstance(scores, dict) else None
            if last is not None:
                epochs = grid.plan.flags.get("teacher_epochs") or grid.plan.flags.get("epochs", "?")
                rows.setdefault((str(taught.get("name")), last), [f"{100 * last:.2f}", "-", f"- of {epochs}"])
    if not rows:
        return "No teacher has been trained yet."
    head = ["teacher", "test accuracy, last (%)", "best (%)", "best epoch", "reported elsewhere (%)"]
    return markdown(head, [[name, *row, ELSEWHERE.get(name, "-")] for (name, _), row in rows.items()])


def authors() -> str:
    """The authors' chart as a table."""
    rows = []
    for depth in DEPTHS:
        labels = (CONTROL, "KD", "DTKD published")
        found = [published(label, f"resnet{depth}", "resnet8", "cifar100") for label in labels]
        alone, kd, dtkd = (100 * x.value if x else float("nan") for x in found)
        rows.append([f"resnet{depth}", *(f"{v:.2f}" for v in (alone, kd, dtkd)), f"{dtkd - kd:+.2f}"])
    return markdown(["teacher", "student alone (%)", "KD (%)", "DTKD (%)", "DTKD minus KD (points)"], rows)
