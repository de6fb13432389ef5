"""Write a new recipe: the command `tempering new-recipe`."""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tempering.experiments.recipe import BUNDLED, TEMPLATE


def new_recipe(name: Annotated[Path, Positional, arg(metavar="NAME")]) -> None:
    """Write a commented recipe to edit: a Python file with synthetic data and small networks, ready to run.

    tempering new-recipe mine

    Args:
        name: path of the new file, with or without .py.
    """
    path = name if name.suffix == ".py" else name.with_name(f"{name.name}.py")
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten. Choose another name, or remove it.")
    check_name(path.stem)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}. Create it first: mkdir -p {path.parent}")
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("template.py", path.as_posix()).replace("runs/template", f"runs/{path.stem}")
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {path}\n\n  tempering check {path}\n  tempering run {path} --epochs 1\n  tempering run {path} --help")


def check_name(stem: str) -> None:
    """Check that a file of this name can be a recipe; its folder is on sys.path when it runs.

    Raises:
        ValueError: if it is not an identifier, or if it is the name of a bundled recipe or of a module.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", stem, re.ASCII):
        raise ValueError(
            f"a recipe's name consists of letters, digits and underscores and begins with a letter; got {stem!r}. Try "
            "my_recipe."
        )
    if (BUNDLED / f"{stem}.py").is_file():
        raise ValueError(f"{stem} is a recipe of tempering. Choose another name, such as my_{stem}.")
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    names = {*sys.stdlib_module_names, "tempering"}
    if stem in names or PathFinder.find_spec(stem, list(installed)) is not None:
        raise ValueError(
            f"{stem} is a Python module, which {stem}.py would shadow for recipes in its folder. Choose another name, "
            f"such as my_{stem}."
        )
