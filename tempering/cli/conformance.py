"""Check a distillation loss: the command `tempering conformance`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, SuppressFixed, arg

from tempering.conformance.promises import Kind, Promises
from tempering.experiments.recipe import load_object

NOTHING = Promises()
Loss = Annotated[str, Positional, arg(metavar="MODULE:LOSS|FILE.py:LOSS")]


def conformance(
    loss: Loss,
    *,
    kind: Kind = "logits",
    out: Path | None = None,
    definition: str | None = None,
    examples: int | None = None,
    compile: bool = False,
    promises: Annotated[Promises, OmitArgPrefixes, SuppressFixed] = NOTHING,
) -> int:
    """Check a distillation loss for the invariants of its kind. The exit code is 1 if one that is promised fails.

    tempering conformance my_package.losses:kd_loss --kind tokens --out runs/conformance

    docs/conformance.md shows how the loss is called and how losses with other arguments are converted.

    Args:
        loss: MODULE:LOSS or FILE.py:LOSS, a function, or a class without required arguments. Its attribute `promises`
            says what it promises; flags change single promises.
        kind: of the loss.
        out: folder for report.json, report.html and the counterexamples.
        definition: name of the divergence of one row: kl, reverse_kl, jsd, cross_entropy, mse ...
        examples: number of inputs per invariant, at most; default: 12, or fewer where one costs more.
        compile: check torch.compile too, which takes a minute.
        promises: what the documentation of the loss says.
    """
    from tempering.conformance import check

    function = load(loss)
    own = getattr(function, "promises", NOTHING)
    values = {f.name: (getattr(promises, f.name), f.default) for f in dataclasses.fields(Promises)}
    values["definition"] = definition, None
    promises = dataclasses.replace(own, **{name: new for name, (new, default) in values.items() if new != default})
    report = check(function, kind=kind, promises=promises, name=loss, examples=examples, compile=compile)
    print(report.table())
    if out is not None:
        print(f"page: {report.save(out)}")
    return 0 if report.ok else 1


def load(path: str) -> Callable[..., Any]:
    """Return the function (or an instance of the class) that ``load_object`` finds.

    Raises:
        ValueError: if it cannot be called; also as ``load_object``, like the other errors.
    """
    value = load_object(path, "a loss", "my_package.losses:kd_loss")
    if not callable(value):
        raise ValueError(f"{path} is {type(value).__name__}, which cannot be called.")
    return value
