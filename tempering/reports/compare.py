"""Comparing arms: runs grouped by label, each arm beside its controls, and what a reader must know to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tempering.reports.intervals import Difference, deviation, difference, mean
from tempering.reports.paper_results import published
from tempering.reports.records import RunRecord, number
from tempering.utils.registry import lookup

CONTROL = "student alone"
MATCHED = "KD, weight-matched"
FRACTIONS = ("accuracy", "top5", "agreement", "ece", "fgsm", "pgd", "map", "map50", "map75")  # shown in percent
LOWER = ("loss", "ece", "perplexity", "nll")  # better when lower
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
        return self.key in LOWER or self.key.startswith("exposure")

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
        value, digits = (100 * value, 2) if self.fraction else (value, 4)
        text = f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no negative zero
        return text if signed else text.lstrip("+")


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
        reported: a published number of this arm on this data and pair of networks, and its source.
    """

    label: str
    runs: tuple[RunRecord, ...]
    last: Mapping[int, float]
    best: Mapping[int, float]
    open: Mapping[int, str]
    versus: Mapping[str, Difference | None]
    same_student: bool = True
    reported: tuple[float, str] | None = None

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

    def scores(self, metric: Metric) -> list[float]:
        """Another metric at the end of every finished run that has it, by seed."""
        return [v for run in self.counted if (v := run.score(metric.name)) is not None]

    def epochs(self, which: str) -> list[int]:
        """The epoch of the "last" or the "best" score of every finished run that says it, by seed."""
        told = [(run.of("result").get(which) or {}).get("epoch") for run in self.counted]
        return [epoch for epoch in told if isinstance(epoch, int)]


@dataclass(frozen=True)
class Comparison:
    """Arms side by side: the control first, then in the order in which they were begun.

    Attributes:
        metric: what is compared.
        arms: see ``Arm``.
        controls: labels of the arms that differences are taken to, at most two.
        main: the control that decides: the one asked for, else KD at the same total weights where it has a number,
            since to beat the student alone is not yet to beat plain distillation; None where no control has one.
        notes: what a reader must know before trusting it, in sentences.
        columns: other metrics that the records want shown beside it.
    """

    metric: Metric
    arms: tuple[Arm, ...]
    controls: tuple[str, ...]
    main: str | None
    notes: tuple[str, ...]
    columns: tuple[Metric, ...] = ()

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
            weight-matched" is another control where it is there.
        metric: as in "test/accuracy"; None takes the first of the records' own ``columns``, else the test accuracy, or
            what they have in its place.

    Raises:
        ValueError: for no runs, runs on different data, an arm of two students or two teachers, or a control that is
            not there.
    """
    if not runs:
        raise ValueError("there are no runs to compare. Give records: folders that runs wrote to, or packed cells.")
    runs = sorted(runs, key=lambda r: (str(r.facts.get("started")), r.label, r.seed, str(r.source)))
    _one_data_set(runs)
    _one_kind_an_arm(runs)
    measure = Metric(metric or _metric_of(runs))
    notes: list[str] = []
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    controls = _controls(groups, control)
    chosen = {
        label: _one_a_seed(groups[label], notes)
        for label in sorted(groups, key=lambda name: (name != (controls or ("",))[0], list(groups).index(name)))
    }
    arms = _arms(chosen, controls, measure)
    counted = [run for arm in arms if arm.same_student for run in arm.counted]
    numbered = [arm.label for arm in arms if arm.label in controls and arm.mean is not None]
    main = controls[0] if control is not None else next((c for c in reversed(controls) if c in numbered), None)
    notes += [*_mixed_arms(arms), *_fairness(counted), *_choice_of_best(counted)]
    columns = tuple(Metric(name) for name in _columns(runs) if name != measure.name)
    return Comparison(measure, arms, controls, main, tuple(notes), columns)


def _one_data_set(runs: Sequence[RunRecord]) -> None:
    seen: dict[tuple[str, str], RunRecord] = {}
    for run in runs:
        data = run.of("data")
        if data.get("name") or data.get("identity"):
            seen.setdefault((str(data.get("name")), str(data.get("identity"))), run)
    if len(seen) > 1:
        said = " and ".join(f"{name} (identity {key[:12]}) in {run.source}" for (name, key), run in seen.items())
        raise ValueError(f"runs on different data cannot be compared; got {said}. Give the runs of one data set.")


def _one_kind_an_arm(runs: Sequence[RunRecord]) -> None:
    """An arm trains one student; and one seed of it has one teacher."""
    seen: dict[tuple[object, ...], tuple[str, RunRecord]] = {}
    for run in runs:
        for part, key, place in (("student", "name", None), ("teacher", "identity", run.seed)):
            own = run.of(part).get(key)
            if own is None:
                continue
            other, first = seen.setdefault((run.label, part, place), (str(own), run))
            if other != str(own):
                raise ValueError(
                    f"the arm {run.label!r} has two {part}s: {_called(first, part)} in {first.source} and "
                    f"{_called(run, part)} in {run.source}. Give the runs of one {part}, or label them apart."
                )


def _called(run: RunRecord, part: str) -> str:
    net = run.of(part)
    return " ".join(str(net[key])[:20] for key in ("name", "identity") if net.get(key))


def _metric_of(runs: Sequence[RunRecord]) -> str:
    """The metric that these records are about: their first column, else accuracy, or what chose the best epoch; test
    before validation."""
    if columns := _columns(runs):
        return columns[0]
    for split in ("test", "validation"):
        for run in runs:
            scores = (run.of("result").get("last") or {}).get(split) or {}
            chosen_by = str(run.facts.get("best_by")).partition("/")[2]
            for key in ("accuracy", chosen_by, *sorted(scores)):
                if number(scores.get(key)) is not None:
                    return f"{split}/{key}"
    return "test/accuracy"


def _columns(runs: Sequence[RunRecord]) -> list[str]:
    """The metrics that the records name for a table, ``facts["columns"]``, in their order."""
    return list(dict.fromkeys(str(name) for run in runs for name in run.facts.get("columns") or ()))


def _controls(groups: Mapping[str, object], control: str | None) -> tuple[str, ...]:
    by_name = {label: label for label in groups}
    by_lower = {label.lower(): label for label in groups}
    first = by_lower.get(CONTROL) if control is None else lookup(control, by_name, "arm")
    wanted = (first, by_lower.get(MATCHED.lower()))
    return tuple(dict.fromkeys(label for label in wanted if label is not None))


def _one_a_seed(runs: Sequence[RunRecord], notes: list[str]) -> tuple[RunRecord, ...]:
    """One run a seed: a finished one before an unfinished one, then the one begun last."""
    by_seed: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda r: (r.done, str(r.facts.get("started")), str(r.source))):
        other = by_seed.get(run.seed)
        # a run and the cell it was packed into are one run
        if other and run.done == other.done and run.facts.get("started") != other.facts.get("started"):
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
    own_runs = [run for runs in chosen.values() if net(runs) == own for run in runs]
    seeds = {run.seed for run in own_runs}
    arms = []
    for label, runs in chosen.items():
        last, same = values(runs, "last"), net(runs) == own
        there = {run.seed: f"no {metric.name}" if run.status == "done" else run.status for run in runs}
        wanted = sorted(seeds if same else {run.seed for run in runs})
        missing = {seed: there.get(seed, NOT_RUN) for seed in wanted if seed not in last}
        versus = {c: difference(last, values(chosen[c], "last")) for c in controls if c != label and same}
        reported = _reported(runs, _teachers(runs) or _teachers(own_runs), metric)
        arms.append(Arm(label, runs, last, values(runs, "best"), missing, versus, same, reported))
    return tuple(arms)


def _teachers(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(str(name) for run in runs if (name := run.of("teacher").get("name"))))


def _reported(runs: Sequence[RunRecord], teachers: Sequence[str], metric: Metric) -> tuple[float, str] | None:
    """What a record carries as ``facts["reported"]`` = {"value", "source"}, else what is known of its pair of nets."""
    for run in runs:
        value = number(run.of("reported").get("value"))
        if value is not None:
            return value, str(run.of("reported").get("source") or "no source given")
    data, student = (str(runs[0].of(part).get("name")) for part in ("data", "student"))
    if metric.name != "test/accuracy" or len(teachers) != 1:
        return None
    return published(runs[0].label, teachers[0], student, data)


def _mixed_arms(arms: Sequence[Arm]) -> list[str]:
    said = []
    for arm in arms:
        if len({str(run.facts.get("method")) for run in arm.runs}) > 1:
            said.append(f"Runs labeled {arm.label} do not share one method; their mean says little.")
        if not arm.same_student:
            said.append(f"{arm.label} trains another network: it is in the table alone, without differences.")
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
