"""This library: every method of rows, the kernels, the lists of cached teachers and the Hugging Face adapter."""

from __future__ import annotations

from typing import Any

from peers import Library
from tempering._version import __version__
from tempering.methods import METHODS
from tests.conformance_of_ours import LOSSES, METHOD_PROMISES

LIBRARY = Library("", __version__)


def documented(name: str, loss: Any) -> str:
    text = (METHODS[name] if name in METHODS else getattr(loss, "func", loss)).__doc__ or ""
    first = " ".join(text.strip().split("\n\n")[0].split()).rstrip(".")
    own = ", ".join(sorted(key for key in METHOD_PROMISES.get(name, {}) if key != "definition"))
    text = first or "The method, or KD with this divergence, without its term on labels"
    return f"{text}.{f' Declared: {own}.' if own else ''}"


for name, (loss, kind, promises) in LOSSES.items():
    LIBRARY.loss(
        name,
        kind=kind,
        promises=promises,
        documented=documented(name, loss),
        said=("no gradient into the teacher", "NaN in ignored rows"),
    )(lambda loss=loss: loss)
