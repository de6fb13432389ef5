"""Our losses are held to the invariants of tempering.conformance: each method, kernel, list and trainer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

import tests.quick_hypothesis  # noqa: F401
from tempering.conformance import Status, check
from tempering.conformance.adapters import of_method
from tempering.methods import METHODS, StepMethod
from tests.conformance_of_ours import DEFINED, LOSSES, METHOD_PROMISES, OTHERS

# what a promise that is taken back is about
WITHDRAWN = {
    "detached_scale": "slope",
    "identifies_teacher": "training ends at the teacher",
    "shift_invariant": "constant added to the logits",
    "class_order": "order of the classes",
    "row_order": "order of the rows",
}


@pytest.mark.parametrize("name", LOSSES)
def test_our_losses_conform(name: str) -> None:
    loss, kind, promises = LOSSES[name]
    report = check(loss, kind=kind, promises=promises, name=name, measure=False, examples=3)
    assert report.ok, report.table()
    at_least = {"logits": 17, "tokens": 26, "top_k": 8, "features": 9, "scores": 8}[kind]
    assert sum(r.status is Status.PASS for r in report.results) >= at_least, report.table()
    taken_back = [WITHDRAWN[key] for key in METHOD_PROMISES.get(name, {}) if key in WITHDRAWN]
    holds = [broken for broken in taken_back if report[broken].status is Status.PASS]
    if holds:  # three examples may miss it
        report = check(loss, kind=kind, promises=promises, name=name, measure=False, only=tuple(holds))
        holds = [broken for broken in holds if report[broken].status is Status.PASS]
    assert not holds, f"these promises hold, and are not to be taken back: {holds}"
    refused = {r.name for r in report.results if r.status is Status.NOT_APPLICABLE and "refused" in r.message}
    assert not refused - {"(B, T, V) as (N, V)", "padded vocabulary"}, report.table()


def test_every_method_of_rows_is_checked() -> None:
    of_rows = {name for name, kind in METHODS.items() if not issubclass(kind, StepMethod)} - set(OTHERS)
    assert of_rows <= set(LOSSES) and set(METHOD_PROMISES) <= of_rows
    objectives = {getattr(method, "objective", "kl") for method, _ in DEFINED.values()}
    assert objectives >= {"kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"}


def test_the_order_of_the_classes_matters_to_uskd_at_equal_predictions_only() -> None:
    uskd = of_method(METHODS["USKD"].example())
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in "st")
    labels, order = torch.tensor([0, 3, 5, 1]), torch.tensor([4, 2, 0, 5, 1, 3])
    moved = uskd(student[:, order], teacher[:, order], torch.argsort(order)[labels])
    torch.testing.assert_close(moved, uskd(student, teacher, labels), rtol=1e-6, atol=0.0)
