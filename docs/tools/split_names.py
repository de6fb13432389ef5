"""Split a docstring's entry of several names, "y, x: offsets", into one per name: an extension of griffe for the site.

The reference then shows each with its own type and default.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:", "Yields:")
NAMES = re.compile(r"^(\s+)(\w+(?:, \w+)+)((?: \([^)]*\))?: .*)$")


def split_names(text: str) -> str:
    """Return the docstring with one entry per name in its sections of arguments and attributes."""
    written: list[str] = []
    inside, indent = False, 0
    entry: list[str] = []  # the lines of an entry of several names, which are repeated for each
    names: list[str] = []

    def close() -> None:
        for name in names:
            written.extend([entry[0].replace("\0", name), *entry[1:]])
        names.clear()

    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if names and (depth > indent and line.strip()):
            entry.append(line)
            continue
        close()
        if line.strip() and depth == 0:
            inside = line in SECTIONS
        match = NAMES.match(line) if inside else None
        if match:
            indent, names[:], entry[:] = depth, match[2].split(", "), [f"{match[1]}\0{match[3]}"]
        else:
            written.append(line)
    close()
    return "\n".join(written)


class SplitNames(griffe.Extension):
    """Split the docstrings of all objects as they are read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)
