"""Annotations of a constructor: the markers of arguments that ``tempering tune`` searches, and the check of types.

A marker is written as ``soft: Annotated[float, Weight(factor=4)] = 1.0``, or ``soft: TermWeight = 1.0`` for the default
range. ``check_values`` refuses values that do not have the annotated type, or lie outside the marker's limits; ``hard:
NonNegative`` states limits alone, of an argument that is not searched.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self, TypeVar, Union, get_args, get_origin

from tempering.utils.registry import check_arguments

T = TypeVar("T")


class Range(NamedTuple):
    """The values to search, both ends included; on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool


class Limits(NamedTuple):
    """The values that an argument may have; ``wanted`` says so in messages, with {name} for the argument."""

    wanted: str
    allows: Callable[[float], bool]
    hint: str = ""


NON_NEGATIVE = Limits(">= 0 and finite", lambda value: value >= 0)
POSITIVE = Limits("> 0 and finite", lambda value: value > 0)
UNIT_INTERVAL = Limits("in [0, 1]", lambda value: 0 <= value <= 1)
RUN_FRACTION = UNIT_INTERVAL._replace(wanted="in [0, 1], the share of the run (20 of 240 epochs is {name}=20/240)")


class Marker(ABC):
    """The base class of markers: the range to search, given the argument's current value, and the limits of values."""

    limits: ClassVar[Limits | None] = None

    @abstractmethod
    def range(self, value: float) -> Range | None:
        """The range to search around ``value``; None to keep the argument at ``value``."""


@dataclass(frozen=True)
class Weight(Marker):
    """The weight of a loss term, from ``value / factor`` to ``value * factor``; a weight of 0 stays 0.

    The weight of the hard term (``hard``) has no marker: only the ratios of the other weights to it, and the learning
    rate, matter.
    """

    limits: ClassVar[Limits | None] = NON_NEGATIVE
    factor: float = 10.0

    def range(self, value: float) -> Range | None:
        return Range(value / self.factor, value * self.factor, log=True) if value > 0 else None


@dataclass(frozen=True)
class Temperature(Marker):
    """A temperature, from ``low`` to ``high``, or to twice the value if that is ``high`` or more."""

    limits: ClassVar[Limits | None] = POSITIVE._replace(hint=" Hinton's usual value is 4.0.")
    low: float = 1.0
    high: float = 10.0

    def range(self, value: float) -> Range | None:
        if value <= 0:
            return None
        return Range(min(self.low, value), 2.0 * value if value >= self.high else self.high, log=True)


@dataclass(frozen=True)
class Fraction(Marker):
    """A fraction of the run, such as a warm-up: from 0 to ``high``, or to the value if that is larger."""

    limits: ClassVar[Limits | None] = RUN_FRACTION
    high: float = 0.25

    def range(self, value: float) -> Range | None:
        return Range(0.0, max(self.high, float(value)), log=False)


TermWeight = Annotated[float, Weight()]
RunFraction = Annotated[float, Fraction()]
Tau = Annotated[float, Temperature()]
NonNegative = Annotated[float, NON_NEGATIVE]
Positive = Annotated[float, POSITIVE]
UnitInterval = Annotated[float, UNIT_INTERVAL]
WANTED = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", NoneType: "None"}
MARKED = {"Annotated", "TermWeight", "RunFraction", "Tau", "NonNegative", "Positive", "UnitInterval"}


def declared(function: Callable[..., Any]) -> dict[str, Marker]:
    """Return the markers in a function's annotations, by argument; arguments without a marker are left out.

    Annotations are evaluated one by one, so that a name imported for type checkers only does not hide the others.

    Raises:
        TypeError: for a marked annotation that cannot be evaluated, since its marker would be ignored silently.
    """
    return {name: marker for name, hint in _hints(function).items() if (marker := _find(hint, Marker)) is not None}


def check_values(cls: type[Any], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Check that numbers, truth values, text and lists of them are what a constructor's annotations say.

    A float must be finite, an int no float, and a list of names no single name. Other annotations, such as policies and
    literals, are checked by the constructor itself.

    Raises:
        ValueError: for a value of another type, or outside the limits of its annotation.
    """
    if not args and not kwargs:  # as copies are made
        return
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    hints = _hints(cls.__init__)
    for name, value in {**dict(zip(positional, args, strict=False)), **kwargs}.items():
        wanted = _wanted(hints.get(name))
        if wanted and not any(_has_type(value, hint) for hint in wanted):
            types = " or ".join(map(_type_name, wanted))
            raise ValueError(f"{cls.__name__} needs {name} to be {types}; got {value!r}.")
        limits = _find(hints.get(name), Limits)
        for part in value if isinstance(value, tuple | list) else [value]:
            if limits and isinstance(part, numbers.Real) and not limits.allows(float(part)):
                needs = f"{cls.__name__} needs {name} {limits.wanted.format(name=name)}"
                raise ValueError(f"{needs}; got {part!r}.{limits.hint}")


class CheckedArguments:
    """A base class whose constructor's arguments are checked before it runs: names, types and limits."""

    if not TYPE_CHECKING:  # the signature is that of __init__

        def __new__(cls, *args: object, **kwargs: object) -> Self:
            check_arguments(cls, args, kwargs)
            check_values(cls, args, kwargs)
            return super().__new__(cls)


@functools.cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations, evaluated; those that cannot be evaluated are left out unless they have a marker."""
    function = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(function).items():
        if isinstance(annotation, str):  # source text of the module itself, by "from __future__ import annotations"
            try:
                annotation = eval(annotation, getattr(function, "__globals__", {}))
            except Exception as error:
                if MARKED.isdisjoint(re.findall(r"\w+", annotation)):
                    continue
                raise TypeError(
                    f"{function.__qualname__}: the annotation of {name!r}, {annotation}, cannot be evaluated "
                    f"({error}). Import its names at the top of the module, outside TYPE_CHECKING."
                ) from error
        hints[name] = annotation
    return hints


def _wanted(hint: Any) -> tuple[Any, ...]:
    """Return the types of an annotation that can be checked: plain ones and lists of them; () if another is allowed."""
    if get_origin(hint) in (Union, UnionType):
        options = [_wanted(option) for option in get_args(hint)]
        return tuple(t for option in options for t in option) if all(options) else ()
    if get_origin(hint) is Annotated:
        return _wanted(get_args(hint)[0])
    if get_origin(hint) in (Sequence, tuple, list):
        return (hint,) if all(part in WANTED for part in _parts(hint)) else ()
    return (hint,) if hint in WANTED else ()


def _has_type(value: object, hint: Any) -> bool:
    if get_origin(hint) is not None:
        parts = _parts(hint)
        return isinstance(value, tuple | list) and all(any(_has_type(v, part) for part in parts) for v in value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is not float:
        return isinstance(value, hint)
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _type_name(hint: Any) -> str:
    if get_origin(hint) is None:
        return WANTED[hint]
    return f"a list, each {' or '.join(WANTED[part] for part in _parts(hint))}"


def _parts(hint: Any) -> list[Any]:
    """Return the types of a list's elements, without their markers."""
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    return [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]


def _find(annotation: Any, kind: type[T]) -> T | None:
    """Return the first marker, or limits, in an annotation, also inside a union."""
    if isinstance(annotation, type) and issubclass(annotation, Marker):
        annotation = annotation()
    if isinstance(annotation, Marker) and kind is Limits:
        annotation = annotation.limits
    if isinstance(annotation, kind):
        return annotation
    return next((found for part in get_args(annotation) if (found := _find(part, kind)) is not None), None)
