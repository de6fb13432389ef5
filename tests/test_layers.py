"""Imports point down, parts stay small, and nothing heavy or unsafe is loaded unasked: DESIGN sections 2 and 6."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "tempering"
FILES = sorted(PACKAGE.rglob("*.py"))
# what each part may import of tempering beside itself; a name covers what is inside it
BOTTOM = {"discovery", "fusable", "searching", "taps", "records", "checkpoints", "settings", "wandb_logger"}
BOTTOM |= {"compiling", "hardware", "utils"}
LAYERS = {part: set() for part in ("rows", *BOTTOM)} | {
    "data": {"rows"},
    "models": {"discovery"},
    "temperature": {"rows", "discovery", "fusable", "utils"},
    "answers": {"rows"},
    "buckets": {"rows"},
    "teachers": {"rows", "taps", "answers", "buckets", "compiling"},
    "tasks": {"rows", "taps", "discovery", "answers", "buckets", "models.boxes", "models.detector"},
    "audits": {"rows", "discovery", "taps", "temperature", "data.canaries"},
    "objectives": {"rows", "fusable", "temperature.base"},
    "kernels": {"rows", "answers", "fusable", "temperature", "objectives", "methods.base"},
    "methods": {"rows", "discovery", "temperature", "objectives", "teachers.base", "utils"},
    "reports": {"discovery"},
}
# the engine's files see base classes only; what distill() makes where nobody chose is named here
ENGINE = {"engine", "loop", "runtime", "ranks", "keeping", "selfcheck", "lossof"}
BASES = {"temperature.base", "methods.base", "tasks.base", "teachers.base"}
LAYERS["settings"] |= {"compiling"}
LAYERS |= {part: {"rows", *BOTTOM, *BASES, *ENGINE} for part in ENGINE}
LAYERS["engine"] |= {"tasks.classification", "teachers.live"}
LAYERS["lossof"] |= {"kernels"}  # loaded where rows are many
# methods from text, and the grid of runs; the arena sees records and processes, never a model
LAYERS |= {
    "specs": {"discovery", "methods", "temperature"},
    "arms": {"discovery", "methods", "specs"},
    "trained": {"loop"},
    "recipefile": {"discovery"},
    "auditing": {"audits", "checkpoints", "engine", "models", "recipefile", "records", "reports", "rows"}
    | {"teachers.base", "temperature"},
    "papers": {"discovery", "methods", "temperature"},
    "papersdoc": {"papers", "methods", "temperature", "reports", "tune_space"},
    "tune_space": {"arms", "discovery", "utils"},
    "tune_trial": {"recipefile", "searching"},
    "tune_study": {"reports", "tune_space"},
    "tune": {"arena", "arena_plan", "arena_view", "recipefile", "reports", "tune_space", "tune_study"},
    "tune_view": {"reports", "tune", "tune_space", "tune_study"},
    "arena_plan": {"arms", "reports"},
    "arena_view": {"arena_plan", "reports"},
    "arena": {"arena_plan", "arena_view", "recipefile", "reports"},
}
# the loop is somebody else's there: what the engine may see, and the tasks and the teacher of where nobody chose
LAYERS["adapters"] = LAYERS["engine"]
TOP = {"cli", "__main__"}  # may import everything; nothing imports them
# a copy with fields exchanged: dataclasses.replace is what knows their names; a mixin: its Trainer knows its own; and
# a function's double
SPREADS = {("rows", "with_"), ("adapters.huggingface", "__init__"), ("fusable", "call")}
HEAVY = {"lightning_fabric", "torchvision", "timm", "transformers", "datasets", "sklearn", "PIL", "matplotlib", "scipy"}
HEAVY |= {"torchmetrics", "tensorboard", "wandb", "jinja2", "lightning", "optuna", "kornia", "pyautoattack", "captum"}
HEAVY |= {"pycocotools"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Full names of imported modules; without ``lazy`` those of import time alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"line {node.lineno}: imports are absolute here"
            bare = node.module == "tempering"
            yield from (f"tempering.{alias.name}" for alias in node.names) if bare else (node.module,)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or not (typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from imports(node, lazy=lazy)


def inside(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def is_spread(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg is None and isinstance(node.value, ast.Name)


@pytest.fixture(params=[pytest.param(file, id=name_of(file)) for file in FILES])
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_imports_point_down(file: Path, tree: ast.Module) -> None:
    part = name_of(file).split(".")[0]
    if file == PACKAGE / "__init__.py":
        own = [name for name in imports(tree, lazy=False) if name.startswith(("tempering", "torch"))]
        assert not own, "the package itself imports nothing before it is named"
        return
    if part in TOP:
        return
    assert part in LAYERS, f"say in tests/test_layers.py what tempering/{part} may import"
    ours = {name.removeprefix("tempering.") for name in imports(tree) if name.startswith("tempering.")}
    up = sorted(name for name in ours - {"__version__"} if not inside(name, {part, *LAYERS[part]}))
    assert not up, f"{name_of(file)} imports {up}, which do not lie below it"


def test_nothing_heavy_is_imported_unasked(file: Path, tree: ast.Module) -> None:
    # these are themselves imported when they are asked for: their base classes are Fabric's and Lightning's
    if name_of(file) in ("wandb_logger", "adapters.lightning"):
        return
    first = {name.split(".")[0] for name in imports(tree, lazy=False)}
    assert not first & (HEAVY | ({"torch"} if name_of(file).startswith("reports") else set()))


def test_nothing_read_from_disk_is_unpickled(file: Path, tree: ast.Module) -> None:
    names = set(imports(tree))
    assert not names & {"dill", "joblib", "cloudpickle", "shelve"}
    assert "pickle" not in names or name_of(file) == "data.cifar", "its unpickler admits plain containers alone"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        said = ast.unparse(call)
        assert not said.startswith("torch.load(")
        assert not said.startswith(("np.load(", "numpy.load(")) or "allow_pickle=False" in said


def test_budget(file: Path, tree: ast.Module) -> None:
    """No file over 400 lines, no function over 60 beside its docstring, no keyword arguments passed on unseen."""
    length = len(file.read_text(encoding="utf-8").splitlines())
    assert length <= 400, "is it two things?"
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        doc = function.body[0] if ast.get_docstring(function) is not None else None
        lines = function.end_lineno - function.lineno + 1  # pyright: ignore[reportOptionalOperand]
        lines -= 0 if doc is None else doc.end_lineno - doc.lineno + 1  # pyright: ignore[reportOptionalOperand]
        assert lines <= 60, f"{function.name} has {lines} lines beside its docstring"
        # **values that a function itself looks at are fine; what it hands on unseen is not
        passed = {k.value.id for k in ast.walk(function) if is_spread(k)}
        taken = function.args.kwarg.arg if function.args.kwarg else None
        assert taken not in passed or (name_of(file), function.name) in SPREADS, f"{function.name} hands on **{taken}"


def test_the_nano_recipe_stands_alone() -> None:
    tree = ast.parse((ROOT / "tempering" / "recipes" / "nano.py").read_text(encoding="utf-8"))
    assert not [name for name in imports(tree) if name.split(".")[0] == "tempering"]


def test_what_loads_what() -> None:
    """In a fresh interpreter: the package loads no torch, nor do the reports; the core loads nothing heavy."""
    reports = [f"tempering.{name_of(f)}" for f in FILES if name_of(f).startswith("reports")]
    code = f"""
import importlib, sys
for name in {["tempering", *reports]!r}:
    importlib.import_module(name)
assert "torch" not in sys.modules, "torch"
import tempering.methods, tempering.tasks, tempering.teachers, tempering.engine
print(sorted({{name.split(".")[0] for name in sys.modules}} & set({sorted(HEAVY)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
