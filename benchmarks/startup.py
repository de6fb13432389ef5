"""Start-up: user and system seconds of a fresh interpreter, after one that fills the disk cache.

Usage:
    python benchmarks/startup.py [--rounds 7] [--tiny]
"""

from __future__ import annotations

import resource
import subprocess
import sys

from timing import Sheet, arguments

VARIANTS = {
    "import torch": ["-c", "import torch"],
    "python alone": ["-c", "pass"],
    "import tempering": ["-c", "import tempering"],
    "import torch, tempering and its loss": ["-c", "import torch, tempering as kd; kd.methods.DTKD, kd.total"],
    "import torch and tempering.distill": ["-c", "import torch, tempering as kd; kd.distill"],
    "tempering --help": [
        "-c",
        "import sys; from tempering.cli import main; sys.argv = ['tempering', '--help']; main()",
    ],
}


def spent(command: list[str]) -> float:
    """CPU seconds of a child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Time the variants in turn."""
    args = arguments(__doc__, rounds=7).parse_args()
    sheet = Sheet("startup", args)
    variants = {k: v for k, v in VARIANTS.items() if not args.tiny or k in ("python alone", "import tempering")}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range((0 if args.tiny else 1) + args.rounds):
        for name, command in variants.items():
            took = spent(command)
            if round_ or args.tiny:
                taken[name].append(took)
    sheet.add("a fresh interpreter", taken)
    print(sheet.write())


if __name__ == "__main__":
    main()
