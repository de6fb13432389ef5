"""Temperature policies, one per file, discovered automatically and imported on first access."""

from typing import Any

from tempering.temperature.base import AdaptivePolicy as AdaptivePolicy
from tempering.temperature.base import Policy as Policy
from tempering.temperature.base import Temperatures as Temperatures
from tempering.utils.registry import Registry

POLICIES: Registry[Policy] = Registry(__name__, __path__, Policy)


def __getattr__(name: str) -> Any:
    return POLICIES.attribute(name)


def __dir__() -> list[str]:
    return sorted((*globals(), *POLICIES))
