"""Run the invariants on a loss: ``check``, and ``invariants`` for other test suites."""

from __future__ import annotations

import atexit
import copy
import functools
import math
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from tempering.conformance.definitions import DEFINITIONS, kl
from tempering.conformance.probe import NotApplicable, Probe, Violation
from tempering.conformance.promises import KINDS, Kind, Promises
from tempering.conformance.report import Report, Result, Status

SHRINKING_SECONDS = 5.0
"""How long a counterexample of one invariant is made smaller; a 25th of it where it is not promised."""


def check(
    loss: Callable[..., Any],
    *,
    kind: Kind = "logits",
    promises: Promises | None = None,
    name: str | None = None,
    only: tuple[str, ...] = (),
    examples: int | None = None,
    measure: bool = True,
    compile: bool | str = False,
    seconds: float | None = None,
) -> Report:
    """Check a distillation loss for the invariants of its kind.

    The loss is called as follows, and gets those of the arguments labels (or target), mask, temperature (or T),
    normalizer (or num_items_in_batch) and chunk_size that it has:

    ========== =======================================================================================
    kind       call
    ========== =======================================================================================
    "logits"   loss(student (N, C), teacher (N, C)), labels (N,) with -100, mask (N,) True for valid rows
    "tokens"   loss(student (B, T, V), teacher (B, T, V)), labels or mask (B, T)
    "top_k"    loss(student (N, V), values (N, K), indices (N, K)), see ``Promises.top_k_values``
    "features" loss(student (N, ...), teacher (N, ...))
    "scores"   loss(student (B, K), teacher (B, K)), scores of K candidates
    ========== =======================================================================================

    It returns a scalar, or a value per row; or a tuple whose first element that is, or a dict or object that names it
    loss. ``tempering.conformance.adapters`` converts other signatures.

    Args:
        loss: the loss.
        kind: its kind.
        promises: what its documentation says; None: an attribute ``promises`` of the loss, or nothing.
        name: its name in the report.
        only: names of invariants to check; (): all.
        examples: number of inputs per invariant, at most; None: as each sets it (1 to 12).
        measure: whether to measure memory and time.
        compile: whether to check torch.compile too. "aot_eager" compares the traced loss and its derived gradient, in
            seconds; True, the code that Inductor generates for it, in a minute.
        seconds: limit of the whole check; invariants that are left are reported as not checked. None: no limit. A
            single call of the loss is not interrupted.

    Raises:
        ValueError: for an unknown kind or invariant.
        ImportError: if hypothesis is not installed.
    """
    started, results = time.perf_counter(), {}
    probe, chosen = _prepare(loss, kind, promises, only)
    probe.compile = compile
    probe.deadline = started + seconds if seconds is not None else math.inf
    for invariant in chosen:
        results[invariant.name] = _result(invariant, probe, results, examples)
    with _quiet():
        runs = "runs" not in results or results["runs"].status is Status.PASS
        late = time.perf_counter() > probe.deadline
        facts = _describe(probe, measure) if runs and not late else {}
    if late:
        facts["stopped after seconds"] = seconds
    return Report(
        name=name or name_of(loss),
        kind=kind,
        results=list(results.values()),
        facts=facts,
        seconds=time.perf_counter() - started,
    )


def invariants(
    loss: Callable[..., Any], *, kind: Kind = "logits", promises: Promises | None = None, only: tuple[str, ...] = ()
) -> list[Callable[[], None]]:
    """Return one test per invariant that is promised, for ``pytest.mark.parametrize``.

    >>> @pytest.mark.parametrize("invariant", invariants(my_loss, kind="logits"))
    ... def test_my_loss(invariant):
    ...     invariant()

    Raises:
        ValueError: as ``check``.
    """
    probe, chosen = _prepare(loss, kind, promises, only)
    tests: list[Callable[[], None]] = []
    for invariant in chosen:
        if not _is_promised(invariant, probe) and not invariant.recognizes:
            continue

        def test(invariant: Any = invariant) -> None:
            result = _result(invariant, probe, {}, None)
            if result.status in (Status.FAIL, Status.ERROR):
                raise AssertionError(f"{result.name}: {result.message}. {result.sentence}\n{result.inputs_text()}")

        test.__name__ = invariant.name.replace(" ", "-")
        tests.append(test)
    return tests


def name_of(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__


def _prepare(loss: Any, kind: Kind, promises: Promises | None, only: tuple[str, ...]) -> tuple[Probe, list[Any]]:
    try:
        from tempering.conformance.checks import INVARIANTS
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError("conformance needs hypothesis: pip install 'tempering[conformance]'") from None
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if unknown := [name for name in only if name not in INVARIANTS]:
        raise ValueError(f"there is no invariant {unknown[0]!r}. There are: {', '.join(INVARIANTS)}.")
    declared: Promises = promises or getattr(loss, "promises", None) or Promises()
    with _quiet():
        probe = infer(Probe(loss, kind, declared))
    applicable = [
        i
        for i in INVARIANTS.values()
        if kind in i.kinds and i.applies(probe.promises) and (i.of_draws or not declared.sampled)
    ]
    # an invariant that explains others comes first
    ordered: list[Any] = []
    while applicable:
        names = {i.name for i in applicable}
        ready = [i for i in applicable if not names & set(i.after)]
        ordered += ready
        applicable = [i for i in applicable if i not in ready]
    return probe, [i for i in ordered if not only or i.name in only]


TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0, 0.5)
"""Looked for in a loss that has no argument for T and declares none, after 1."""


def infer(probe: Probe) -> Probe:
    """Return the probe with what its loss computes, where that is not declared: definition, T, divergence."""
    promises = probe.promises
    if promises.sampled:
        return probe
    if isinstance(promises.definition, str):
        return probe.having(**_of_definition(promises.definition, promises))
    if promises.definition is not None and probe.on_rows and promises.divergence is None:
        row = torch.tensor([[0.5, -1.0, 0.25]], dtype=torch.float64)
        value = probe.reference(row, row, torch.tensor([0]), probe.temperatures[0])
        return probe.having(divergence=bool(value.abs().max() < 1e-9))
    if promises.definition is not None or not probe.on_rows:
        return probe
    try:
        return _recognized(probe)
    except Exception:  # "runs" reports it
        return probe


def _recognized(probe: Probe) -> Probe:
    """The probe with the known definition that fits single rows, or with the fact that labels matter."""
    from tempering.conformance.checks import fits

    others = () if probe.temperature or probe.promises.temperature != 1.0 else TEMPERATURES
    for t in (probe.temperatures[0], *others):
        for name, function in DEFINITIONS.items():
            if fits(probe, function, t) is not None:
                return probe.having(definition=name, temperature=t, **_of_definition(name, probe.promises))
    if probe.labels and probe.promises.divergence is None:
        student, teacher = torch.tensor([[[0.5, -1.0, 0.25]], [[0.0, 1.0, 0.5]]], dtype=torch.float64)
        values = [float(probe(student, teacher, torch.tensor([label]))) for label in (0, 1)]
        if values[0] != values[1]:  # a term on labels is in it
            return probe.having(divergence=False)
    return probe


def _of_definition(name: str, promises: Promises) -> dict[str, Any]:
    """Whether a known definition is a divergence, and its minimum the teacher alone, unless that is declared."""
    divergence = promises.divergence if promises.divergence is not None else name != "cross_entropy"
    identifies = promises.identifies_teacher
    return {"divergence": divergence, "identifies_teacher": False if name == "cosine" else identifies}


def _is_promised(invariant: Any, probe: Probe) -> bool:
    return invariant.promised is None or bool(invariant.promised(probe.promises))


def _result(invariant: Any, probe: Probe, before: dict[str, Result], examples: int | None) -> Result:
    """Check one invariant, or say why not."""
    blocking = next(
        (
            n
            for n in invariant.after
            if n in before and before[n].status in (Status.FAIL, Status.ERROR, Status.EXPLAINED)
        ),
        None,
    )
    if blocking is not None:
        cause = before[blocking]
        origin = cause.message if cause.status is Status.EXPLAINED else f"see {blocking!r}"
        return Result(invariant.name, invariant.sentence, Status.EXPLAINED, origin)
    status, message, violation = _run(invariant, probe, min(examples or invariant.examples, invariant.examples))
    promised = _is_promised(invariant, probe)
    if violation is not None and violation.promised is not None:
        promised = violation.promised
    if status is Status.FAIL and not promised:
        status = Status.NOT_PROMISED
    result = Result(invariant.name, invariant.sentence, status, message)
    if violation is not None:
        result.expected, result.found, result.tensors = violation.expected, violation.found, violation.tensors
    return result


def _run(invariant: Any, probe: Probe, examples: int) -> tuple[Status, str, Violation | None]:
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from hypothesis.errors import Flaky, Unsatisfiable

    from tempering.conformance.checks.reductions import backend_of
    from tempering.conformance.draws import Draw

    refused: list[str] = []
    found: list[Violation] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        report_multiple_bugs=False,
    )
    @given(strategies.data())
    def run(data: Any) -> None:
        try:
            invariant.test(probe, Draw(data, probe))
        except NotApplicable as error:  # not raised: hypothesis would shrink it
            refused.append(str(error))
        except Violation as error:
            found.append(error)
            raise

    try:
        with _quiet(SHRINKING_SECONDS if _is_promised(invariant, probe) else SHRINKING_SECONDS / 25):
            run()
    except Violation as error:
        return Status.FAIL, str(error), error
    except (Flaky, Unsatisfiable) as error:
        if found:  # it did not come back: time ran out, or the loss is not deterministic
            return Status.FAIL, str(found[-1]), found[-1]
        return Status.ERROR, f"{type(error).__name__}: {str(error).splitlines()[0]}", None
    except Exception as error:
        return Status.ERROR, explain(error, probe), None
    if refused:
        return Status.NOT_APPLICABLE, refused[-1], None
    return Status.PASS, f"by {backend_of(probe)}" if invariant.name == "compile" else "", None


def explain(error: Exception, probe: Probe) -> str:
    """Say what was called, what it raised, and what to write instead."""
    text = f"{probe.last_call} raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200].rstrip('.')}."
    if isinstance(error, TypeError) and re.search(r"missing|unexpected keyword|positional argument", str(error)):
        return f"{text} Fix other arguments by functools.partial(loss, name=value), or adapt the call: lambda s, t: ..."
    if isinstance(error, AttributeError):
        return f"{text} For a loss of models or their outputs there is conformance.adapters.of_models."
    if re.search(r"(scalar|data) ?type|dtype", str(error)):
        return f"{text} For a loss of float32 logits alone: lambda s, t: loss(s.float(), t.float())."
    if isinstance(error, ValueError | RuntimeError | IndexError):
        shapes = "logits (B, T, V)" if probe.kind == "logits" else "logits (N, C)"
        other = "tokens" if probe.kind == "logits" else "logits"
        return f"{text} For a loss of {shapes}: kind={other!r}." if probe.kind in ("logits", "tokens") else text
    return text


@functools.cache
def _own_folder() -> str:
    """A folder for what hypothesis stores, until Python ends."""
    folder = tempfile.mkdtemp(prefix="tempering-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _quiet(shrinking: float = SHRINKING_SECONDS) -> Generator[None]:
    """Keep warnings, and the examples that hypothesis prints, off the terminal, and torch's random state as it was."""
    from hypothesis import configuration, reporting
    from hypothesis.internal.conjecture import engine

    state, limit = torch.random.get_rng_state(), engine.MAX_SHRINKING_SECONDS
    home = vars(configuration)["__hypothesis_home_directory"]
    try:
        with warnings.catch_warnings(), reporting.with_reporter(lambda text: None):
            warnings.simplefilter("ignore")
            configuration.set_hypothesis_home_dir(_own_folder())  # not .hypothesis in the working folder
            engine.MAX_SHRINKING_SECONDS = shrinking  # pyright: ignore  # 5 minutes otherwise, and no setting
            yield
    finally:
        engine.MAX_SHRINKING_SECONDS = limit
        configuration.set_hypothesis_home_dir(home)
        torch.random.set_rng_state(state)


def _describe(probe: Probe, measure: bool) -> dict[str, Any]:
    """Measure what the loss computes: definition, power of T, divisor of the sum over rows, cost."""
    from tempering.conformance.checks import fits

    definition = probe.promises.definition
    facts: dict[str, Any] = {"definition": definition if isinstance(definition, str | None) else "declared"}
    try:
        facts |= _cost(probe) if measure and probe.on_rows else {}
        if isinstance(definition, str) and probe.on_rows:
            function = DEFINITIONS[definition]
            base = fits(probe, function, probe.temperatures[0])
            if probe.temperature and base:
                at = fits(probe, function, 4.0)
                facts["power of T"] = (
                    None if at is None else round(torch.tensor(at / base).log().div(torch.tensor(4.0).log()).item(), 2)
                )
            facts["factor"] = None if base is None else round(base, 6)
    except Exception as error:
        facts["not measured"] = f"{type(error).__name__}: {str(error)[:100]}"
    return facts


def _cost(probe: Probe) -> dict[str, Any]:
    """Peak memory in logits tensors, and time over a plain KL divergence, for (128, 8192) float32 logits or smaller."""
    from tempering.conformance.memory import peak_bytes

    probe = copy.copy(probe)
    probe.copies = False
    generator = torch.Generator().manual_seed(0)
    # hidden states need a head of V x V, and lists are of all classes
    shape = (64, 512) if probe.kind == "top_k" or hasattr(probe.loss, "signature_of") else (128, 8192)
    student, teacher = (torch.randn(shape, generator=generator) for _ in "st")

    def plain() -> Any:
        return probe.differentiate(lambda x: kl(x, teacher, 1.0).mean(), student)

    def tried() -> Any:
        return probe.gradient(student, teacher)

    size = student.numel() * student.element_size()
    times: list[float] = []
    for run in (plain, tried):
        run()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {
        "peak memory in logits": round(peak_bytes(tried) / size, 1),
        "time over plain KL": round(times[1] / times[0], 2),
    }
