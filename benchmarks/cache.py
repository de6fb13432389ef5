"""Reading a batch of a teacher's stored answers at random: one torch file a sample (torchdistill's way) against ours.

Usage:
    python benchmarks/cache.py [--rounds 30] [--rows 50000] [--files 4096] [--tiny]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from timing import Sheet, Variant, arguments, in_turn
from torch import nn

from tempering.data import Batches
from tempering.teachers import Cached, Live, record

CLASSES, BATCH, READS = 100, 64, 20


def files(folder: Path, count: int) -> Variant:
    """One file a sample, read and stacked: a batch a call."""
    folder.mkdir()
    for i in range(count):
        torch.save(torch.randn(CLASSES), folder / f"{i}.pt")
    generator = torch.Generator().manual_seed(0)

    def read() -> None:
        for _ in range(READS):
            ids = torch.randint(count, (BATCH,), generator=generator).tolist()
            torch.stack([torch.load(folder / f"{i}.pt", weights_only=True) for i in ids])

    return read


def ours(folder: Path, rows: int) -> Variant:
    """The cache that ``record`` writes, by sample id."""
    images = torch.randint(256, (rows, 1, 2, 2), dtype=torch.uint8)
    batches = Batches(images, torch.zeros(rows, dtype=torch.int64), batch_size=4096, mean=[0.5], std=[0.5])
    teacher = Live(nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)))
    record(teacher, batches, folder, quiet=True)
    cached = Cached(folder, batches=batches)
    generator = torch.Generator().manual_seed(0)

    def read() -> None:
        for _ in range(READS):
            ids = torch.randint(rows, (BATCH,), generator=generator)
            cached(ids, ids)

    return read


def main() -> None:
    """Time both; the milliseconds are those of a batch."""
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--files", type=int, default=4096)
    args = parser.parse_args()
    sheet = Sheet("cache", args)
    torch.manual_seed(0)
    rows, count = (256, 64) if args.tiny else (args.rows, args.files)
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "one torch file a sample": files(Path(folder, "files"), count),
            "ours, memory-mapped": ours(Path(folder, "cache"), rows),
        }
        taken = in_turn(variants, rounds=args.rounds, warm=2)
    notes = {"one torch file a sample": f"torchdistill's way, re-stated; {count} files"}
    sheet.add(f"{rows} x {CLASSES}, 64 rows at random", taken, notes=notes, per=READS)
    print(sheet.write())


if __name__ == "__main__":
    main()
