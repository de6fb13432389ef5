"""What a process takes at most from hidden states to the loss and back, at a real vocabulary: in chunks or held whole.

Every variant runs in a process of its own, whose peak is that of the whole process: torch, both heads and the gradients
counted. Milliseconds are of CPU time, as elsewhere. TRL's and Liger's losses take part where they are installed; the
first variant of each case is the loss of logits that are held whole. In float32 that one needs about 20 GB.

Usage:
    python benchmarks/memory.py [--rounds 1] [--threads 1] [--tiny]
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fused_linear import Sides, dense, liger, ours, sides
from peers import trl_jsd
from timing import Sheet, arguments, installed, seconds
from torch import Tensor

from tempering.methods import KD, Divergence, Method
from tempering.rows import Rows, total

LARGE = (4096, 128_256, 1024, 1024)
SMALL = (16, 64, 8, 8)
FLOAT, HALF = "fp32, KL", "bf16, generalised JSD"
DTYPES = {FLOAT: torch.float32, HALF: torch.bfloat16}
BUDGET = 2**28  # bytes for a chunk's logits, and again for what is made of them
Run = Callable[[Sides], None]


def plain(method: Method) -> Run:
    """Our loss of logits that are held whole."""

    def loss(v: Tensor, u: Tensor) -> Tensor:
        rows = Rows(v, u)
        return total(method(rows), rows)

    return dense(loss)


def variants() -> tuple[dict[str, dict[str, Run]], dict[str, str]]:
    """Every variant of every case by name, the dense one first, and what to say of some."""
    kl, jsd = KD(soft=1.0, hard=0.0), Divergence(objective="jsd")
    trl, which = trl_jsd()
    made: dict[str, dict[str, Run]] = {
        FLOAT: {
            "logits, ours": plain(kl),
            "ours, as it comes": ours(kl, compile=False),
            "ours, chunks of 256 MiB": ours(kl, compile=False, memory=BUDGET),
        },
        HALF: {
            "logits, TRL": dense(trl),
            "ours, chunks of 256 MiB": ours(jsd, compile=False, memory=BUDGET),
            "ours, chunks of 256 MiB, logits in bf16": ours(jsd, compile=False, memory=BUDGET, upcast=False),
        },
    }
    notes = {"logits, TRL": which}
    if installed("liger_kernel"):
        made[HALF]["Liger, chunks of 256 rows"] = liger(False)
        notes["Liger, chunks of 256 rows"] = "cross entropy counted, at weight 0"
    return made, notes


def measured(sizes: tuple[int, int, int, int], dtype: torch.dtype, run: Run) -> tuple[float, float]:
    """Seconds of one call, and the bytes of this process at its most."""
    run(sides(*SMALL, dtype))
    x = sides(*sizes, dtype)
    took = seconds(lambda: run(x))
    if torch.cuda.is_available():
        return took, float(torch.cuda.max_memory_allocated())
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def apart(what: str, *flags: str) -> tuple[float, float]:
    """What ``measured`` says of CASE|ARM, asked of a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", what, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}; is there too little memory? {done.stderr[-2000:]}")
    took, peak = map(float, done.stdout.split()[-2:])
    return took, peak


def main() -> None:
    """Ask about every variant of every case."""
    args = arguments(__doc__, rounds=1).parse_args()
    sheet = Sheet("memory", args)
    made, notes = variants()
    sizes = SMALL if args.tiny else LARGE
    if args.peak:
        case, name = args.peak.split("|")
        print(*measured(sizes, DTYPES[case], made[case][name]))
        return
    for case, by_name in made.items():
        taken: dict[str, list[float]] = {name: [] for name in by_name}
        peaks = dict.fromkeys(by_name, 0.0)
        for name in [name for _ in range(args.rounds) for name in by_name]:
            if args.tiny:
                took, peak = measured(sizes, DTYPES[case], by_name[name])
            else:
                took, peak = apart(f"{case}|{name}", "--threads", str(args.threads))
            taken[name].append(took)
            peaks[name] = max(peaks[name], peak / 1e9)
        title = "N={} V={} H={} {}".format(*sizes[:3], case)
        sheet.add(title, taken, notes=notes, peaks=peaks, unit="GB")
    print(sheet.write())


if __name__ == "__main__":
    main()
