"""Everything runs on a device, with the CPU's numbers; the host waits for it as often as ``host_reads.json`` allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.forked import run_parts
from tests.lazy_modules import needs
from tests.paths import ROOT

pytestmark = [
    *(needs(package) for package in ("transformers", "accelerate", "lightning")),
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch has one accelerator in a process, here CUDA"),
]
BUDGET = ROOT / "tests" / "host_reads.json"
PATHS = ("contract", "classification", "language", "generation", "detection", "teachers", "steps", "audits", "adapters")


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[int, str, str]]:
    """Every part in a process of its own: the device is registered before the first backward pass."""
    code = {name: f"from tests.simulated import main; main({name!r})" for name in (*PATHS, "planted", "rules")}
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "t5")]
    slow = ["tests.simulated", *models, "lightning.pytorch", "lightning_fabric"]
    return run_parts(code, [*slow, "torchmetrics.functional.classification"])


def result(parts: dict[str, tuple[int, str, str]], name: str) -> Any:
    code, out, err = parts[name]
    assert not code, err[-3000:]
    return json.loads(out)


@pytest.mark.parametrize("name", PATHS)
def test_the_host_waits_for_a_device_no_more_often_than_allowed(
    parts: dict[str, tuple[int, str, str]], name: str
) -> None:
    """Per call of a method and per step of a run, without logging; numbers are the CPU's, or the part fails."""
    found: dict[str, dict[str, float]] = result(parts, name)
    allowed = json.loads(BUDGET.read_text()).get(name, {})
    grown = {path: places for path, places in found.items() if sum(places.values()) > allowed.get(path, 0)}
    assert not grown, f"more reads by the host than {BUDGET.name} has: {json.dumps(grown, indent=1)}"


def test_a_missing_device_and_a_read_are_named_by_their_line(parts: dict[str, tuple[int, str, str]]) -> None:
    found = result(parts, "planted")
    lines = (ROOT / "tests" / "simulated.py").read_text().splitlines()
    error, (read,) = found.pop("error"), found
    for said, wanted in ((error.split(",")[2], "torch.ones(len(rows))"), (read, "float(rows.student.max())")):
        assert wanted in lines[int(said.split("simulated.py:")[1].split()[0]) - 1], said
    assert "Expected all tensors to be on the same device" in error and found == {read: "1"}


def test_the_device_keeps_the_rules_of_one(parts: dict[str, tuple[int, str, str]]) -> None:
    found = result(parts, "rules")
    assert found == {
        "copy to the device": 1,
        "_local_scalar_dense": 1,
        "boolean mask": 1,
        "nonzero": 1,
        "copy to the host": 1,
    }
