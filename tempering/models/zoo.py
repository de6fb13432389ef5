"""Look up the networks of this package by name; families are imported on first use."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import nn

Builder = Callable[[int, int], nn.Module]


class Zoo(Mapping[str, Builder]):
    """Mapping of name -> (classes, channels) -> module. A family is one file of this package with a dict ``NETS``."""

    @cached_property
    def families(self) -> list[str]:
        """Names of the modules that define ``NETS``."""
        files = sorted(Path(__file__).parent.glob("*.py"))
        return [f.stem for f in files if re.search(r"^NETS\b", f.read_text(encoding="utf-8"), re.MULTILINE)]

    def _nets(self, family: str) -> dict[str, Builder]:
        return importlib.import_module(f"tempering.models.{family}").NETS

    def find(self, name: str) -> Builder | None:
        """Return the builder of that name, not case-sensitive, or None.

        Families whose name is a prefix are imported first.
        """
        name = name.lower()
        for family in sorted(self.families, key=lambda family: not name.startswith(family)):
            if (net := {k.lower(): v for k, v in self._nets(family).items()}.get(name)) is not None:
                return net
        return None

    def __getitem__(self, name: str) -> Builder:
        for family in self.families:
            if name in (nets := self._nets(family)):
                return nets[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for family in self.families for name in self._nets(family))

    def __len__(self) -> int:
        return sum(1 for _ in self)


MODELS = Zoo()
