"""Load recipes: Python files whose ``main(*, ...)`` returns an Experiment; its typed arguments are the flags."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tempering.training.config import TrainConfig
from tempering.utils.registry import import_file, suggest

if TYPE_CHECKING:
    from tempering.training.config import Run
    from tempering.training.experiment import Experiment

BUNDLED = Path(__file__).resolve().parents[1] / "recipes"
TEMPLATE = BUNDLED / "template.py"  # copied by `tempering new-recipe`; not listed as a recipe
TRAINING = frozenset(f.name for f in fields(TrainConfig))  # flags of an argument `config: TrainConfig`
EXAMPLE = (
    "from tempering.training.experiment import Experiment; ... return Experiment(student=..., teacher=..., train=..., "
    "method=..., config=config, out=out)"
)


def bundled_recipes() -> list[Path]:
    """Return the paths of the recipes that come with the package."""
    return sorted(p for p in BUNDLED.glob("*.py") if p.stem != "__init__" and p != TEMPLATE)


def find(name: str) -> Path:
    """Return the path of a recipe.

    Args:
        name: a path, or the name of a bundled recipe, such as "digits". A path that a bundled recipe had in an earlier
            release or has in another installation, such as "recipes/digits.py", is its name if there is no such file.

    Raises:
        FileNotFoundError: if there is no such file; names similar ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    shipped = path.parts[-3:-1] == ("tempering", "recipes") or path.parts[:-1] == ("recipes",)
    for file in bundled:
        if name in (file.stem, file.name) or (shipped and path.name == file.name):
            return file
    candidates = [*bundled, *path.parent.glob("*.py")] if path.parent.is_dir() else bundled
    candidates = {p.resolve(): p for p in candidates}.values()
    stems = {p.stem if p in bundled else str(p): p.stem for p in candidates}  # the name of a bundled one is enough
    ratios = {p: difflib.SequenceMatcher(None, path.stem, stem).ratio() for p, stem in stems.items()}
    best = [p for p in sorted(ratios, key=lambda p: -ratios[p]) if ratios[p] >= 0.5][:3]
    hint = f" Did you mean {' or '.join(best)}?" if best else f" There are: {', '.join(sorted(ratios)[:12]) or 'none'}."
    raise FileNotFoundError(f"there is no recipe {name}.{hint} A recipe is a Python file with main(*, ...).")


def load(path: Path) -> Callable[..., Any]:
    """Import a recipe and return its ``main``.

    Raises:
        ValueError: for a file without ``main``.
    """
    flags(path)
    return import_file(path, f"recipe_{path.stem}").main


def load_object(path: str, what: str, example: str) -> Any:
    """Return what FILE.py:NAME or MODULE:NAME names, of a class an instance; the working folder is searched too.

    Args:
        path: as typed.
        what: the object is, such as "a loss", for errors.
        example: of a path.

    Raises:
        ValueError: for a path of another form, a file or module without that name, or a class with required arguments.
        FileNotFoundError: if there is no such file.
        ImportError: if there is no such module.
    """
    module, separator, name = path.rpartition(":")
    if not separator or not module or not name:
        raise ValueError(f"{what} is given as MODULE:NAME or FILE.py:NAME, such as {example}; got {path!r}.")
    if module.endswith(".py") and not Path(module).is_file():
        raise FileNotFoundError(f"there is no file {module}. Give {what} as FILE.py:NAME, such as {example}.")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    value = _import(module)
    for part in name.split("."):
        if not hasattr(value, part):
            there = ", ".join(n for n, v in vars(value).items() if callable(v) and not n.startswith("_")) or "none"
            raise ValueError(f"{module} has no {name!r}. Functions and classes there: {there}.")
        value = getattr(value, part)
    if isinstance(value, type):
        try:
            return value()
        except TypeError as error:
            raise ValueError(
                f"{path} is a class with required arguments: {error}. Make an instance in a module, "
                f"{name.rpartition('.')[2].lower()} = {value.__name__}(...), and give its name."
            ) from None
    return value


def _import(module: str) -> Any:
    """Import a file, or a module of the working folder or of those installed; errors name it.

    Raises:
        ImportError: if it is not there, or cannot be imported.
    """
    try:
        if module.endswith(".py"):
            return import_file(Path(module), f"object_{Path(module).stem}")
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{module} cannot be imported: {error}.") from None
        raise ImportError(
            f"there is no module {error.name!r}, neither installed nor in {Path.cwd()}. A file losses.py there is "
            "given as losses:NAME."
        ) from None
    except Exception as error:
        raise ImportError(f"{module} cannot be imported: {type(error).__name__}: {error}") from None


def call(path: Path, argv: Sequence[str], *, prog: str) -> Any:
    """Call the recipe's ``main`` with these flags, and return its result."""
    return tyro.cli(load(path), prog=prog, args=list(argv))


def describe(path: Path, argv: Sequence[str], *, prog: str) -> Experiment:
    """Return the Experiment that the recipe's ``main`` returns for these flags; nothing is trained.

    Raises:
        ValueError: for a recipe that returns another type, such as the Run of a call of distill().
    """
    declared = _return_type(path)
    if declared in ("Run", "None"):  # before main() trains
        raise ValueError(_wrong_type_message(path, declared))
    experiment = call(path, argv, prog=prog)
    # by its methods instead of isinstance(), which would import torch
    if not all(callable(getattr(experiment, name, None)) for name in ("check", "run", "without_test")):
        raise ValueError(_wrong_type_message(path, "None" if experiment is None else type(experiment).__name__))
    return experiment


def with_flags(main: Callable[..., Any], flags: Mapping[str, Any]) -> Any:
    """Call ``main`` with flags by name; flags of TrainConfig, such as epochs, replace fields of its config.

    with_flags(main, {"method": "kd", "epochs": 3}) is main(method="kd", config=replace(its default, epochs=3)).
    """
    parameters = inspect.signature(main).parameters
    arguments = {name: value for name, value in flags.items() if name in parameters}
    options = {name: value for name, value in flags.items() if name not in parameters}
    config = next((p for p in parameters.values() if isinstance(p.default, TrainConfig)), None)
    if config is not None and options:
        arguments[config.name] = replace(arguments.get(config.name, config.default), **options)
        options = {}
    return main(**arguments, **options)


def finish(result: Any) -> Run | None:
    """Run the Experiment that a recipe's ``main`` returned; return a Run unchanged, and None for any other result."""
    if callable(getattr(result, "run", None)):
        result = result.run()
    return result if getattr(result, "facts", None) else None


def check_flags(path: Path, recipe_args: Sequence[str]) -> None:
    """Check the flags of a recipe before anything is run.

    Raises:
        ValueError: for a flag that ``main`` does not take, with the nearest.
    """
    known = flags(path)
    for word in recipe_args:
        if not word.startswith("--") or word == "--help":
            continue
        name = re.split(r"[=.]", word[2:])[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            raise ValueError(
                f"{path} takes no --{word[2:].split('=')[0]}.{suggest(name, known)} `tempering run {path} --help` "
                "explains its flags."
            )


def flags(path: Path) -> set[str]:
    """Return the names of the flags of ``main``, read from the source without importing it; see ``annotated_flags``."""
    return set(annotated_flags(path))


def annotated_flags(path: Path) -> dict[str, str]:
    """Return the flags of ``main`` with their annotations, read from the source without importing it.

    Raises:
        ValueError: for a file that is not Python, or has no ``main``, or a ``main`` with two flags of one name.
    """
    found: dict[str, str] = {}
    arguments = _main(path).args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        is_config = re.search(r"\bTrainConfig\b", annotation)
        new = {f.name: str(f.type) for f in fields(TrainConfig)} if is_config else {argument.arg: annotation}
        if twice := sorted(found.keys() & new.keys()):
            raise ValueError(
                f"{path}: main() has an argument {twice[0]}, and so has its TrainConfig, whose options are flags too. "
                f"Leave it out, and use config.{twice[0]}."
            )
        found |= new
    return found


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


def _return_type(path: Path) -> str | None:
    """Return the unqualified name of the annotated return type of ``main``; None without annotation."""
    annotation = _main(path).returns
    return None if annotation is None else ast.unparse(annotation).strip("'\"").rpartition(".")[2]


def _wrong_type_message(path: Path, returned: str) -> str:
    return (
        f"main() of recipe {path} returned {returned}; return an Experiment, which this command can inspect before "
        f"training, e.g. {EXAMPLE}. (`tempering run` takes a Run as well.)"
    )
