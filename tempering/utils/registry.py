"""Finding the parts of a folder: a new method or policy is one new file, and nothing else is edited."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import TypeVar

Part = TypeVar("Part")


def discover(package: str, path: Iterable[str], kind: type[Part]) -> dict[str, type[Part]]:
    """name -> class for every concrete subclass of ``kind`` defined in a module of ``package``, by name."""
    found: dict[str, type[Part]] = {}
    for module_info in pkgutil.walk_packages(path, f"{package}."):
        module = importlib.import_module(module_info.name)
        for name, value in vars(module).items():
            if (
                inspect.isclass(value)
                and issubclass(value, kind)
                and value.__module__ == module.__name__
                and not inspect.isabstract(value)
                and not name.startswith("_")
            ):
                found[name] = value
    return dict(sorted(found.items()))


def pick(name: str, parts: Mapping[str, Part], what: str) -> Part:
    """The part of that name, letter case aside.

    Raises:
        ValueError: for a name that is not there, with the nearest one.
    """
    by_lower = {key.lower(): value for key, value in parts.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    hint = nearest(name, by_lower)
    raise ValueError(f"no {what} is called {name!r}.{hint} There are: {', '.join(sorted(by_lower))}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean ...?" with the name nearest to a mistyped one; nothing where none is near."""
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def plain_net(name: str) -> str:
    """A net's name without case, dashes, dots and underscores; shufflenet is shuffle, as tables abbreviate it."""
    return "".join(c for c in name.lower() if c.isalnum()).replace("shufflenet", "shuffle")
