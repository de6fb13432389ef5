"""Print the oldest versions that pyproject.toml allows, as pins: docs/tools/oldest.py pyproject.toml [EXTRA ...]."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

TESTS = ("beartype", "pytest", "pytest-xdist")  # of the extra "dev"


def pins(pyproject: str, extras: list[str]) -> list[str]:
    project = tomllib.loads(pyproject)["project"]
    wanted = [
        *project["dependencies"],
        *(r for r in project["optional-dependencies"]["dev"] if r.partition(">=")[0] in TESTS),
        *(r for extra in extras for r in project["optional-dependencies"][extra]),
    ]
    return sorted({re.sub(r"\s*>=\s*", "==", requirement) for requirement in wanted if "tempering[" not in requirement})


if __name__ == "__main__":
    print("\n".join(pins(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2:])))
