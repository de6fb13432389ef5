"""Write the table of invariants into docs/conformance.md, from their registry.

<<<<<<<< HEAD:docs/tools/conformance_page.py
Usage: ``python docs/tools/conformance_page.py .``.
========
Usage: ``python docs/tools/conformance_table.py .``. Reads benchmarks/results/conformance; ``make conformance`` runs it.
>>>>>>>> 835c077 (Name the generator of the table, and write up the gradient accumulation of ModelOpt's trainer):docs/tools/conformance_table.py
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tempering.conformance.checks import INVARIANTS
from tempering.conformance.promises import KINDS, Promises

START, END = "<!-- invariants -->", "<!-- end of invariants -->"


def page(text: str) -> str:
    """The page with the current table between its markers."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


def table() -> str:
    """One row per invariant: what it says, the kinds it is for, and the promise that includes it."""
    lines = ["| invariant | what it says | kinds | promised by |", "|---|---|---|---|"]
    for invariant in INVARIANTS.values():
        kinds = "all" if set(invariant.kinds) == set(KINDS) else ", ".join(invariant.kinds)
        lines.append(f"| {invariant.name} | {invariant.sentence} | {kinds} | {promise(invariant.promised)} |")
    return "\n".join(lines)


def promise(promised: Callable[[Promises], bool | None] | None) -> str:
    """The fields of ``Promises`` that a condition reads: those that include the invariant, or take it back."""
    if promised is None:
        return "every loss"
    source = inspect.getsource(promised)
    text = source[source.find("promised=") :].split("applies=")[0] if "promised=" in source else source
    names = ["divergence"] if "divergence" in text else []
    names = [f"`{name}`" for name in dict.fromkeys([*names, *re.findall(r"\bp\.(\w+)", text)])]
    if not names:
        return "no loss: a fact"
    return f"every loss, unless {' or '.join(names)} says no" if promised(Promises()) else " or ".join(names)


if __name__ == "__main__":
    file = Path(sys.argv[1]) / "docs" / "conformance.md"
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
