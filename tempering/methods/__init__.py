"""Methods, one a file, found by looking into this folder."""

from tempering.methods.base import Method, Step, StepMethod
from tempering.utils.registry import discover

METHODS: dict[str, type[Method]] = discover(__name__, __path__, Method)
globals().update(METHODS)

__all__ = ["METHODS", "Method", "Step", "StepMethod", *METHODS]  # pyright: ignore[reportUnsupportedDunderAll]
