"""A method, a temperature policy and an audit are one new file each: found, listed, parsed, run and contract-tested.

The files are added to a copy of the package and of its tests, which runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

AUDIT = '''"""An audit that was added."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tempering.audits.base import Audit, Finding


class MyAudit(Audit):
    """How many parameters a model has, in a file of its own."""

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        counts = {side: sum(p.numel() for p in model.parameters()) for side, model in models.items()}
        return [Finding("parameters", side, float(count), "its parameters") for side, count in counts.items()]
'''
SPEC = "mymethod(soft=2, temperature=mypolicy(5))"


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with three new files, its tests and their settings; the method is KD's file, the policy Static's."""
    root = tmp_path_factory.mktemp("copied")
    for folder in ("tempering", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    methods, policies = root / "tempering" / "methods" / "logits", root / "tempering" / "temperature"
    kd, static = (methods / "kd.py").read_text(), (policies / "static.py").read_text()
    (methods / "mymethod.py").write_text(re.sub(r"\bKD\b", "MyMethod", kd))
    (policies / "mypolicy.py").write_text(re.sub(r"\bStatic\b", "MyPolicy", static))
    (root / "tempering" / "audits" / "myaudit.py").write_text(AUDIT)
    return root


def python(root: Path, *args: object) -> str:
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    call = [sys.executable, *map(str, args)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=root, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_found_by_name(copied: Path) -> None:
    code = f"""
import tempering, torch
from tempering.experiments.presets import method_of
from tempering.experiments.tune.space import space_of
from pathlib import Path
assert Path(tempering.__file__).parent == Path({str(copied)!r}) / "tempering"
assert tempering.methods.MyMethod is tempering.methods.METHODS["MyMethod"]
assert tempering.temperature.MyPolicy(2.0).tau == 2.0
method = method_of({SPEC!r})
assert (type(method).__name__, method.soft, method.temperature.tau) == ("MyMethod", 2, 5)
assert "soft" in str(space_of("mymethod", "", set()).dimensions)
batches = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
(finding,) = tempering.audits.MyAudit()(torch.nn.Linear(3, 2), None, batches)
assert finding.value == 8
"""
    python(copied, "-c", code)


def test_it_is_listed(copied: Path) -> None:
    words = python(copied, "-m", "tempering", "list").split()
    assert {"mymethod", "mypolicy", "myaudit"} <= set(words)


def test_it_is_parsed_from_the_command_line_and_trains(copied: Path) -> None:
    python(copied, "-m", "tempering", "new-recipe", "mine")
    flags = ("--epochs=1", "--teacher-epochs=2", "--threads=1", "--quiet", f"--method={SPEC}", "--out=run")
    python(copied, "-m", "tempering", "run", "mine.py", *flags)
    method = json.loads((copied / "run" / "facts.json").read_text())["method"]
    assert (method["name"], method["soft"], method["temperature"]) == ("MyMethod", 2, {"name": "MyPolicy", "tau": 5})


def test_it_is_contract_tested(copied: Path) -> None:
    """The contract's cases include both, and they pass."""
    tests = [f"tests/{file.name}" for file in sorted((copied / "tests").glob("test_contract*.py"))]
    pytest_ = ("-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k", "MyMethod or MyPolicy", "-rA", *tests)
    out = python(copied, *pytest_)
    passed = [line for line in out.splitlines() if line.startswith("PASSED")]
    assert sum("MyMethod" in line for line in passed) >= 10
    assert sum("MyPolicy" in line for line in passed) >= 3
