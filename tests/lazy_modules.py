"""Optional and slow packages, imported at their first use: collecting all tests stays quick."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class LazyModule:
    """A module that is imported when somebody asks for something in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # what pytest asks of every object in a file of tests
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.name), attribute)


def needs(name: str, reason: str = "") -> pytest.MarkDecorator:
    """Skip where a package is not installed; it is looked for and not imported."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=reason or f"needs {name}")
