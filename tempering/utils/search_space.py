"""Markers that declare in a constructor's annotations what ``tempering tune`` searches by default, and over what range.

For example ``soft: Annotated[float, Weight()] = 1.0``. Markers change nothing at run time.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args


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

    The weight of the labels (``hard``) is not marked: only the ratio of the other weights to it, and the learning rate,
    matter.
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


def declared(function: Callable[..., Any]) -> dict[str, Marker]:
    """The markers in a function's annotations, by argument; arguments without one are left out.

    Annotations are evaluated one by one, so that a name imported for type checkers only does not hide the others.

    Raises:
        TypeError: for an ``Annotated`` that cannot be evaluated, because its marker would be lost silently.
    """
    function = inspect.unwrap(function)
    found: dict[str, Marker] = {}
    for name, note in inspect.get_annotations(function).items():
        if isinstance(note, str):  # source text of the module itself, by "from __future__ import annotations"
            try:
                note = eval(note, getattr(function, "__globals__", {}))
            except Exception as error:
                if "Annotated" not in note:
                    continue
                raise TypeError(
                    f"{function.__qualname__}: the annotation of {name!r}, {note}, cannot be evaluated ({error}). "
                    "Import its names at the top of the module, outside TYPE_CHECKING."
                ) from error
        if (marker := _marker(note)) is not None:
            found[name] = marker
    return found


def _marker(note: Any) -> Marker | None:
    """The first marker in an annotation, also inside a union; a bare class stands for its defaults."""
    if isinstance(note, Marker):
        return note
    if isinstance(note, type) and issubclass(note, Marker):
        return note()
    return next((marker for part in get_args(note) if (marker := _marker(part)) is not None), None)
