"""What Triton's kernels cost on paper on a device that need not be here: bytes and exp() per row, and milliseconds.

A row stays in cache between the passes of one kernel: 132 processors hold one row each, 34 MB of 32,000 classes on both
sides in float32, of 50 MB of cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
GOAL = 1.2  # times the floor


def milliseconds(kernel: Kernel, size: int) -> float:
    """For all rows, with logits of ``size`` bytes and gradients in float32: the larger of memory and exp()."""
    entries = ROWS * CLASSES
    memory = entries * (kernel.read * size + 4 * kernel.written) / BANDWIDTH
    return 1e3 * max(memory, entries * kernel.exps / EXPS)


def table() -> Iterator[str]:
    """The kernels as a Markdown table, and the goal."""
    yield "## Triton's kernels on paper\n"
    yield "`python benchmarks/roofline.py`; nothing here was measured.\n"
    yield f"An H200 at {BANDWIDTH / 1e12:g} TB/s and {EXPS / 1e12:.2g}e12 exp() a second, N={ROWS} V={CLASSES}:\n"
    yield "| kernel | bytes per row, fp32 | bf16 | exp() per row | ms, fp32 | bf16 |"
    yield "|---|---:|---:|---:|---:|---:|"
    for kernel in (*KERNELS, FLOOR):
        moved = [CLASSES * (kernel.read * size + 4 * kernel.written) for size in (4, 2)]
        times = [milliseconds(kernel, size) for size in (4, 2)]
        cells = (f"{moved[0]:,}", f"{moved[1]:,}", f"{kernel.exps * CLASSES:,}", *(f"{ms:.3f}" for ms in times))
        yield f"| {kernel.name} | {' | '.join(cells)} |"
    yield ""
    for size, name in ((4, "fp32"), (2, "bf16")):
        ratio = sum(milliseconds(kernel, size) for kernel in EXACT) / milliseconds(FLOOR, size)
        verdict = "yes" if ratio <= GOAL else "missed"
        yield f"Exact solver and divergence over the floor, {name}: {ratio:.2f}; goal: at most {GOAL}: {verdict}.\n"
    yield "They are two kernels, so both sides are read from memory twice.\n"


if __name__ == "__main__":
    print("\n".join(table()))
