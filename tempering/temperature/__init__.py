"""Temperature policies, one a file, found by looking into this folder."""

from tempering.temperature.base import LearningPolicy, Policy, Temperatures
from tempering.utils.registry import discover

POLICIES: dict[str, type[Policy]] = discover(__name__, __path__, Policy)
globals().update(POLICIES)

__all__ = ["POLICIES", "LearningPolicy", "Policy", "Temperatures", *POLICIES]  # pyright: ignore[reportUnsupportedDunderAll]
