"""Check a distillation loss: the command `tempering conformance`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, SuppressFixed, arg

from tempering.conformance import Promises, check
from tempering.conformance.promises import Kind
from tempering.conformance.runner import name_of

NOTHING = Promises()
Loss = Annotated[str, Positional, arg(metavar="MODULE:LOSS")]


def conformance(
    loss: Loss,
    *,
    kind: Kind = "logits",
    out: Path | None = None,
    definition: str | None = None,
    promises: Annotated[Promises, OmitArgPrefixes, SuppressFixed] = NOTHING,
) -> int:
    """Check a distillation loss for the invariants of its kind. The exit code is 1 if one that is promised fails.

    tempering conformance my_package.losses:kd_loss --kind tokens --out runs/conformance

    `python -c "import tempering.conformance as c; help(c.check)"` shows how the loss is called.

    Args:
        loss: MODULE:LOSS, a function, or a class without required arguments. Its attribute ``promises`` says what it
            promises.
        kind: of the loss.
        out: folder for report.json, report.html and the counterexamples.
        definition: name of the divergence of one row, such as kl, reverse_kl, jsd, cross_entropy or mse.
        promises: what the documentation of the loss says, in place of the attribute.
    """
    function = load(loss)
    promises = promises if definition is None else replace(promises, definition=definition)
    report = check(function, kind=kind, promises=None if promises == NOTHING else promises, name=loss)
    print(report.table())
    if out is not None:
        print(f"page: {report.save(out)}")
    return 0 if report.ok else 1


def load(path: str) -> Callable[..., Any]:
    """Return the function (or an instance of the class) of MODULE:NAME; the working folder is searched too.

    Raises:
        ValueError: if the path has another form, or the module has no such loss.
        ImportError: if there is no such module.
    """
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"a loss is given as MODULE:NAME, such as my_package.losses:kd_loss; got {path!r}.")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{module} has no {name!r}.")
        value = getattr(value, part)
    value = value() if isinstance(value, type) else value
    if not callable(value):
        raise ValueError(f"{path} is {name_of(value)}, which cannot be called.")
    return value
