"""Search spaces: ranges and choices of a method's arguments, parsed from text or declared by the method.

The default search space is declared: constructor arguments of methods and policies are annotated with the markers of
``tempering.utils.search_space``, as in ``soft: Annotated[float, Weight()] = 1.0``. Docstrings and names of arguments
are not used. An argument without a marker keeps its value unless ``--space`` names it, so a new method or policy
without annotations works, and is searched only where ``--space`` names its arguments.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tempering.experiments.presets import method_of, preset_from, split
from tempering.utils.registry import suggest
from tempering.utils.search_space import declared

if TYPE_CHECKING:
    from torch import nn

PLACE = re.compile(r"\{([\w.-]+)\}")
NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?(?:/\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?:\s+(log|linear))?")
EXAMPLE = 'soft=0.1..10, warmup=0..0.2, "temperature.solve=exact|std", hard=1'


@dataclass(frozen=True)
class Dimension:
    """One dimension of a search space.

    Attributes:
        name: an argument's path in the method, such as "temperature.tau", or a recipe's flag, such as "--lr".
        low, high: bounds of a range, inclusive; None for a choice.
        log: whether the range is searched on a logarithmic scale.
        choices: texts to choose from, as on the command line; a single one is fixed.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Return whether the value is fixed."""
        return len(self.choices) == 1

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.name}={'|'.join(self.choices)}"
        return f"{self.name}={self.low:g}..{self.high:g} {'log' if self.log else 'linear'}"


@dataclass(frozen=True)
class Space:
    """A method's text with placeholders, and the dimensions that fill them.

    Attributes:
        template: such as "kd(soft={soft}, temperature=static(tau={temperature.tau}))".
        dimensions: varied and fixed dimensions by name.
        defaults: the method's default values, as texts; the search starts with them.
    """

    template: str
    dimensions: Mapping[str, Dimension]
    defaults: Mapping[str, str]

    @property
    def varied(self) -> list[Dimension]:
        """Return the dimensions that are not fixed."""
        return [d for d in self.dimensions.values() if not d.held]

    def method(self, chosen: Mapping[str, str]) -> str:
        """Return the method's text with these values filled in."""
        texts = {name: d.choices[0] for name, d in self.dimensions.items() if d.held} | dict(chosen)
        text = self.template
        while PLACE.search(text):  # a choice may contain placeholders
            text = PLACE.sub(lambda match: texts[match[1]], text)
        return text

    def flags(self, chosen: Mapping[str, str]) -> list[str]:
        """Return the recipe's flags among these values."""
        texts = {name: d.choices[0] for name, d in self.dimensions.items() if d.held} | dict(chosen)
        return [f"{name}={text}" for name, text in texts.items() if name.startswith("--")]


def space_of(method: str, given: str = "", flags: set[str] = frozenset()) -> Space:  # pyright: ignore[reportArgumentType]
    """Return the search space of ``method``; default: the arguments that declare one (weights, warm-up, temperatures).

    Args:
        method: a preset or a method, around whose values to search; or a text with placeholders in braces, such as
            "lskd(kd(soft={soft}, hard=0))", all of which must be named in ``given``.
        given: dimensions that replace or extend the default ones, separated by commas: "soft=0.1..10" (logarithmic if
            it spans a factor of ten, unless "log" or "linear" follows), "rank=soft|published", "soft=4" to fix a value.
        flags: names of the recipe's flags, which can be varied as well: "lr=0.01..0.1".

    Raises:
        ValueError: for a method that cannot be built, an unknown name, or an invalid range.
    """
    entries = dict(_entries(given))
    if PLACE.search(method):
        return _of_template(method, entries, flags)
    default_method = method_of(preset_from(method).spec)
    texts = {path: _text(value) for path, value, _ in iter_arguments(default_method)}
    dimensions = {d.name: d for d in _declared_dimensions(default_method)}
    for name, text in entries.items():
        path = _path(name, texts, flags)
        inner = [p for p in dimensions if p.startswith(f"{path}.")]
        for p in inner:  # the replacement has its own arguments
            if f"{{{p}}}" not in text:
                del dimensions[p]
        dimensions[path] = _dimension(path, text)
    if not any(not d.held for d in dimensions.values()):
        raise ValueError(f"{method} has nothing to search. Name the arguments to vary: --space {EXAMPLE!r}.")
    inside = {p for d in dimensions.values() for c in d.choices for p in PLACE.findall(c)}
    template = format_call(default_method, set(dimensions) - inside)
    defaults = {name: texts[name] for name in dimensions if name in texts}
    space = Space(template, dimensions, defaults)
    _check(space)
    return space


def _of_template(method: str, entries: Mapping[str, str], flags: set[str]) -> Space:
    places = dict.fromkeys(PLACE.findall(method))
    inside = [p for text in entries.values() for p in PLACE.findall(text)]
    if missing := [name for name in [*places, *inside] if name not in entries]:
        raise ValueError(
            f"{method!r} has a placeholder {{{missing[0]}}} without a range. Pass --space {missing[0]}=0.1..10."
        )
    known_paths = dict.fromkeys([*places, *inside], "")
    dimensions = {(p := _path(name, known_paths, flags)): _dimension(p, text) for name, text in entries.items()}
    space = Space(method, dimensions, {})
    _check(space)
    return space


def _check(space: Space) -> None:
    """Build the method at both ends of every range and with every choice, to raise errors before the first trial."""
    first = {d.name: d.choices[0] if d.choices else f"{d.low:.4g}" for d in space.varied}
    for d in space.varied:
        for end in d.choices or (f"{d.low:.4g}", f"{d.high:.4g}"):
            method_of(space.method({**first, d.name: end}))


def iter_arguments(part: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any, nn.Module]]:
    """Yield (path, value, owner) of every argument of a method, and of the methods and policies in it."""
    for name, parameter in _parameters(part).items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            for key, inner in getattr(part, name).items():
                yield from iter_arguments(inner, f"{prefix}{key}.")
            continue
        value = getattr(part, name)
        yield f"{prefix}{name}", value, part
        if hasattr(value, "hyperparameters"):
            yield from iter_arguments(value, f"{prefix}{name}.")


def _declared_dimensions(method: nn.Module) -> Iterator[Dimension]:
    """Yield dimensions of arguments whose annotations declare a range; see ``tempering.utils.search_space``."""
    for path, value, owner in iter_arguments(method):
        marker = declared(type(owner).__init__).get(path.rpartition(".")[2])
        if marker is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if (range_ := marker.range(value)) is not None:
            yield Dimension(path, range_.low, range_.high, log=range_.log)


def format_call(part: nn.Module, places: Collection[str] = (), prefix: str = "", *, whole: bool = False) -> str:
    """Format a method or policy as text, with placeholders for ``places``; arguments with default values are left out.

    ``whole`` writes every argument.
    """
    arguments = []
    for name, parameter in _parameters(part).items():
        path = f"{prefix}{name}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts = getattr(part, name).items()
            arguments += [format_call(inner, places, f"{prefix}{key}.", whole=whole) for key, inner in parts]
        elif path in places:
            arguments.append(f"{name}={{{path}}}")
        elif hasattr(value := getattr(part, name), "hyperparameters"):
            arguments.append(f"{name}={format_call(value, places, f'{path}.', whole=whole)}")
        elif whole or value != parameter.default:
            arguments.append(f"{name}={_text(value)}")
    return type(part).__name__.lower() + (f"({', '.join(arguments)})" if arguments else "")


def _parameters(part: nn.Module) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(type(part).__init__).parameters
    return {name: p for name, p in parameters.items() if name != "self" and p.kind is not p.VAR_KEYWORD}


def _text(value: object) -> str:
    """Format an argument as text."""
    if hasattr(value, "hyperparameters"):
        return format_call(value)  # pyright: ignore[reportArgumentType]
    if isinstance(value, tuple | list):
        return repr(list(value))
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def _entries(given: str) -> Iterator[tuple[str, str]]:
    for part in split(given):
        name, equals, text = part.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise ValueError(f"{part!r} is not a dimension of a search. Write it as in {EXAMPLE!r}.")
        yield name.strip(), text.strip()


def _path(name: str, known: Mapping[str, str], flags: set[str]) -> str:
    """Return the path equal to ``name`` or ending in it; else the recipe's flag.

    Raises:
        ValueError: if the name matches nothing, or several paths.
    """
    if name in known:
        return name
    matches = [path for path in known if path.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{name!r} could be {' or '.join(matches)}. Write one of them.")
    flag = name.removeprefix("--").replace("-", "_")
    if flag in flags - {"method", "temperature", "seed", "out", "label", "quiet"}:
        return f"--{flag}"
    all_names = [*known, *sorted(flags)]
    raise ValueError(
        f"neither the method nor the recipe has an argument {name!r}.{suggest(name, all_names)} The method has: "
        f"{', '.join(known) or 'none'}."
    )


def _dimension(path: str, text: str) -> Dimension:
    match = RANGE.fullmatch(text)
    if match is None:
        choices = tuple(dict.fromkeys(part.strip() for part in text.split("|")))
        if "" in choices or any(".." in c for c in choices):
            raise ValueError(f"{path}={text} is neither a range nor a choice. Write it as in {EXAMPLE!r}.")
        return Dimension(path, choices=choices)
    low, high = (_number(match[i], path) for i in (1, 2))
    if not low < high:
        raise ValueError(f"{path}={text} is not a range: {match[1]} is not below {match[2]}.")
    if match[3] == "log" and low <= 0:
        raise ValueError(f"{path}={text}: a logarithmic range needs a lower bound above 0; got {match[1]}.")
    return Dimension(path, low, high, log=match[3] == "log" or (match[3] is None and low > 0 and high >= 10 * low))


def _number(text: str, path: str) -> float:
    try:
        above, _, below = text.partition("/")
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: {text} is not a number. Write it as in {EXAMPLE!r}.")
    return value
