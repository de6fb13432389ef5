"""How cost grows: the loss with rows and classes, the whole step with the batch, the engine's step with processes.

Every curve's first point is the 1 of its speeds. Losses are forward and backward in float32; "processes" are gloo
ranks on this machine that share one batch, so on two cores two of them are what there is to gain.

Usage:
    python benchmarks/growth.py [--rounds 5] [--threads 1] [--tiny]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.multiprocessing as mp
from timing import Sheet, Variant, arguments, device, in_turn

from tempering import distill
from tempering.kernels import chunked
from tempering.methods import DTKD, KD, Method
from tempering.models import build
from tempering.rows import Rows, total
from tempering.teachers import Live

LOSSES: dict[str, Method] = {"KD": KD(), "DTKD, exact": DTKD(warmup=0.0)}
SIZES = {"rows": (64, 256, 1024, 4096), "classes": (10, 100, 1000, 10_000), "batch": (16, 32, 64, 128)}
TINY = {"rows": (4, 8), "classes": (5, 10), "batch": (2, 4)}


def loss_of(method: Method, rows: int, classes: int, *, chunks: bool) -> Variant:
    """Forward and backward of one loss on fixed logits."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(rows, classes, generator=g).mul_(by).to(device()) for by in (3.0, 2.0))
    y = torch.randint(classes, (rows,), generator=g).to(device())

    def run() -> None:
        made = Rows(v.detach().requires_grad_(), u, y)
        (chunked(method, made, compile=False).loss if chunks else total(method(made), made)).backward()

    return run


def step_of(batch: int) -> Variant:
    """resnet14 -> resnet8 with a live teacher, to updated weights, in float32."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32, device=device()), torch.randint(100, (batch,), device=device())
    student, teacher = (build(name, classes=100).to(device()) for name in ("resnet8", "resnet14"))
    taught, optimizer, method = Live(teacher, fuse_conv_bn=True), torch.optim.SGD(student.parameters(), lr=0.01), DTKD()

    def run() -> None:
        rows = Rows(student(x), taught(x, None), y)
        total(method(rows), rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def variants(sizes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Variant]]]:
    """Every curve with its variants, named "what: size"."""
    for name, method in LOSSES.items():
        for chunks in (False, True):
            said, how = f"{name}{', in chunks' if chunks else ''}", {"chunks": chunks}
            yield f"rows, 1,000 classes: {said}", {f"{n}": loss_of(method, n, 1000, **how) for n in sizes["rows"]}
            yield f"classes, 256 rows: {said}", {f"{c}": loss_of(method, 256, c, **how) for c in sizes["classes"]}
    yield "batch: resnet14 -> resnet8, fp32", {f"{n}": step_of(n) for n in sizes["batch"]}


def one_rank(rank: int, world: int, port: int, steps: int, out: Any) -> None:
    """Milliseconds of the clock a step of ``distill`` as one of several ranks; rank 0 answers."""
    import os

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    torch.manual_seed(0)
    each = 64 // world
    data = [(torch.randn(each, 3, 32, 32), torch.randint(100, (each,))) for _ in range(2)]

    class Shared(list):  # type: ignore[type-arg]
        def shard(self, rank: int, world: int) -> Shared:
            return self

    took: list[float] = []
    student, teacher = build("resnet8", classes=100), Live(build("resnet14", classes=100), fuse_conv_bn=True)
    distill(
        student,
        teacher,
        Shared(data),
        method=DTKD(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        steps=steps,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        selfcheck=False,
        quiet=True,
        on_step=lambda step, loss: took.append(time.perf_counter()),
    )
    if rank == 0:
        out.put(1000.0 * statistics.median(b - a for a, b in pairwise(took[1:])))


def ranks(world: int, steps: int, port: int) -> float:
    """The median step of a run of ``world`` ranks that share a batch of 64."""
    context: Any = mp.get_context("spawn")
    out = context.Queue()
    started = [context.Process(target=one_rank, args=(r, world, port, steps, out)) for r in range(world)]
    for process in started:
        process.start()
    found = out.get(timeout=600)
    for process in started:
        process.join()
    return float(found)


def main() -> None:
    """Time every curve; processes by the clock, since they wait for each other."""
    args = arguments(__doc__, rounds=5).parse_args()
    sheet = Sheet("growth", args)
    for case, made in variants(TINY if args.tiny else SIZES):
        sheet.add(case, in_turn(made, rounds=args.rounds))
    if not args.tiny and isinstance(device(), torch.device) and device().type == "cpu":
        taken = {f"{world}": [ranks(world, 4 + 4 * args.rounds, 29511 + world) / 1000.0] for world in (1, 2)}
        sheet.add("processes sharing a batch of 64: resnet14 -> resnet8, the engine", taken)
    print(sheet.write())


if __name__ == "__main__":
    main()
