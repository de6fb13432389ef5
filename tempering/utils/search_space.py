"""Markers in a constructor's annotations that declare which arguments ``tempering tune`` searches, and their ranges.

For example ``soft: Annotated[float, Weight(factor=4)] = 1.0``, or ``soft: TermWeight = 1.0`` for the default range.
Markers change nothing at run time.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args


class Range(NamedTuple):
    """The values to search, both ends included; on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool


class Marker(ABC):
    """The base class of markers: the range to search, given the argument's current value."""

    @abstractmethod
    def range(self, value: float) -> Range | None:
        """The range to search around ``value``; None to keep the argument at ``value``."""


@dataclass(frozen=True)
class Weight(Marker):
    """The weight of a loss term, from ``value / factor`` to ``value * factor``; a weight of 0 stays 0.

    The weight of the hard term (``hard``) has no marker: only the ratios of the other weights to it, and the learning
    rate, matter.
    """

    factor: float = 10.0

    def range(self, value: float) -> Range | None:
        return Range(value / self.factor, value * self.factor, log=True) if value > 0 else None


@dataclass(frozen=True)
class Temperature(Marker):
    """A temperature, from ``low`` to ``high``, or to twice the value if that is ``high`` or more; 0 stays 0."""

    low: float = 1.0
    high: float = 10.0

    def range(self, value: float) -> Range | None:
        if value <= 0:
            return None
        return Range(min(self.low, value), 2.0 * value if value >= self.high else self.high, log=True)


@dataclass(frozen=True)
class Fraction(Marker):
    """A fraction of the run, such as a warm-up: from 0 to ``high``, or to the value if that is larger."""

    high: float = 0.25

    def range(self, value: float) -> Range | None:
        return Range(0.0, max(self.high, float(value)), log=False)


TermWeight = Annotated[float, Weight()]
RunFraction = Annotated[float, Fraction()]
Tau = Annotated[float, Temperature()]
MARKED = {"Annotated", "TermWeight", "RunFraction", "Tau"}


def declared(function: Callable[..., Any]) -> dict[str, Marker]:
    """Return the markers in a function's annotations, by argument; arguments without a marker are left out.

    Annotations are evaluated one by one, so that a name imported for type checkers only does not hide the others.

    Raises:
        TypeError: for a marked annotation that cannot be evaluated, since its marker would be ignored silently.
    """
    function = inspect.unwrap(function)
    markers: dict[str, Marker] = {}
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
        if (marker := _marker(annotation)) is not None:
            markers[name] = marker
    return markers


def _marker(annotation: Any) -> Marker | None:
    """Return the first marker in an annotation, also inside a union; a class is instantiated with its defaults."""
    if isinstance(annotation, Marker):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, Marker):
        return annotation()
    return next((marker for part in get_args(annotation) if (marker := _marker(part)) is not None), None)
