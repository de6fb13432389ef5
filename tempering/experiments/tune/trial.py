"""Run one trial of a search in its own process: the recipe's run without its test split."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tempering.experiments.recipe import describe
from tempering.utils.files import forget_interrupts, interrupt


def main(argv: Sequence[str]) -> int:
    """Run the recipe argv[0] with the flags argv[1:]; return 0, or 130 if it was interrupted."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        describe(Path(argv[0]), argv[1:], prog=f"tempering run {argv[0]}").without_test().run()
    except KeyboardInterrupt:
        return 130
    except Exception:
        if forget_interrupts():  # an import that was broken off fails with another error
            return 130
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
