"""Recipes: Python files whose ``main(*, ...)`` returns an Experiment and whose typed arguments are its flags."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tempering.training.config import TrainConfig
from tempering.utils.registry import suggest

if TYPE_CHECKING:
    from tempering.training.config import Run
    from tempering.training.experiment import Experiment

BUNDLED = Path(__file__).resolve().parents[1] / "recipes"
TEMPLATE = BUNDLED / "template.py"  # what `tempering new-recipe` copies; not offered to be run
TRAINING = frozenset(f.name for f in fields(TrainConfig))  # flags of an argument `config: TrainConfig`
EXAMPLE = (
    "from tempering.training.experiment import Experiment; ... return Experiment(student=..., teacher=..., train=..., "
    "method=..., config=config, out=out)"
)


def find(name: str) -> Path:
    """The recipe's file: a path, or the name of a bundled recipe, such as "digits".

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
    """The recipe's ``main``; executes the top level of the file, as importing it does.

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


def call(path: Path, argv: Sequence[str], *, prog: str) -> Any:
    """What the recipe's ``main`` returns for these flags."""
    return tyro.cli(load(path), prog=prog, args=list(argv))


def describe(path: Path, argv: Sequence[str], *, prog: str) -> Experiment:
    """The Experiment that the recipe's ``main`` returns for these flags; nothing is trained.

    Raises:
        ValueError: for a recipe that returns anything else, such as the Run of a call of distill().
    """
    declared = _returns(path)
    if declared in ("Run", "None"):  # known before main() trains for hours
        raise ValueError(_no_experiment(path, declared))
    made = call(path, argv, prog=prog)
    # by what is needed of it, so that a recipe without torch is not made to import it
    if not all(callable(getattr(made, name, None)) for name in ("check", "run", "without_test")):
        raise ValueError(_no_experiment(path, "None" if made is None else type(made).__name__))
    return made


def with_flags(main: Callable[..., Any], flags: Mapping[str, Any]) -> Any:
    """Call ``main`` from Python with its flags by name; those of TrainConfig, such as epochs, go into its config.

    with_flags(main, {"method": "kd", "epochs": 3}) is main(method="kd", config=replace(its default, epochs=3)).
    """
    parameters = inspect.signature(main).parameters
    given = {name: value for name, value in flags.items() if name in parameters}
    options = {name: value for name, value in flags.items() if name not in parameters}
    config = next((p for p in parameters.values() if isinstance(p.default, TrainConfig)), None)
    if config is not None and options:
        given[config.name] = replace(given.get(config.name, config.default), **options)
        options = {}
    return main(**given, **options)


def finish(made: Any) -> Run | None:
    """Run what a recipe's ``main`` returned: an Experiment; a Run is finished, and anything else is no run."""
    if callable(getattr(made, "run", None)):
        made = made.run()
    return made if getattr(made, "facts", None) else None


def check_flags(path: Path, given: Sequence[str]) -> None:
    """Check flags before anything is started with them.

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
    """Names of the flags of ``main``, read from the source: nothing is imported or run.

    Raises:
        ValueError: for a file that is not Python, or has no ``main``.
    """
    names: set[str] = set()
    arguments = _main(path).args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        names |= TRAINING if re.search(r"\bTrainConfig\b", annotation) else {argument.arg}
    return names


def _main(path: Path) -> ast.FunctionDef:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return node
    raise ValueError(
        f'{path} is no recipe: it has no function main. Write `def main(*, method: str = "dtkd", ...)`; its typed '
        "arguments become flags."
    )


def _returns(path: Path) -> str | None:
    """The last name of the type that ``main`` is annotated to return."""
    annotation = _main(path).returns
    return None if annotation is None else ast.unparse(annotation).strip("'\"").rpartition(".")[2]


def _no_experiment(path: Path, returned: str) -> str:
    return (
        f"main() of recipe {path} returned {returned}; return an Experiment, which this command can look into before "
        f"anything is trained, e.g. {EXAMPLE}. (`tempering run` takes a Run as well.)"
    )
