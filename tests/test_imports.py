"""What is imported when: each check runs in a fresh interpreter, in which no other test has imported anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.test_layers import HEAVY, PACKAGE, Tree

FILES_OF_A_RUN = 60


def fresh(code: str, *args: object, cwd: Path | None = None) -> str:
    """What the code prints in an interpreter of its own."""
    call = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_package_and_the_reports_import_no_torch_and_the_core_nothing_heavy() -> None:
    reports = [f"tempering.{name}" for name in Tree(PACKAGE).files if name.startswith("reports")]
    code = f"""
import importlib, sys
for name in {["tempering", *reports]!r}:
    importlib.import_module(name)
assert "torch" not in sys.modules
import tempering.methods, tempering.tasks, tempering.teachers, tempering.training.distill
print(sorted({{name.split(".")[0] for name in sys.modules}} & set({sorted(HEAVY)!r})))
"""
    assert fresh(code) == "[]"


def test_every_name_of_a_stub_is_exported() -> None:
    """Packages whose __init__.pyi declares what they import when it is first named."""
    lazy = {f"tempering.{package}": sorted(names) for package, names in Tree(PACKAGE).lazy.items() if package and names}
    lazy = {name: names for name, names in lazy.items() if (ROOT / name.replace(".", "/") / "__init__.pyi").is_file()}
    assert len(lazy) >= 6
    code = f"""
from importlib import import_module
for package, names in {lazy!r}.items():
    module = import_module(package)
    missing = {{name for name in names if not hasattr(module, name)}} | (set(names) - set(dir(module)))
    assert not missing, (package, missing)
print("ok")
"""
    assert fresh(code) == "ok"


def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Files of this package that are imported before the first loss of a run of DTKD on digits."""
    pytest.importorskip("sklearn")
    code = """
import sys
from pathlib import Path
import tempering

class Stop(Exception): ...

def stop(step, loss):
    raise Stop

data = tempering.data.digits(batch_size=64)
student, teacher = (tempering.models.build(f"digits_{size}", classes=10, channels=1) for size in ("small", "large"))
how = {"epochs": 1, "validation": data.validation, "out": sys.argv[1], "quiet": True, "selfcheck": False}
try:
    task, method = tempering.tasks.Classification(), tempering.methods.DTKD()
    tempering.distill(student, teacher, data.train, method=method, task=task, on_step=stop, **how)
except Stop:
    assert "torchmetrics" not in sys.modules, "it is for scores alone"
    files = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    root = Path(tempering.__file__).parent
    print(*sorted(str(f.relative_to(root)) for f in files if f.is_relative_to(root)), sep="\\n")
"""
    files = fresh(code, tmp_path / "run", cwd=tmp_path).splitlines()
    assert "methods/logits/dtkd.py" in files and "training/selfcheck.py" in files
    assert len(files) <= FILES_OF_A_RUN, "\n".join([f"{len(files)} files", *files])


def test_the_run_command_imports_what_it_uses(tmp_path: Path) -> None:
    """Files of this package that `tempering run` has imported for the first loss of DTKD in the recipe digits."""
    pytest.importorskip("sklearn")
    (tmp_path / "first_loss.py").write_text("""
from dataclasses import replace
from pathlib import Path

from tempering import Experiment, TrainConfig
from tempering.recipes.digits import main as digits


def stop(step: int, loss: object) -> None:
    raise KeyboardInterrupt


def main(*, out: Path) -> Experiment:
    config = TrainConfig(epochs=1, quiet=True)
    return replace(digits(method="dtkd", teacher_epochs=1, out=out, config=config), on_step=stop)
""")
    code = """
import sys
from pathlib import Path
from tempering.cli.main import main

assert main(["run", "first_loss.py", "--out", sys.argv[1]]) == 130
files = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
root = Path(sys.modules["tempering"].__file__).parent
print(*sorted(str(f.relative_to(root)) for f in files if f.is_relative_to(root)), sep="\\n")
"""
    files = fresh(code, tmp_path / "runs" / "student", cwd=tmp_path).splitlines()
    assert list((tmp_path / "runs" / "teachers").glob("*/student.safetensors")), "the teacher is trained first"
    assert "methods/logits/dtkd.py" in files and "cli/main.py" in files and "recipes/digits.py" in files
    most = FILES_OF_A_RUN + 2  # the parts of the self-check, which are imported where it runs
    assert len(files) <= most, "\n".join([f"{len(files)} files", *files])
