"""One trial of a search, a process of its own: the recipe's run, which never sees the test split."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from tempering.experiments import recipe as recipefile
from tempering.searching import SEARCHING


def main(argv: Sequence[str]) -> int:
    """Run RECIPE with its flags, the test split left out; the exit code, 130 where it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    SEARCHING.set(True)
    try:
        tyro.cli(recipefile.load(Path(argv[0])), prog=f"tempering run {argv[0]}", args=list(argv[1:]))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
