"""Architecture: imports point down and form no cycle, and nothing heavy or unsafe is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "tempering"
TOP_LEVEL = {"__init__", "__main__", "_version", "rows", "objectives"}
# a package imports only from lower floors; CONTRIBUTING.md says what each is for
FLOORS = {
    "_version": 0,
    "utils": 1,
    "rows": 1,
    "testing": 1,
    "temperature": 2,
    "models": 2,
    "data": 2,
    "reports": 2,
    "teachers": 2,
    "objectives": 3,
    "rollouts": 3,
    "audits": 3,
    "tasks": 4,
    "methods": 4,
    "kernels": 5,
    "conformance": 6,
    "training": 6,
    "": 6.5,  # `from tempering import distill`: the package's own names, from training and below
    "experiments": 7,
    "integrations": 7,
    "recipes": 8,
    "export": 8,
    "cli": 9,
    "__main__": 10,
}
HEAVY = {"lightning_fabric", "torchvision", "timm", "transformers", "datasets", "sklearn", "PIL", "matplotlib", "scipy"}
HEAVY |= {"mlflow", "trackio"}
HEAVY |= {"torchmetrics", "tensorboard", "wandb", "jinja2", "lightning", "optuna", "kornia", "pyautoattack", "captum"}
HEAVY |= {"pycocotools", "faster_coco_eval", "onnxscript", "onnxruntime", "torchao", "executorch", "huggingface_hub"}
# they subclass Fabric's logger and Lightning's module, and are imported where those are asked for
HEAVY_BASES = re.compile(r"training\.trackers|integrations\.lightning")


@dataclass(frozen=True)
class Import:
    module: str  # absolute, such as "tempering.rows" or "torch"
    names: tuple[str, ...]  # of `from module import names`; () for `import module`
    line: int
    eager: bool  # at import time; not inside a function, nor for type checkers only


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(node: ast.AST, *, eager: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, (), child.lineno, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield Import(module, tuple(alias.name for alias in child.names), child.lineno, eager)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        later = typing_only or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, eager=eager and not later)


class Tree:
    """The files of a package, and which of them imports which."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {self.name(file): file for file in sorted(root.rglob("*.py"))}
        self.lazy = {name: self.lazy_names(name) for name, file in self.files.items() if file.stem == "__init__"}

    def name(self, file: Path) -> str:
        """The module's name without the leading package: "methods.base"; "" for the package itself."""
        return ".".join(file.relative_to(self.root).with_suffix("").parts).removesuffix("__init__").removesuffix(".")

    def lazy_names(self, package: str) -> dict[str, str]:
        """Name -> module, for what a package imports when it is first named: by its stub, or by its Registry."""
        folder, found = self.files[package].parent, {}
        for node in ast.walk(parse(folder / "__init__.pyi")) if (folder / "__init__.pyi").is_file() else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                found |= {alias.name: ".".join(filter(None, (package, node.module))) for alias in node.names}
        if package and "Registry(" in self.files[package].read_text(encoding="utf-8"):
            for file in folder.rglob("*.py"):
                classes = (node.name for node in parse(file).body if isinstance(node, ast.ClassDef))
                found |= dict.fromkeys(classes, self.name(file))
        return found

    def targets(self, name: str) -> Iterator[tuple[str, Import]]:
        """Files of this package that a file imports, lazily exported names followed to where they are defined."""
        for found in imports(parse(self.files[name])):
            head, _, module = found.module.partition(".")
            if head != self.root.name:
                continue
            if not found.names:
                yield module, found
            for part in found.names:
                full = f"{module}.{part}".removeprefix(".")
                yield (full if full in self.files else self.lazy.get(module, {}).get(part, module)), found

    def upward(self) -> list[str]:
        """Every import that does not point to a lower floor."""
        found = []
        for name in self.files:
            part = name.split(".")[0]
            if part == "":
                continue  # it names what it imports when it is asked for
            if part not in FLOORS:
                found.append(f"{self.files[name]}: {part} has no floor in FLOORS")
                continue
            for target, where in self.targets(name):
                other = target.split(".")[0]
                if other != part and FLOORS.get(other, 99) >= FLOORS[part]:
                    found.append(f"{self.files[name]}:{where.line}: {part} imports {target or self.root.name}")
        return found

    def cycles(self) -> list[list[str]]:
        """Groups of files that import one another: strongly connected components, by Tarjan's algorithm."""
        graph = {name: sorted({target for target, _ in self.targets(name)} - {name}) for name in self.files}
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        found: list[list[str]] = []

        def visit(name: str) -> None:
            index[name] = low[name] = len(index)
            stack.append(name)
            for target in graph.get(name, ()):
                if target not in index:
                    visit(target)
                if target in stack:
                    low[name] = min(low[name], low[target])
            if low[name] == index[name]:
                group = stack[stack.index(name) :]
                del stack[stack.index(name) :]
                found.extend([sorted(group)] if len(group) > 1 else [])

        for name in graph:
            if name not in index:
                visit(name)
        return found


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(PACKAGE)


def lines(offenders: list[str]) -> str:
    return "\n".join(["", *offenders])


def test_imports_point_down(tree: Tree) -> None:
    offenders = tree.upward()
    assert not offenders, lines(offenders)


def test_no_files_import_one_another(tree: Tree) -> None:
    offenders = [" <-> ".join(group) for group in tree.cycles()]
    assert not offenders, lines(offenders)


def test_planted_offenders_are_found(tmp_path: Path) -> None:
    """An upward import and a cycle, both inside functions, one through a lazily exported name."""
    root = tmp_path / "tempering"
    files = {
        "__init__.py": "",
        "rows.py": "def f():\n    from tempering.methods.kd import KD\n",
        "methods/__init__.py": "from tempering.utils.registry import Registry\nMETHODS = Registry(1, 2, 3)\n",
        "methods/kd.py": "class KD:\n    from tempering.methods.dkd import DKD\n",
        "methods/dkd.py": "class DKD: ...\ndef f():\n    from tempering.methods import KD\n",
        "tasks/__init__.py": "import lazy_loader\n",
        "tasks/__init__.pyi": "from .one import One as One\n",
        "tasks/one.py": "import tempering.rows\nfrom tempering.tasks.two import Two\n",
        "tasks/two.py": "def f():\n    from tempering.tasks import One\n",
        "utils/__init__.py": "",
        "utils/registry.py": "import tempering\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    tree = Tree(root)
    assert tree.upward() == [
        f"{root / 'rows.py'}:2: rows imports methods.kd",
        f"{root / 'utils' / 'registry.py'}:1: utils imports tempering",
    ]
    assert sorted(tree.cycles()) == [["methods.dkd", "methods.kd"], ["tasks.one", "tasks.two"]]


def test_top_level() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == TOP_LEVEL
    parts = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    assert parts | TOP_LEVEL - {"__init__"} == set(FLOORS) - {""}, "every package has a floor, and no floor is empty"


def test_contributing_shows_the_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)}
    assert shown == {name: floor for name, floor in FLOORS.items() if name not in ("", "_version", "__main__")}


def test_imports_are_absolute(tree: Tree) -> None:
    found = ((file, where) for file in tree.files.values() for where in imports(parse(file)))
    offenders = [f"{file}:{where.line}" for file, where in found if where.module.startswith(".")]
    assert not offenders, lines(offenders)


def test_nothing_heavy_is_imported_at_import_time(tree: Tree) -> None:
    offenders = []
    for name, file in tree.files.items():
        forbidden = HEAVY | ({"torch"} if name.startswith("reports") else set())
        forbidden |= {"torch", "tempering"} if name == "" else set()
        for where in imports(parse(file)):
            first, eager = where.module.split(".")[0], where.eager and where.module != "tempering._version"
            if eager and first in forbidden and not HEAVY_BASES.fullmatch(name):
                offenders.append(f"{file}:{where.line}: {where.module}")
    assert not offenders, lines(offenders)


def test_nothing_read_from_disk_is_unpickled(tree: Tree) -> None:
    offenders = []
    for name, file in tree.files.items():
        modules = {where.module.split(".")[0] for where in imports(parse(file))}
        modules &= {"dill", "joblib", "cloudpickle", "shelve", "pickle"}
        # CIFAR's archives are pickles; its unpickler admits plain containers alone
        offenders += [
            f"{file}: imports {module}" for module in modules - ({"pickle"} if name == "data.cifar" else set())
        ]
        for call in (node for node in ast.walk(parse(file)) if isinstance(node, ast.Call)):
            text = ast.unparse(call)
            arrays = text.startswith(("np.load(", "numpy.load(")) and "allow_pickle=False" not in text
            if arrays or (text.startswith("torch.load(") and "weights_only=True" not in text):
                offenders.append(f"{file}:{call.lineno}: {text}")
    assert not offenders, lines(offenders)


def test_keyword_arguments_are_not_handed_on_unseen(tree: Tree) -> None:
    """A function that takes **kwargs reads them itself, unless what receives them knows their names:
    dataclasses.replace, the class that a mixin is mixed into, or a wrapped function typed by a ParamSpec. Options
    that a TypedDict names (Unpack) are seen.
    """
    offenders = []
    for file in tree.files.values():
        for function in (n for n in ast.walk(parse(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            taken = function.args.kwarg
            named = ast.unparse(taken.annotation) if taken and taken.annotation else ""
            if taken is None or named.endswith(".kwargs") or named.startswith("Unpack["):
                continue
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                spread = (k.value for k in call.keywords if k.arg is None)
                handed_on = any(isinstance(value, ast.Name) and value.id == taken.arg for value in spread)
                if handed_on and ast.unparse(call.func) not in ("replace", "dataclasses.replace", "super().__init__"):
                    offenders.append(f"{file}:{call.lineno}: {function.name} hands on **{taken.arg}")
    assert not offenders, lines(offenders)


def test_the_nano_recipe_imports_nothing_of_tempering() -> None:
    found = imports(parse(PACKAGE / "recipes" / "nano.py"))
    assert not [where for where in found if where.module.startswith(("tempering", "."))]
