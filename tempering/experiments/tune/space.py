"""What a search varies: ranges and choices of a method's arguments, read from plain text or from the method itself.

The default search space is declared: constructor arguments of methods and policies are annotated with the markers of
``tempering.utils.search_space``, as in ``soft: Annotated[float, Weight()] = 1.0``. Docstrings and names of arguments
play no part in it. An argument without a marker keeps its value unless ``--space`` names it, so a new method or policy
without annotations works, and is searched only where ``--space`` says so.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tempering.experiments.presets import arm_from, method_of, split
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
    """One thing that is varied.

    Attributes:
        name: an argument's path in the method, such as "temperature.tau", or a recipe's flag, such as "--lr".
        low, high: of a range, both ends included; None for a choice.
        log: whether the range is searched by its logarithm.
        choices: texts to choose among, as they would be typed; one alone is held.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.choices) == 1

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.name}={'|'.join(self.choices)}"
        return f"{self.name}={self.low:g}..{self.high:g} {'log' if self.log else 'linear'}"


@dataclass(frozen=True)
class Space:
    """A method's text with places for what is varied, and what that is.

    Attributes:
        template: such as "kd(soft={soft}, temperature=static(tau={temperature.tau}))".
        dimensions: what is varied or held, by its name.
        defaults: what the method has of itself, as texts; the search begins there.
    """

    template: str
    dimensions: Mapping[str, Dimension]
    defaults: Mapping[str, str]

    @property
    def varied(self) -> list[Dimension]:
        """The dimensions that are not held."""
        return [d for d in self.dimensions.values() if not d.held]

    def method(self, chosen: Mapping[str, str]) -> str:
        """The method's text with these values in it."""
        texts = {name: d.choices[0] for name, d in self.dimensions.items() if d.held} | dict(chosen)
        text = self.template
        while PLACE.search(text):  # a choice may have places of its own
            text = PLACE.sub(lambda found: texts[found[1]], text)
        return text

    def flags(self, chosen: Mapping[str, str]) -> list[str]:
        """The recipe's flags among these values."""
        texts = {name: d.choices[0] for name, d in self.dimensions.items() if d.held} | dict(chosen)
        return [f"{name}={text}" for name, text in texts.items() if name.startswith("--")]


def space_of(method: str, given: str = "", flags: set[str] = frozenset()) -> Space:  # pyright: ignore[reportArgumentType]
    """What a search over ``method`` varies: by default the arguments that declare it (weights, warm-up, temperatures).

    Args:
        method: an arm or a method, around whose values is searched; or a text with places in braces, such as
            "lskd(kd(soft={soft}, hard=0))", of which ``given`` has to name all.
        given: what to search in place of that or beside it, with commas between: "soft=0.1..10" (by its logarithm where
            it spans a factor of ten, unless "log" or "linear" follows), "rank=soft|published", "soft=4" to hold.
        flags: names of the recipe's flags, which can be varied as well: "lr=0.01..0.1".

    Raises:
        ValueError: for a method that cannot be made, a name that it lacks, or a range that is none.
    """
    wanted = dict(_entries(given))
    if PLACE.search(method):
        return _of_template(method, wanted, flags)
    made = method_of(arm_from(method).spec)
    texts = {path: _text(value) for path, value, _ in iter_arguments(made)}
    dimensions = {d.name: d for d in _derived(made)}
    for name, text in wanted.items():
        path = _path(name, texts, flags)
        inner = [p for p in dimensions if p.startswith(f"{path}.")]
        for p in inner:  # what stands in its place has arguments of its own
            if f"{{{p}}}" not in text:
                del dimensions[p]
        dimensions[path] = _dimension(path, text)
    if not any(not d.held for d in dimensions.values()):
        raise ValueError(f"{method} has nothing to search. Name what to vary: --space {EXAMPLE!r}.")
    inside = {p for d in dimensions.values() for c in d.choices for p in PLACE.findall(c)}
    template = format_call(made, set(dimensions) - inside)
    defaults = {name: texts[name] for name in dimensions if name in texts}
    space = Space(template, dimensions, defaults)
    _check(space)
    return space


def _of_template(method: str, wanted: Mapping[str, str], flags: set[str]) -> Space:
    places = dict.fromkeys(PLACE.findall(method))
    inside = [p for text in wanted.values() for p in PLACE.findall(text)]
    if missing := [name for name in [*places, *inside] if name not in wanted]:
        raise ValueError(f"{method!r} has a place {{{missing[0]}}} without a range. Give --space {missing[0]}=0.1..10.")
    known = dict.fromkeys([*places, *inside], "")
    dimensions = {(p := _path(name, known, flags)): _dimension(p, text) for name, text in wanted.items()}
    space = Space(method, dimensions, {})
    _check(space)
    return space


def _check(space: Space) -> None:
    """Make the method at both ends of every range and with every choice, so that no trial finds out."""
    first = {d.name: d.choices[0] if d.choices else f"{d.low:.4g}" for d in space.varied}
    for d in space.varied:
        for end in d.choices or (f"{d.low:.4g}", f"{d.high:.4g}"):
            method_of(space.method({**first, d.name: end}))


def iter_arguments(part: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any, nn.Module]]:
    """(path, value, owner) of every argument of a method, and of the methods and policies in it."""
    for name, parameter in _parameters(part).items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            for key, inner in getattr(part, name).items():
                yield from iter_arguments(inner, f"{prefix}{key}.")
            continue
        value = getattr(part, name)
        yield f"{prefix}{name}", value, part
        if hasattr(value, "hyperparameters"):
            yield from iter_arguments(value, f"{prefix}{name}.")


def _derived(made: nn.Module) -> Iterator[Dimension]:
    """The arguments whose annotations declare a range around their value; see ``tempering.utils.search_space``."""
    for path, value, owner in iter_arguments(made):
        marker = declared(type(owner).__init__).get(path.rpartition(".")[2])
        if marker is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if (found := marker.range(value)) is not None:
            yield Dimension(path, found.low, found.high, log=found.log)


def format_call(part: nn.Module, places: Collection[str] = (), prefix: str = "", *, whole: bool = False) -> str:
    """A method or policy as it is typed: a place for each path in ``places``, and the arguments that are no defaults.

    ``whole`` writes every argument.
    """
    said = []
    for name, parameter in _parameters(part).items():
        path = f"{prefix}{name}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts = getattr(part, name).items()
            said += [format_call(inner, places, f"{prefix}{key}.", whole=whole) for key, inner in parts]
        elif path in places:
            said.append(f"{name}={{{path}}}")
        elif hasattr(value := getattr(part, name), "hyperparameters"):
            said.append(f"{name}={format_call(value, places, f'{path}.', whole=whole)}")
        elif whole or value != parameter.default:
            said.append(f"{name}={_text(value)}")
    return type(part).__name__.lower() + (f"({', '.join(said)})" if said else "")


def _parameters(part: nn.Module) -> dict[str, inspect.Parameter]:
    found = inspect.signature(type(part).__init__).parameters
    return {name: p for name, p in found.items() if name != "self" and p.kind is not p.VAR_KEYWORD}


def _text(value: object) -> str:
    """An argument as it is typed."""
    if hasattr(value, "hyperparameters"):
        return format_call(value)  # pyright: ignore[reportArgumentType]
    if isinstance(value, tuple | list):
        return repr(list(value))
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def _entries(given: str) -> Iterator[tuple[str, str]]:
    for part in split(given):
        name, equals, text = part.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise ValueError(f"{part!r} says nothing about what to search. Write it as in {EXAMPLE!r}.")
        yield name.strip(), text.strip()


def _path(name: str, known: Mapping[str, str], flags: set[str]) -> str:
    """The path that ``name`` is, or ends; else the recipe's flag.

    Raises:
        ValueError: for a name that fits nothing, or several paths.
    """
    if name in known:
        return name
    ends = [path for path in known if path.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ValueError(f"{name!r} could be {' or '.join(ends)}. Write one of them.")
    flag = name.removeprefix("--").replace("-", "_")
    if flag in flags - {"method", "temperature", "seed", "out", "label", "quiet"}:
        return f"--{flag}"
    all_names = [*known, *sorted(flags)]
    raise ValueError(
        f"neither the method nor the recipe has an argument {name!r}.{suggest(name, all_names)} The method has: "
        f"{', '.join(known) or 'none'}."
    )


def _dimension(path: str, text: str) -> Dimension:
    found = RANGE.fullmatch(text)
    if found is None:
        choices = tuple(dict.fromkeys(part.strip() for part in text.split("|")))
        if "" in choices or any(".." in c for c in choices):
            raise ValueError(f"{path}={text} is neither a range nor a choice. Write it as in {EXAMPLE!r}.")
        return Dimension(path, choices=choices)
    low, high = (_number(found[i], path) for i in (1, 2))
    if not low < high:
        raise ValueError(f"{path}={text} is no range: {found[1]} is not below {found[2]}.")
    if found[3] == "log" and low <= 0:
        raise ValueError(f"{path}={text}: a logarithm needs a lower end above 0; got {found[1]}.")
    return Dimension(path, low, high, log=found[3] == "log" or (found[3] is None and low > 0 and high >= 10 * low))


def _number(text: str, path: str) -> float:
    try:
        above, _, below = text.partition("/")
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: {text} is no number. Write it as in {EXAMPLE!r}.")
    return value
