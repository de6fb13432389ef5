"""Check a distillation loss: the command `tempering conformance`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

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
    compile: Literal["no", "aot_eager", "inductor"] = "aot_eager",
    seconds: float = 120.0,
    badge: Path | None = None,
    promises: Annotated[Promises, OmitArgPrefixes, SuppressFixed] = NOTHING,
) -> int:
    """Check a distillation loss for the invariants of its kind.

    The exit code is 0 if all that is promised holds, 1 if something fails, 2 if the loss cannot be loaded or called.

    tempering conformance my_package.losses:kd_loss --kind tokens --out runs/conformance

    docs/conformance.md shows how the loss is called and how losses with other arguments are converted.

    Args:
        loss: MODULE:LOSS or FILE.py:LOSS, a function, or a class without required arguments. Its attribute `promises`
            says what it promises; flags change single promises.
        kind: of the loss.
        out: folder for report.json, report.html and the counterexamples.
        definition: name of the divergence of one row: kl, reverse_kl, jsd, cross_entropy, mse ...
        examples: number of inputs per invariant, at most; default: 12, or fewer where one costs more.
        compile: check torch.compile too: traced, with the gradient derived from it (aot_eager, seconds), or with
            the code that Inductor generates (a minute).
        seconds: limit of the check, for losses that are slow; what is left is reported as not checked.
        badge: file for a badge, .svg or .json (for shields.io/endpoint).
        promises: what the documentation of the loss says.
    """
    from tempering.conformance import Status, check

    if badge is not None and badge.suffix not in (".svg", ".json"):
        raise ValueError(f"--badge needs a file that ends in .svg or .json; got {badge}.")
    try:
        function = load(loss)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    own = getattr(function, "promises", NOTHING)
    values = {f.name: (getattr(promises, f.name), f.default) for f in dataclasses.fields(Promises)}
    values["definition"] = definition, None
    promises = dataclasses.replace(own, **{name: new for name, (new, default) in values.items() if new != default})
    chosen = False if compile == "no" else compile
    report = check(
        function, kind=kind, promises=promises, name=loss, examples=examples, compile=chosen, seconds=seconds
    )
    print(report.table())
    if out is not None:
        print(f"page: {report.save(out)}")
    if badge is not None:
        from tempering.conformance.badge import write_badge

        write_badge(badge, [report.record()])
        print(f"badge: {badge}")
    never_ran = any(r.name == "runs" and r.status is Status.ERROR for r in report.results)
    return 0 if report.ok else 2 if never_ran else 1


def load(path: str) -> Callable[..., Any]:
    """Return the function (or an instance of the class) that ``load_object`` finds.

    Raises:
        ValueError: if it cannot be called; also as ``load_object``, like the other errors.
    """
    value = load_object(path, "a loss", "my_package.losses:kd_loss")
    if not callable(value):
        raise ValueError(f"{path} is {type(value).__name__}, which cannot be called.")
    return value
