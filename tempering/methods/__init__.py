"""Distillation methods, one per file, discovered in this package and its subpackages at first access."""

from typing import Any

from tempering.methods.base import Method as Method
from tempering.methods.base import Step as Step
from tempering.methods.base import StepMethod as StepMethod
from tempering.utils.registry import Registry

METHODS: Registry[Method] = Registry(__name__, __path__, Method)


def __getattr__(name: str) -> Any:
    return METHODS.attribute(name)


def __dir__() -> list[str]:
    return sorted((*globals(), *METHODS))
