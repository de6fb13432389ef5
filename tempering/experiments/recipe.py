"""Recipes: Python files whose ``main(*, ...)`` is a run and whose typed arguments are its flags."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import tempering
from tempering.utils.registry import suggest

BEHIND: ContextVar[tuple[str, ...]] = ContextVar("behind", default=())  # a recipe's flags, which it reads itself
BUNDLED = Path(tempering.__file__).resolve().parent / "recipes"
TEMPLATE = BUNDLED / "template.py"  # what `tempering new-recipe` copies; not offered to be run


def find(name: str) -> Path:
    """The recipe's file: a path, or the name of one that comes with the sources, such as "digits".

    Raises:
        FileNotFoundError: naming what is there instead.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = sorted(p for p in BUNDLED.glob("*.py") if p.stem != "__init__" and p != TEMPLATE)
    for other in bundled:
        if name in (other.stem, other.name):
            return other
    here = [*bundled, *path.parent.glob("*.py")] if path.parent.is_dir() else bundled
    here = {p.resolve(): p for p in here}.values()
    near = {str(p): difflib.SequenceMatcher(None, path.stem, p.stem).ratio() for p in here}
    best = [p for p in sorted(near, key=lambda p: -near[p]) if near[p] >= 0.5][:3]
    hint = f" Did you mean {' or '.join(best)}?" if best else f" There are: {', '.join(sorted(near)[:12]) or 'none'}."
    raise FileNotFoundError(f"there is no recipe {name}.{hint} A recipe is a Python file with main(*, ...).")


def load(path: Path) -> Callable[..., Any]:
    """The recipe's ``main``; running the file's top level, as importing it does.

    Raises:
        ValueError: for a file without ``main``.
    """
    flags(path)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and type hints look their module up
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module.main


def check_flags(path: Path, given: Sequence[str]) -> None:
    """Look at flags before anything is started with them.

    Raises:
        ValueError: for one that ``main`` does not take, with the nearest.
    """
    known = flags(path)
    for word in given:
        if not word.startswith("--") or word == "--help":
            continue
        name = re.split(r"[=.]", word[2:])[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            raise ValueError(
                f"{path} takes no --{word[2:].split('=')[0]}.{suggest(name, known)} `tempering run {path} --help` "
                "explains its flags."
            )


def flags(path: Path) -> set[str]:
    """Names of ``main``'s arguments, read from the source: nothing is imported or run.

    Raises:
        ValueError: for a file that is no Python, or has no ``main``.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    raise ValueError(
        f'{path} is no recipe: it has no function main. Write `def main(*, method: str = "dtkd", ...)`; its typed '
        "arguments become flags."
    )
