"""Context-local overrides of functions by faster versions, used by ``tempering.kernels`` only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

# Name -> fast version. A function that can be overridden looks its name up first, unless torch.compile traces it:
# Dynamo cannot read a ContextVar, and code that users compile gets the plain function.
OVERRIDES: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("overrides", default=MappingProxyType({}))


@contextmanager
def override_with(fast: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Override the functions of these names inside the context; {} restores the plain ones."""
    token = OVERRIDES.set(fast)
    try:
        yield
    finally:
        OVERRIDES.reset(token)
