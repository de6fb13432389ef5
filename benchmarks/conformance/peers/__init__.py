"""Libraries whose distillation losses are checked, one file each: version, requirements, losses and what they promise.

A file makes a ``LIBRARY`` and registers a maker per loss, which imports the peer and returns a callable for
``tempering.conformance.check``. Nothing of a peer's code is here. Promises are what its documentation, or name and
signature, say; where they say nothing the promise is None, and a difference is no failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from tempering.conformance import Promises
from tempering.conformance.promises import Kind

Maker = Callable[[], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss of a library.

    Attributes:
        path: its import path and, after a comma, the arguments that are not the default.
        documented: one sentence that says what its documentation says.
        make: imports it and returns a callable of the kind.
        said: names of invariants of ``UNSAID`` that its documentation does promise.
        unsaid: names of further invariants that it does not promise.
    """

    path: str
    kind: Kind
    promises: Promises
    documented: str
    make: Maker
    said: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()

    def promises_invariant(self, name: str, message: str) -> bool:
        if name in self.unsaid:
            return False
        return name in self.said or not message.startswith(UNSAID.get(name, "\0"))


def of_generalized_jsd(definition: str) -> Promises:
    """Of fused losses of language models: a mean over valid tokens, without T^2; vocabularies are aligned."""
    return Promises(
        definition=definition, temperature_squared=False, reduction="mean", ignored_rows=True, padded_vocabulary=True
    )


# what a function is not blamed for unless its documentation says it: callers run the teacher without gradients, and
# torch's own cross entropy leaves a gradient of NaN in an ignored row that holds NaN
UNSAID = {
    "no gradient into the teacher": "",
    "NaN in ignored rows": "NaN in an ignored row changes the gradient",
}


@dataclass
class Library:
    """A package and its losses.

    Attributes:
        package: its name on the package index; "" for one that the surrounding environment has, named as its file.
        version: the version that is checked.
        needs: further requirements, pinned; all are installed without their dependencies.
        absent: modules that its imports name and no loss uses, replaced by empty ones.
        dated: "" for the current release, or why an older one is checked.
    """

    package: str
    version: str
    needs: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dated: str = ""
    losses: list[Loss] = field(default_factory=list[Loss])

    def loss(
        self, path: str, *, kind: Kind, documented: str = "", promises: Promises | None = None, **names: tuple[str, ...]
    ) -> Callable[[Maker], Maker]:
        """Register the decorated maker, whose docstring says what is documented; ``names``: ``said`` and ``unsaid``."""

        def register(make: Maker) -> Maker:
            said = documented or " ".join((make.__doc__ or "").split())
            kept = promises or Promises()
            self.losses.append(Loss(path=path, kind=kind, promises=kept, documented=said, make=make, **names))
            return make

        return register

    @property
    def requirements(self) -> tuple[str, ...]:
        return (f"{self.package}=={self.version}", *self.needs)


def load(name: str, folder: Path | None = None) -> Library:
    """Return the library of a file in this folder, or in another."""
    path = (folder or Path(__file__).parent) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_peer_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no library {name!r}. There are: {', '.join(names(folder))}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LIBRARY


def names(folder: Path | None = None) -> list[str]:
    return sorted(p.stem for p in (folder or Path(__file__).parent).glob("*.py") if p.stem != "__init__")


def replace_absent(names: tuple[str, ...]) -> None:
    """Let imports of these modules, which no loss here calls, succeed where they are not installed."""
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in sys.modules and not _is_installed(part):
                module = sys.modules[part] = MagicMock(name=part)
                module.__path__, module.__spec__, module.__name__ = [], None, part


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def bare(*packages: str) -> None:
    """Make these installed packages importable without running their own ``__init__`` files."""
    for name in packages:
        relative = name.replace(".", "/")
        found = [str(p) for p in (Path(folder) / relative for folder in sys.path) if p.is_dir()]
        if not found:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
        stand_in(name).__path__ = found


def stand_in(name: str, **attributes: Any) -> ModuleType:
    """Put an empty module with these attributes in the place of one that the losses do not use."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(attributes)
    return module


class Unregistered:
    """A registry of classes that registers nothing, as the decorators of OpenMMLab use it."""

    def register_module(self, *args: Any, **kw: Any) -> Callable[[Any], Any]:
        return lambda made: made


def file_of(folder_name: str, relative: str, package: str = "") -> ModuleType:
    """Import one file of an installed package by path, without running the package's own imports.

    ``package`` is what its relative imports start from."""
    for folder in map(Path, sys.path):
        path = folder / folder_name / relative
        if path.is_file():
            name = f"{package or f'_{folder_name}'}.{path.stem}"
            if package and package not in sys.modules:
                held = sys.modules[package] = ModuleType(package)
                held.__path__ = [str(path.parent)]
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
    raise ModuleNotFoundError(f"no file {relative} of {folder_name} is installed", name=folder_name)
