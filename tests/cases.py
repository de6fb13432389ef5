"""Parametrize inside one test: cheaper than a test per value; all cases run, and every one that fails is listed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

Test = Callable[..., None]
Ids = Callable[[Any], Any] | Sequence[str] | None


def seed() -> None:
    """Seed all global random number generators with 0."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats tracebacks for absent devices: a millisecond
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


def each(names: str | Sequence[str], values: Iterable[Any], ids: Ids = None) -> Callable[[Test], Test]:
    """Like ``pytest.mark.parametrize``, but loop over the values inside one test."""
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [tuple(value) if len(split) > 1 else (value,) for value in values]
    if ids is None or callable(ids):
        said = [", ".join(f"{n}={(ids or repr)(v)}" for n, v in zip(split, row, strict=True)) for row in rows]
    else:
        said = list(ids)
    cases = [(name, dict(zip(split, row, strict=True))) for name, row in zip(said, rows, strict=True)]

    def decorate(test: Test) -> Test:
        def run(**fixtures: Any) -> None:
            run_cases(test, cases, fixtures)

        return with_arguments(test, run, without=split)

    return decorate


def with_arguments(test: Test, run: Test, *, without: Iterable[str] = (), extra: Sequence[str] = ()) -> Test:
    """``run`` in place of ``test``: pytest sees the test's arguments, some left out and some added."""
    wrapped = functools.wraps(test)(run)
    taken = set(without)
    kept = [p for p in inspect.signature(test).parameters.values() if p.name not in taken]
    kept += [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in extra]
    vars(wrapped)["__signature__"] = inspect.Signature(kept)
    return wrapped


def run_cases(test: Test, cases: Iterable[tuple[str, Mapping[str, Any]]], fixtures: Mapping[str, Any]) -> None:
    """Run the test on every case from the same seed, then raise all failures together, each named."""
    failed: list[tuple[str, Exception]] = []
    skipped: list[str] = []
    count = 0
    for count, (name, values) in enumerate(cases, 1):
        seed()
        try:
            with fresh(fixtures, count) as own:
                test(**own, **values)
        except pytest.skip.Exception as error:
            skipped.append(f"{name}: {error}")
        except (Exception, pytest.fail.Exception) as error:
            plain = error if isinstance(error, Exception) else AssertionError(str(error))
            plain.add_note(f"case: {name}")
            failed.append((name, plain))
    assert count, "no cases"
    if failed:
        names = "; ".join(name for name, _ in failed)
        raise ExceptionGroup(f"{len(failed)} of {count} cases failed: {names}", [error for _, error in failed])
    if len(skipped) == count:
        pytest.skip("; ".join(skipped))


@contextlib.contextmanager
def fresh(fixtures: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """The fixtures as a test of its own would get them: an empty folder, nothing patched, nothing captured."""
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = own["tmp_path"] / f"case{number}"
        own["tmp_path"].mkdir()
    for name in {"capsys", "capfd"} & set(own):
        own[name].readouterr()
    if "monkeypatch" not in own:
        yield own
        return
    with pytest.MonkeyPatch.context() as own["monkeypatch"]:
        yield own
