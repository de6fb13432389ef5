"""What Triton's kernels cost on paper on a device that need not be here: bytes and exp() per row, and milliseconds.

Nothing is measured. A row stays in cache between the passes of one kernel: 132 processors hold one row each, 34 MB of
32,000 classes on both sides in float32, of 50 MB of cache.

Usage:
    python benchmarks/roofline.py
"""

from __future__ import annotations

from typing import NamedTuple

from timing import Sheet, arguments

BANDWIDTH = 4.3e12  # bytes a second that an H200 reaches of its 4.8e12
EXPS = 132 * 16 * 1.98e9  # exp() a second: processors, special function units of each, clock
ROWS, CLASSES = 4096, 32_000


class Kernel(NamedTuple):
    """Per entry of a row: sides read from memory, gradients written, and exp()."""

    name: str
    read: int
    written: int
    exps: int


KERNELS = (
    Kernel("`_exact_rows`, one look", 2, 0, 2),
    Kernel("`_exact_rows`, two looks", 2, 0, 4),
    Kernel("`_kl_rows`", 2, 1, 4),
    Kernel("`_label_rows`", 1, 1, 2),
)
FLOOR = Kernel("read both sides, write one gradient", 2, 1, 0)
EXACT = (KERNELS[0], KERNELS[2])


def seconds(kernel: Kernel, size: int) -> float:
    """For all rows, with logits of ``size`` bytes and gradients in float32: the larger of memory and exp()."""
    entries = ROWS * CLASSES
    memory = entries * (kernel.read * size + 4 * kernel.written) / BANDWIDTH
    return max(memory, entries * kernel.exps / EXPS)


def main() -> None:
    """Write roofline.csv."""
    sheet = Sheet("roofline", arguments(__doc__, rounds=1).parse_args())
    for size, name in ((4, "fp32"), (2, "bf16")):
        times = {k.name: [seconds(k, size)] for k in (FLOOR, *KERNELS)}
        times["exact solver and divergence"] = [sum(seconds(k, size) for k in EXACT)]
        notes = {
            k.name: f"{CLASSES * (k.read * size + 4 * k.written):,} bytes, {k.exps * CLASSES:,} exp()"
            for k in (FLOOR, *KERNELS)
        }
        notes[FLOOR.name] += f"; {BANDWIDTH / 1e12:g} TB/s, {EXPS / 1e12:.2g}e12 exp() a second"
        title = f"H200 on paper, bytes and exp() of a row: N={ROWS} V={CLASSES}"
        sheet.add(f"{title}, {name}", times, notes=notes)
    print(sheet.write())


if __name__ == "__main__":
    main()
