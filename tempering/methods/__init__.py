"""Methods, one per file, found in this package and its subpackages when they are first named."""

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
