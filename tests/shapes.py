"""Check jaxtyping's annotations in the numerical core at each call, and no other annotations.

Scalars are left to the constructors: they say what they want in words, and tests want those words. jaxtyping's own
wrapper checks every argument twice and wraps functions without a shape too, at half the time of a loss; here each is
checked once: the arguments, then what is returned, against the same sizes, where these types and sizes are new.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype.door import is_bearable
from jaxtyping import install_import_hook, jaxtyped
from torch import Tensor


class ShapeError(TypeError):
    """An array that is not as its annotation says."""


def install(modules: list[str]) -> None:
    """Check every function of these modules, which are imported later."""
    jaxtyping.jaxtyped = checked  # pyright: ignore[reportAttributeAccessIssue]  # what the hook decorates with
    install_import_hook(modules, None)


def checked(function: Any = None, *, typechecker: Any = None) -> Any:
    """The function with its array annotations checked at each call; classes as they are."""
    if function is None:
        return checked
    if isinstance(function, classmethod | staticmethod):
        return type(function)(checked(function.__func__))
    if isinstance(function, property):
        return property(*[f and checked(f) for f in (function.fget, function.fset, function.fdel)])
    if not inspect.isfunction(function) or not function.__annotations__:
        return function
    found: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    passed: set[Any] = set()  # what was found right: types, dtypes and shapes, which are all that annotations look at

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not found:  # at the first call, when all that annotations name is there
            found.append((array_hints(function), tuple(inspect.signature(function).parameters)))
        hints, names = found[0]
        if not hints:
            return function(*args, **kwargs)
        arrays = {n: v for n, v in (*zip(names, args, strict=False), *kwargs.items()) if n in hints}
        key = kind(tuple(arrays.values())) + tuple(arrays)
        if key not in passed:
            check(function, arrays, hints)
            passed.add(key)
        out = function(*args, **kwargs)
        if "return" in hints:
            whole = (key, kind(out))
            if whole not in passed:
                check(function, arrays | {"return": out}, hints)
                passed.add(whole)
        return out

    return wrapped


def array_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that hold an array's shape, save those that name what is imported for types alone."""
    hints = {}
    for name in function.__annotations__:
        one = type("One", (), {"__annotations__": {name: function.__annotations__[name]}})
        try:
            hint = get_type_hints(one, function.__globals__)[name]
        except Exception:
            continue
        if "jaxtyping" in repr(hint):
            hints[name] = hint
    return hints


def kind(value: Any) -> Any:
    """All that an annotation sees of a value; another object for each value of which it may see more."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape
    if value is None:
        return None
    if isinstance(value, tuple):
        return type(value), *map(kind, value)
    return object()


def check(function: Callable[..., Any], values: dict[str, Any], hints: dict[str, Any]) -> None:
    """Hold the values to their annotations, which share the sizes of their axes."""
    with jaxtyped("context"):
        for name, value in values.items():
            hint = hints[name]
            if not (isinstance(value, hint) if isinstance(hint, type) else is_bearable(value, hint)):
                got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                where = f"{function.__module__}.{function.__qualname__}"
                raise ShapeError(f"{where}: {name} is {got}, which is not {hint} beside the other arguments")
