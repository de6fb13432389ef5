"""Compare methods: group runs by label, take differences to the controls, and collect caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tempering.reports.intervals import Difference, deviation, difference, mean
from tempering.reports.paper_results import published
from tempering.reports.records import RunRecord, number
from tempering.utils.registry import lookup
from tempering.utils.text import counted, printable

CONTROL = "student alone"
MATCHED = "KD, weight-matched"
DISPLAY_NAMES = {MATCHED: "KD, equal weights"}  # labels in records are keys; these are shown to readers
FRACTIONS = ("accuracy", "top5", "agreement", "ece", "fgsm", "pgd", "map", "map50", "map75")  # shown in percent
LOWER = ("loss", "ece", "perplexity", "nll")  # better when lower
NOT_RUN = "not run"
# settings in which the runs of a table may differ
NO_DIFFERENCE = (
    "seed",
    "out",
    "quiet",
    "resume",
    "examples",
    "log_every",
    "keep",
    "checkpoint_every",
    "selfcheck",
    "skip_checks",
)


@dataclass(frozen=True)
class Metric:
    """A metric such as "test/accuracy", and how its values are formatted."""

    name: str

    @property
    def key(self) -> str:
        """Return the metric without its split."""
        return self.name.partition("/")[2]

    @property
    def fraction(self) -> bool:
        """Return whether it is in [0, 1] and shown in percent."""
        return self.key in FRACTIONS

    @property
    def lower(self) -> bool:
        """Return whether lower is better."""
        return self.key in LOWER or self.key.startswith("exposure")

    @property
    def unit(self) -> str:
        """Return " %" or an empty string."""
        return " %" if self.fraction else ""

    @property
    def step(self) -> str:
        """Return " points" or an empty string, the unit of differences."""
        return " points" if self.fraction else ""

    def show(self, value: float | None, *, signed: bool = False) -> str:
        """Format the value with 2 decimals in percent, or with 4."""
        if value is None:
            return "-"
        value, digits = (100 * value, 2) if self.fraction else (value, 4)
        text = f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no negative zero
        return text if signed else text.lstrip("+")


@dataclass(frozen=True)
class RunGroup:
    """The runs of one label, usually one method over several seeds.

    Attributes:
        label: label of the runs, as recorded.
        runs: one per seed, finished or not, sorted by seed.
        last: seed -> the metric at the end of the run; finished runs only.
        best: seed -> the metric at the epoch chosen by ``best_by``.
        open: seed -> why there is no value, for the seeds of this comparison.
        versus: control's label -> difference to it; None if there is none.
        same_student: whether it trains the control's network, so that a difference is due to the method.
        reported: published value of this method on this data and pair of networks, and its source.
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
    def name(self) -> str:
        """Return the label as shown to readers."""
        return display_name(self.label)

    @property
    def n(self) -> int:
        """Return the number of finished seeds."""
        return len(self.last)

    @property
    def mean(self) -> float | None:
        """Return the mean of the last values over seeds."""
        return mean(list(self.last.values()))

    @property
    def sd(self) -> float | None:
        """Return the sample standard deviation of the last values (n - 1); None for fewer than two."""
        return deviation(list(self.last.values()))

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """Return the finished runs."""
        return tuple(run for run in self.runs if run.seed in self.last)

    def result(self, key: str) -> float | None:
        """Return the mean over finished runs of an entry of the result, such as "step_ms"."""
        return mean([v for run in self.counted if (v := number(run.of("result").get(key))) is not None])

    def scores(self, metric: Metric) -> list[float]:
        """Return another metric at the end of every finished run that has it, by seed."""
        return [v for run in self.counted if (v := run.score(metric.name)) is not None]

    def epochs(self, which: str) -> list[int]:
        """Return the epoch of the "last" or the "best" score of every finished run that records it, by seed."""
        epochs = [(run.of("result").get(which) or {}).get("epoch") for run in self.counted]
        return [epoch for epoch in epochs if isinstance(epoch, int)]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs in order: the control first, then by start time.

    Attributes:
        metric: the metric to compare.
        groups: see ``RunGroup``.
        controls: labels of the methods that differences are taken to, at most two.
        main: the decisive control: the requested one, else KD with equal total weights if it has a value, since beating
            the student alone does not mean beating plain distillation; None if no control has a value.
        notes: caveats, in sentences.
        columns: further metrics that the records list for the table.
    """

    metric: Metric
    groups: tuple[RunGroup, ...]
    controls: tuple[str, ...]
    main: str | None
    notes: tuple[str, ...]
    columns: tuple[Metric, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Return all seeds of all methods."""
        return sorted({run.seed for group in self.groups for run in group.runs})

    def group(self, label: str) -> RunGroup:
        """Return the group with that label."""
        return next(group for group in self.groups if group.label == label)

    @property
    def ranked(self) -> list[RunGroup]:
        """Return methods with a value that train the control's network, best mean first."""
        scored = [group for group in self.groups if group.mean is not None and group.same_student]
        return sorted(scored, key=lambda group: (group.mean or 0.0) * (1 if self.metric.lower else -1))


def display_name(label: str) -> str:
    """Return the label of a method as shown to readers."""
    return DISPLAY_NAMES.get(label, printable(label))


def compare(runs: Sequence[RunRecord], control: str | None = None, *, metric: str | None = None) -> Comparison:
    """Group runs into methods by their label, and compare each to the controls.

    Args:
        control: label of the method to subtract; None uses "student alone" if present. A method labeled "KD,
            weight-matched" is a second control if present.
        metric: such as "test/accuracy"; None uses the first of the records' own ``columns``, else the test accuracy, or
            the metric they have instead.

    Raises:
        ValueError: if there are no runs, they use different data, a method has two students or two teachers, or the
            control does not exist.
    """
    if not runs:
        raise ValueError("there are no runs to compare. Pass records: folders of runs, or packed runs (.json).")
    runs = sorted(runs, key=lambda r: (str(r.facts.get("started")), r.label, r.seed, str(r.source)))
    _check_one_data_set(runs)
    _check_one_student(runs)
    measure = Metric(metric or _metric_of(runs))
    notes: list[str] = []
    by_label: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    controls = _controls(by_label, control)
    chosen = {
        label: _one_run_per_seed(by_label[label], notes)
        for label in sorted(by_label, key=lambda name: (name != (controls or ("",))[0], list(by_label).index(name)))
    }
    groups = _groups(chosen, controls, measure)
    counted = [run for group in groups if group.same_student for run in group.counted]
    numbered = [group.label for group in groups if group.label in controls and group.mean is not None]
    main = controls[0] if control is not None else next((c for c in reversed(controls) if c in numbered), None)
    notes += [*_mixed_groups(groups), *_fairness(counted), *_choice_of_best(counted)]
    columns = tuple(Metric(name) for name in _columns(runs) if name != measure.name)
    return Comparison(measure, groups, controls, main, tuple(notes), columns)


def _check_one_data_set(runs: Sequence[RunRecord]) -> None:
    first_runs: dict[tuple[str, str], RunRecord] = {}
    for run in runs:
        data = run.of("data")
        if data.get("name") or data.get("identity"):
            first_runs.setdefault((str(data.get("name")), str(data.get("identity"))), run)
    if len(first_runs) > 1:
        listing = " and ".join(
            f"{name} (identity {key[:12]}) in {run.source}" for (name, key), run in first_runs.items()
        )
        raise ValueError(f"runs on different data cannot be compared; got {listing}. Pass runs on one data set.")


def _check_one_student(runs: Sequence[RunRecord]) -> None:
    """Check that a method has one student, and each of its seeds one teacher."""
    first_values: dict[tuple[object, ...], tuple[str, RunRecord]] = {}
    for run in runs:
        for part, key, seed in (("student", "name", None), ("teacher", "identity", run.seed)):
            value = run.of(part).get(key)
            if value is None:
                continue
            other, first = first_values.setdefault((run.label, part, seed), (str(value), run))
            if other != str(value):
                raise ValueError(
                    f"the method {run.label!r} has two {part}s: {_describe(first, part)} in {first.source} and "
                    f"{_describe(run, part)} in {run.source}. Pass runs of one {part}, or give them different labels."
                )


def _describe(run: RunRecord, part: str) -> str:
    net = run.of(part)
    return " ".join(str(net[key])[:20] for key in ("name", "identity") if net.get(key))


def _metric_of(runs: Sequence[RunRecord]) -> str:
    """Return the metric of these records: their first column, else accuracy, or the one that chose the best epoch.

    The test split comes before the validation split.
    """
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
    """Return the metrics that the records list for a table, ``facts["columns"]``, in order."""
    return list(dict.fromkeys(str(name) for run in runs for name in run.facts.get("columns") or ()))


def _controls(by_label: Mapping[str, object], control: str | None) -> tuple[str, ...]:
    by_name = {label: label for label in by_label}
    by_lower = {label.lower(): label for label in by_label}
    first = by_lower.get(CONTROL) if control is None else lookup(control, by_name, "method")
    labels = (first, by_lower.get(MATCHED.lower()))
    return tuple(dict.fromkeys(label for label in labels if label is not None))


def _one_run_per_seed(runs: Sequence[RunRecord], notes: list[str]) -> tuple[RunRecord, ...]:
    """Keep one run per seed: prefer finished runs, then the one started last."""
    by_seed: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda r: (r.done, str(r.facts.get("started")), str(r.source))):
        other = by_seed.get(run.seed)
        # a run and its packed record are the same run
        if other and run.done == other.done and run.facts.get("started") != other.facts.get("started"):
            notes.append(
                f"{display_name(run.label)}, seed {run.seed}, was run more than once; the one started last "
                f"({run.name}) is shown."
            )
        by_seed[run.seed] = run
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _groups(
    chosen: Mapping[str, tuple[RunRecord, ...]], controls: tuple[str, ...], metric: Metric
) -> tuple[RunGroup, ...]:
    def values(runs: Sequence[RunRecord], which: str) -> dict[int, float]:
        scores = {run.seed: run.score(metric.name, which) for run in runs if run.done}
        return {seed: value for seed, value in scores.items() if value is not None}

    def net(runs: Sequence[RunRecord]) -> str:
        return str(runs[0].of("student").get("name"))

    nets = [net(runs) for runs in chosen.values()]
    student_name = net(chosen[controls[0]]) if controls else max(nets, key=nets.count)
    own_runs = [run for runs in chosen.values() if net(runs) == student_name for run in runs]
    seeds = {run.seed for run in own_runs}
    groups = []
    for label, runs in chosen.items():
        last, same = values(runs, "last"), net(runs) == student_name
        reasons = {run.seed: f"no {metric.name}" if run.status == "done" else run.status for run in runs}
        expected = sorted(seeds if same else {run.seed for run in runs})
        missing = {seed: reasons.get(seed, NOT_RUN) for seed in expected if seed not in last}
        versus = {c: difference(last, values(chosen[c], "last")) for c in controls if c != label and same}
        reported = _reported(runs, _teachers(runs) or _teachers(own_runs), metric)
        groups.append(RunGroup(label, runs, last, values(runs, "best"), missing, versus, same, reported))
    return tuple(groups)


def _teachers(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(str(name) for run in runs if (name := run.of("teacher").get("name"))))


def _reported(runs: Sequence[RunRecord], teachers: Sequence[str], metric: Metric) -> tuple[float, str] | None:
    """Return a record's ``facts["reported"]`` = {"value", "source"}, else the published value for its networks."""
    for run in runs:
        value = number(run.of("reported").get("value"))
        if value is not None:
            return value, str(run.of("reported").get("source") or "no source given")
    data, student = (str(runs[0].of(part).get("name")) for part in ("data", "student"))
    if metric.name != "test/accuracy" or len(teachers) != 1:
        return None
    return published(runs[0].label, teachers[0], student, data)


def _mixed_groups(groups: Sequence[RunGroup]) -> list[str]:
    sentences = []
    for group in groups:
        if len({str(run.facts.get("method")) for run in group.runs}) > 1:
            sentences.append(f"Runs labeled {group.name} do not share one method; their mean is not meaningful.")
        if not group.same_student:
            sentences.append(f"{group.name} trains another network: it is in the table only, without differences.")
    return sentences


def _fairness(runs: Sequence[RunRecord]) -> list[str]:
    """Return sentences on what the runs share, do not share, and do not record."""
    order = ("data", "networks", "settings", "versions", "kind of host")
    groups: dict[str, dict[str, list[str | None]]] = {group: {} for group in order}

    def add(group: str, name: str, value: object, *, needed: bool = True) -> None:
        if needed or value is not None:
            groups[group].setdefault(name, []).append(None if value is None else str(value))

    for run in runs:
        teacher = run.of("teacher")
        add("data", "data", run.of("data").get("identity") or run.of("data").get("name"))
        add("networks", "student", run.of("student").get("name"))
        add("networks", "teacher", teacher.get("identity"), needed=bool(teacher))
        add("versions", "commit", run.facts.get("commit"), needed=False)
        add("kind of host", "processor", run.of("host").get("gpu") or run.of("host").get("cpu"))
        # the first group is the student's; a method with parameters of its own adds others
        add("settings", "optimizer", next(iter(run.facts.get("optimizer") or []), None))
        for package, version in run.of("versions").items():
            add("versions", f"{package} version", version, needed=False)
        for name, value in run.of("settings").items():
            if name not in NO_DIFFERENCE:
                add("settings", name, value, needed=False)
    every = {name: values for members in groups.values() for name, values in members.items()}
    differing = sorted(name for name, values in every.items() if len({v for v in values if v is not None}) > 1)
    missing = [g for g, members in groups.items() if not members or any(None in values for values in members.values())]
    shared = [group for group in groups if group not in missing]
    sentences = []
    if differing:
        sentences.append(f"Not the same in all runs: {', '.join(differing)}.")
    elif len(runs) > 1 and shared:
        *first, last = shared
        names = f"{', '.join(first)} and {last}" if first else last
        rest = "; only the method differs." if not missing else "."
        sentences.append(f"All runs share {names}{rest}")
    if len(runs) > 1 and missing:
        sentences.append(f"Not recorded in all runs, so not compared: {', '.join(missing)}.")
    if dirty := sum(bool(run.facts.get("dirty")) for run in runs):
        sentences.append(f"Made with uncommitted changes: {dirty} of {counted(len(runs), 'run')}.")
    return sentences


def _choice_of_best(runs: Sequence[RunRecord]) -> list[str]:
    by = dict.fromkeys(str(run.facts["best_by"]) for run in runs if run.facts.get("best_by"))
    if any(name.startswith("test/") for name in by):
        return ['"Best" is the epoch that was best on the test split itself, so it is too high; "last" is not.']
    return [f'"Best" is the epoch chosen by {" and ".join(name.replace("/", " ") for name in by)}.'] if by else []
