"""Temperature policies, one a file, found by looking into this folder."""

from tempering.discovery import discover
from tempering.temperature.base import LearningPolicy, Policy, Temperatures

POLICIES: dict[str, type[Policy]] = discover(__name__, __path__, Policy)
globals().update(POLICIES)

__all__ = ["POLICIES", "LearningPolicy", "Policy", "Temperatures", *POLICIES]  # pyright: ignore[reportUnsupportedDunderAll]
