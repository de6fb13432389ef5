"""One trial of a search, in a process of its own: the recipe's run without its test split."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tempering.experiments import recipe


def main(argv: Sequence[str]) -> int:
    """Run the recipe argv[0] with the flags argv[1:], without its test split; 130 if it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        recipe.describe(Path(argv[0]), argv[1:], prog=f"tempering run {argv[0]}").without_test().run()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
