"""Comparing arms: mean, spread, and the difference to a control with what these seeds can say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tempering.discovery import pick
from tempering.reports.read import RunRecord, number

CONTROL = "student alone"
MATCHED = "KD, weight-matched"
FRACTIONS = ("accuracy", "top5", "agreement", "ece")  # shown in percent
LOWER = ("loss", "ece", "perplexity", "nll")  # better when lower
LEVEL = 0.95
NOT_RUN = "not run"


@dataclass(frozen=True)
class Metric:
    """What is compared, such as "test/accuracy", and how its numbers are written."""

    name: str

    @property
    def key(self) -> str:
        """The metric without its split."""
        return self.name.partition("/")[2]

    @property
    def fraction(self) -> bool:
        """Whether it lies in [0, 1] and is written in percent."""
        return self.key in FRACTIONS

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.key in LOWER

    @property
    def unit(self) -> str:
        """ " %" or nothing."""
        return " %" if self.fraction else ""

    @property
    def step(self) -> str:
        """ " points" or nothing: the unit of differences."""
        return " points" if self.fraction else ""

    def show(self, value: float | None, *, signed: bool = False) -> str:
        """The number with 2 decimals in percent, or with 4."""
        if value is None:
            return "-"
        text = f"{100 * value:+.2f}" if self.fraction else f"{value:+.4f}"
        return text if signed else text.lstrip("+")


@dataclass(frozen=True)
class Difference:
    """Arm minus control.

    Attributes:
        mean: the difference.
        half: half-width of its 95 % t interval, so the smallest difference these seeds could have shown; None where
            there are too few seeds for one.
        n: pairs, or the runs of the smaller arm where it is not paired.
        paired: whether runs of the same seed were subtracted; else it is Welch's interval of two independent means.
        each: seed -> its difference, where paired.
    """

    mean: float
    half: float | None
    n: int
    paired: bool
    each: Mapping[int, float] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Arm:
    """The runs of one label.

    Attributes:
        label: as the runs were named.
        runs: one a seed, finished or not, by seed.
        last: seed -> the metric at the end of the run; only finished runs are here.
        best: seed -> the metric at the epoch that ``best_by`` chose.
        open: seed -> why there is no number, for the seeds that this comparison has.
        versus: control's label -> difference to it; None where it cannot be had.
        same_student: whether it trains the control's network, so that a difference says something about the method.
    """

    label: str
    runs: tuple[RunRecord, ...]
    last: Mapping[int, float]
    best: Mapping[int, float]
    open: Mapping[int, str]
    versus: Mapping[str, Difference | None]
    same_student: bool = True

    @property
    def n(self) -> int:
        """Finished seeds."""
        return len(self.last)

    @property
    def mean(self) -> float | None:
        """Of the last values, over seeds."""
        return mean(list(self.last.values()))

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the last values (n - 1); None for fewer than two."""
        return deviation(list(self.last.values()))

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """The finished runs."""
        return tuple(run for run in self.runs if run.seed in self.last)

    def result(self, key: str) -> float | None:
        """Mean over finished runs of a number of the result, such as "step_ms"."""
        return mean([v for run in self.counted if (v := number(run.of("result").get(key))) is not None])


@dataclass(frozen=True)
class Comparison:
    """Arms side by side: the control first, then in the order in which they were begun.

    Attributes:
        metric: what is compared.
        arms: see ``Arm``.
        controls: labels of the arms that differences are taken to, at most two.
        notes: what a reader must know before trusting it, in sentences.
    """

    metric: Metric
    arms: tuple[Arm, ...]
    controls: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> list[int]:
        """All seeds of all arms."""
        return sorted({run.seed for arm in self.arms for run in arm.runs})

    def arm(self, label: str) -> Arm:
        """The arm of that label."""
        return next(arm for arm in self.arms if arm.label == label)

    @property
    def ranked(self) -> list[Arm]:
        """Arms of the control's network with a number, the best mean first."""
        there = [arm for arm in self.arms if arm.mean is not None and arm.same_student]
        return sorted(there, key=lambda arm: (arm.mean or 0.0) * (1 if self.metric.lower else -1))


def compare(runs: Sequence[RunRecord], control: str | None = None, *, metric: str | None = None) -> Comparison:
    """Runs grouped into arms by their label, each compared to the control.

    Args:
        control: label of the arm to subtract; None takes "student alone" where it is there. An arm "KD,
            weight-matched" is a second control where it is there.
        metric: as in "test/accuracy"; None takes the test accuracy, or what the records have in its place.

    Raises:
        ValueError: for no runs, runs on different data, or a control that is not there.
    """
    if not runs:
        raise ValueError("there are no runs to compare. Give records: folders that runs wrote to, or packed cells.")
    _one_data_set(runs)
    measure = Metric(metric or _metric_of(runs))
    notes: list[str] = []
    groups: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=lambda r: (str(r.facts.get("started")), r.label, r.seed, str(r.source))):
        groups.setdefault(run.label, []).append(run)
    controls = _controls(groups, control)
    chosen = {
        label: _one_a_seed(groups[label], notes)
        for label in sorted(groups, key=lambda name: (name != (controls or ("",))[0], list(groups).index(name)))
    }
    arms = _arms(chosen, controls, measure)
    counted = [run for arm in arms if arm.same_student for run in arm.counted]
    notes += [*_mixed_arms(arms), *_fairness(counted), *_choice_of_best(counted)]
    return Comparison(measure, arms, controls, tuple(notes))


def difference(arm: Mapping[int, float], control: Mapping[int, float]) -> Difference | None:
    """Arm minus control over seeds: paired where two seeds or more are in both, else Welch's; None where one is empty.

    Source: Welch (1947), "The generalization of Student's problem when several different population variances are
    involved", for the interval of unpaired seeds.
    """
    common = sorted(set(arm) & set(control))
    if len(common) >= 2 or (len(arm) == len(control) == len(common) == 1):
        each = {seed: arm[seed] - control[seed] for seed in common}
        gaps = list(each.values())
        spread = deviation(gaps)
        half = None if spread is None else _quantile(len(gaps) - 1) * spread / math.sqrt(len(gaps))
        return Difference(math.fsum(gaps) / len(gaps), half, len(gaps), True, each)
    a, b = list(arm.values()), list(control.values())
    if not a or not b:
        return None
    gap = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    sa, sb = deviation(a), deviation(b)
    n = min(len(a), len(b))
    if sa is None or sb is None:
        return Difference(gap, None, n, False)
    va, vb = sa**2 / len(a), sb**2 / len(b)
    if va + vb == 0:
        return Difference(gap, 0.0, n, False)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Difference(gap, _quantile(freedom) * math.sqrt(va + vb), n, False)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None of fewer than two."""
    if len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def _quantile(freedom: float) -> float:
    """Of Student's t distribution, two-sided at ``LEVEL``."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'tempering[report]'.") from error
    return float(t.ppf(0.5 + LEVEL / 2, freedom))


def _one_data_set(runs: Sequence[RunRecord]) -> None:
    seen: dict[tuple[str, str], RunRecord] = {}
    for run in runs:
        data = run.of("data")
        if data.get("name") or data.get("identity"):
            seen.setdefault((str(data.get("name")), str(data.get("identity"))), run)
    if len(seen) > 1:
        said = " and ".join(f"{name} (identity {key[:12]}) in {run.source}" for (name, key), run in seen.items())
        raise ValueError(f"runs on different data cannot be compared; got {said}. Give the runs of one data set.")


def _metric_of(runs: Sequence[RunRecord]) -> str:
    """The metric that these records are about: accuracy, or what chose the best epoch; test before validation."""
    for split in ("test", "validation"):
        for run in runs:
            scores = (run.of("result").get("last") or {}).get(split) or {}
            chosen_by = str(run.facts.get("best_by")).partition("/")[2]
            for key in ("accuracy", chosen_by, *sorted(scores)):
                if number(scores.get(key)) is not None:
                    return f"{split}/{key}"
    return "test/accuracy"


def _controls(groups: Mapping[str, object], control: str | None) -> tuple[str, ...]:
    by_name = {label: label for label in groups}
    by_lower = {label.lower(): label for label in groups}
    first = by_lower.get(CONTROL) if control is None else pick(control, by_name, "arm")
    wanted = (first, by_lower.get(MATCHED.lower()))
    return tuple(dict.fromkeys(label for label in wanted if label is not None))


def _one_a_seed(runs: Sequence[RunRecord], notes: list[str]) -> tuple[RunRecord, ...]:
    """One run a seed: a finished one before an unfinished one, then the one begun last."""
    by_seed: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda r: (r.done, str(r.facts.get("started")), str(r.source))):
        if run.seed in by_seed and (run.done == by_seed[run.seed].done):
            notes.append(
                f"{run.label}, seed {run.seed}, was run more than once; the one begun last ({run.name}) is shown."
            )
        by_seed[run.seed] = run
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _arms(chosen: Mapping[str, tuple[RunRecord, ...]], controls: tuple[str, ...], metric: Metric) -> tuple[Arm, ...]:
    def values(runs: Sequence[RunRecord], which: str) -> dict[int, float]:
        found = {run.seed: run.score(metric.name, which) for run in runs if run.done}
        return {seed: value for seed, value in found.items() if value is not None}

    def net(runs: Sequence[RunRecord]) -> str:
        return str(runs[0].of("student").get("name"))

    nets = [net(runs) for runs in chosen.values()]
    own = net(chosen[controls[0]]) if controls else max(nets, key=nets.count)
    seeds = {run.seed for runs in chosen.values() if net(runs) == own for run in runs}
    arms = []
    for label, runs in chosen.items():
        last, same = values(runs, "last"), net(runs) == own
        there = {run.seed: f"no {metric.name}" if run.status == "done" else run.status for run in runs}
        wanted = sorted(seeds if same else {run.seed for run in runs})
        missing = {seed: there.get(seed, NOT_RUN) for seed in wanted if seed not in last}
        versus = {c: difference(last, values(chosen[c], "last")) for c in controls if c != label and same}
        arms.append(Arm(label, runs, last, values(runs, "best"), missing, versus, same))
    return tuple(arms)


def _mixed_arms(arms: Sequence[Arm]) -> list[str]:
    said = []
    for arm in arms:
        if len({str(run.facts.get("method")) for run in arm.runs}) > 1:
            said.append(f"Runs labelled {arm.label} do not share one method; their mean says little.")
        if not arm.same_student:
            said.append(f"{arm.label} trains another network, so no difference to it is taken.")
    return said


def _fairness(runs: Sequence[RunRecord]) -> list[str]:
    """What the runs share, or what they do not, in a sentence."""
    seen: dict[str, set[str]] = {}

    def see(name: str, value: object) -> None:
        if value is not None:
            seen.setdefault(name, set()).add(str(value))

    for run in runs:
        see("student", run.of("student").get("name"))
        see("teacher", run.of("teacher").get("identity"))
        see("commit", run.facts.get("commit"))
        see("processor", run.of("host").get("gpu") or run.of("host").get("cpu"))
        # the first group is the student's; a method with parameters of its own adds others
        see("optimizer", next(iter(run.facts.get("optimizer") or []), None))
        for package, version in run.of("versions").items():
            see(f"{package} version", version)
        for name, value in run.of("settings").items():
            if name not in ("seed", "out", "quiet", "resume", "log_every", "keep", "checkpoint_every", "selfcheck"):
                see(name, value)
    apart = [name for name, values in sorted(seen.items()) if len(values) > 1]
    said = []
    if apart:
        said.append(f"Not the same in all runs: {', '.join(apart)}.")
    elif len(runs) > 1:
        said.append("All runs share data, networks, settings, versions and kind of host; what differs is the method.")
    if dirty := sum(bool(run.facts.get("dirty")) for run in runs):
        said.append(f"{dirty} of {len(runs)} runs were made from a tree with uncommitted changes.")
    return said


def _choice_of_best(runs: Sequence[RunRecord]) -> list[str]:
    by = dict.fromkeys(str(run.facts["best_by"]) for run in runs if run.facts.get("best_by"))
    if any(name.startswith("test/") for name in by):
        return ['"Best" is the epoch that was best on the test split itself, so it is too high; "last" is not.']
    return [f'"Best" is the epoch that {" and ".join(name.replace("/", " ") for name in by)} chose.'] if by else []
