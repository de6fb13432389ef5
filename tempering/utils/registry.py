"""Registries of classes found in a package's files; names with suggestions for typos; overrides of functions.

Overrides replace functions by faster versions in a context; only ``tempering.kernels`` uses them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar, cast

Part = TypeVar("Part")
SYNONYMS = {  # names of papers and other libraries -> names here, the first that a class has is meant
    "alpha": ("soft", "feature", "target"),
    "beta": ("hard",),
    "gamma": ("hard",),
    "lambda_": ("soft", "feature"),
    "weight": ("soft", "feature"),
    "loss_weight": ("soft", "feature"),
    "ce_weight": ("hard",),
    "kd_weight": ("soft", "feature"),
    "T": ("temperature", "tau"),
    "temp": ("temperature", "tau"),
    "tau": ("temperature",),
    "temperature": ("tau",),
    "layers": ("names",),
    "layer": ("names",),
    "hints": ("names",),
    "stages": ("names",),
    "features": ("names",),
}
NAMES = (
    "names= are features that the task extracts: task=Classification(features={'last': ('layer3', 'stage3')}), (the "
    "student's module, the teacher's module)."
)


class Registry(MutableMapping[str, type[Part]]):
    """Name -> class, for every concrete subclass of ``kind`` defined in a file of ``package``, sorted by name.

    Files are searched for class statements and imported on first access to one of their classes, so a new class is one
    new file, and a run imports only the classes that it uses. ``registry[name] = cls`` adds a class from elsewhere.

    Args:
        package: full name, such as "tempering.methods".
        path: the package's folders, ``__path__``; searched recursively.
        kind: base class.
    """

    def __init__(self, package: str, path: Iterable[str], kind: type[Part]) -> None:
        self.package, self.path, self.kind = package, tuple(path), kind
        self.added: dict[str, type[Part]] = {}

    @cached_property
    def modules(self) -> dict[str, str]:
        """Class name -> module, for every public class statement in these files."""
        modules: dict[str, str] = {}
        for folder in map(Path, self.path):
            for file in sorted(folder.rglob("*.py")):
                module = ".".join((self.package, *file.relative_to(folder).with_suffix("").parts))
                for name in re.findall(r"^class ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
                    modules[name] = module.removesuffix(".__init__")
        return dict(sorted(modules.items()))

    def find(self, name: str) -> type[Part] | None:
        """Return the class of that name, case-insensitive; None if there is none."""
        match = next((key for key in (*self.added, *self.modules) if key.lower() == name.lower()), None)
        return None if match is None else self._load(match)

    def _load(self, name: str) -> type[Part] | None:
        if name in self.added:
            return self.added[name]
        return self._concrete(getattr(importlib.import_module(self.modules[name]), name, None))

    def _concrete(self, value: Any) -> type[Part] | None:
        concrete = inspect.isclass(value) and issubclass(value, self.kind) and not inspect.isabstract(value)
        return cast("type[Part]", value) if concrete else None

    def add_from(self, module: ModuleType) -> list[str]:
        """Add the concrete subclasses of ``kind`` that a module defines; return their names.

        Raises:
            ValueError: for a name that a class of the package has.
        """
        classes = {
            n: c for n, v in vars(module).items() if (c := self._concrete(v)) and v.__module__ == module.__name__
        }
        for name, value in classes.items():
            if taken := next((key for key in self.modules if key.lower() == name.lower()), None):
                raise ValueError(f"{module.__file__} defines {name}, and {self.package} has {taken}. Rename the class.")
            self[name] = value
        return list(classes)

    def __getitem__(self, name: str) -> type[Part]:
        value = self._load(name) if name in self.added or name in self.modules else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in sorted({*self.modules, *self.added}) if self._load(name) is not None)

    def __setitem__(self, name: str, value: type[Part]) -> None:
        self.added[name] = value

    def __delitem__(self, name: str) -> None:
        del self.added[name]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def attribute(self, name: str) -> Any:
        """Return the class of exactly that name, for a package's ``__getattr__``.

        Raises:
            AttributeError: if there is none.
        """
        if name in self:
            return self[name]
        raise AttributeError(f"module {self.package!r} has no attribute {name!r}.{suggest(name, self.modules)}")


def import_file(path: Path, name: str) -> ModuleType:
    """Import a Python file as the module ``name``; its folder is added to the path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look up their module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def lookup(name: str, parts: Mapping[str, Part], kind: str) -> Part:
    """Return the item of that name, case-insensitive; ``kind`` is the noun in the error message.

    Raises:
        ValueError: if there is none, with the most similar name.
    """
    find = getattr(parts, "find", None)  # imports less than iterating
    item = find(name) if find else next((v for k, v in parts.items() if k.lower() == name.lower()), None)
    if item is not None:
        return item
    names = sorted(key.lower() for key in parts)
    raise ValueError(f"no {kind} is called {name!r}.{suggest(name, names)} There are: {', '.join(names)}.")


def suggest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean ...?" with the name most similar to a mistyped one; "" if none is similar."""
    best, score = max(
        ((other, _similarity(name.lower(), other.lower())) for other in names), key=_score, default=("", 0)
    )
    return f" Did you mean {best!r}?" if score >= 0.6 else ""


def _score(pair: tuple[str, float]) -> float:
    return pair[1]


def _similarity(name: str, other: str) -> float:
    """Return the similarity in [0, 1.1] of letters in order and in any order; more for the same first letter.

    Letters in any order find exchanged ones: dkt is DTKD, not PKT.
    """

    def ratio(a: Sequence[str], b: Sequence[str]) -> float:
        return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()

    in_order = ratio(name, other)
    mean = 0.5 * (in_order + ratio(sorted(name), sorted(other)))
    return (mean + 0.1 * (name[:1] == other[:1])) if max(in_order, mean) >= 0.6 else 0.0


def plain_net(name: str) -> str:
    """Normalize a net's name: lower case without dashes, dots and underscores; shufflenet becomes shuffle."""
    return "".join(c for c in name.lower() if c.isalnum()).replace("shufflenet", "shuffle")


def check_arguments(cls: type[Any], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Check the names of a constructor's arguments.

    Raises:
        TypeError: for an argument that it does not have, with those that it has and the one that is probably meant.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    kinds = {p.kind for p in parameters}
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    unknown = [] if inspect.Parameter.VAR_KEYWORD in kinds else [name for name in kwargs if name not in known]
    extra = [] if inspect.Parameter.VAR_POSITIONAL in kinds else args[positional:]
    if not unknown and not extra:
        return
    usage = f"{cls.__name__}({', '.join(f'{name}=...' for name in known)})"
    if extra:
        raise TypeError(f"{cls.__name__} takes its arguments by name; got {extra[0]!r}. Write {usage}.")
    name = unknown[0]
    paper = re.search(rf"^ *(\w+): .*\(the paper's {name}\)", cls.__doc__ or "", re.MULTILINE)
    meant = paper[1] if paper else next((n for n in SYNONYMS.get(name, ()) if n in known), None)
    hint = f" Its {name} is {meant}= here." if meant else ""
    more = f" {NAMES}" if meant == "names" else ""
    raise TypeError(f"{cls.__name__} has no argument {name!r}.{hint} Write {usage}.{more}")


# overrides

# Name -> fast version. A function that can be overridden looks its name up first, unless torch.compile traces it:
# Dynamo cannot read a ContextVar, and code that users compile gets the plain function.
OVERRIDES: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("overrides", default=MappingProxyType({}))


@contextmanager
def override_with(fast: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Override the functions of these names inside the context; {} restores the plain ones."""
    token = OVERRIDES.set(fast)
    try:
        yield
    finally:
        OVERRIDES.reset(token)
