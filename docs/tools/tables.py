"""Tables in pages of the documentation, between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tempering

PACKAGE = Path(tempering.__file__).resolve().parent  # not its name, which a checkout may have too


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what is between the two lines of this name in the page.

    Raises:
        ValueError: for a page without them.
    """
    old = page.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(old):
        raise ValueError(f"{page} has no lines <!-- {name} --> and <!-- /{name} -->.")
    new = marks.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", old)
    page.write_text(new, encoding="utf-8", newline="\n")


def reason(error: Exception) -> str:
    """The first sentence of an error, in one line, with its type if no check of this package raised it."""
    text = " ".join(str(error).split())
    first = re.split(r"(?<=[a-z0-9)\]])[.:] (?=[A-Z])", text)[0]
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    ours = where is not None and PACKAGE in Path(where.tb_frame.f_code.co_filename).resolve().parents
    return first[:160] if ours else f"{type(error).__name__}: {first[:120]}"
