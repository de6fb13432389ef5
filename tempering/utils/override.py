"""Functions that have a fast version, which stands in for them inside the kernels' chunks and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")
FAST: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("fast", default=None)


def fusable(function: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """The function, with its fast version asked where there is one: it gets the plain function first, then its args."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        # Dynamo cannot read a ContextVar; what somebody compiles himself is the plain function
        fast = None if torch.compiler.is_compiling() else FAST.get()
        if fast is None or name not in fast:
            return function(*args, **kwargs)
        return fast[name](function, *args, **kwargs)

    return call


@contextmanager
def standing_in(fast: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within, every fusable function of these names is answered by its fast version."""
    before = FAST.set(fast)
    try:
        yield
    finally:
        FAST.reset(before)
