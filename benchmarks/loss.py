"""The loss alone, forward and backward, from logits: peers' expressions, our plain loss, and ours in chunks.

Speed is over the DTKD repository's dynamic term; peaks are in units of one logits tensor, the logits themselves left
out and the gradient counted.

Usage:
    python benchmarks/loss.py [--rounds 7] [--threads 1] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import RESTATED, dtkd_term, kd_term, trl_jsd
from timing import Sheet, Variant, arguments, device, grown, in_turn, peaks_of
from torch import Tensor

from tempering.kernels import chunked
from tempering.methods import DTKD, KD, Method
from tempering.rows import Rows, total
from tempering.temperature import Sharpness, Static
from tempering.temperature.sharpness import Solve

BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "N=1024 C=1000 fp32": (1024, 1000, FP32),
    "N=512 V=32k fp32": (512, 32_000, FP32),
    "N=4096 V=32k bf16": (4096, 32_000, BF16),
}
TINY = {"N=8 C=50 fp32": (8, 50, FP32)}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Temperatures(Method):
    """A policy's temperatures and next to nothing beside them: what part of a loss is theirs."""

    paper = "none: a benchmark's"

    def __init__(self, solve: Solve) -> None:
        super().__init__()
        self.temperature = Sharpness(4.0, solve=solve)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {"none": self.temperature(rows, progress).student.squeeze(1) + 0.0 * rows.student[:, 0]}


def ours(method: Method, *, chunks: bool, compile: bool | None = False) -> Loss:
    """Our loss, plain or in chunks."""

    def loss(v: Tensor, u: Tensor, y: Tensor) -> Tensor:
        rows = Rows(v, u, y)
        return chunked(method, rows, compile=compile).loss if chunks else total(method(rows), rows)

    return loss


def losses(*, compile: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    """Every variant by name, the baseline first, and what to say of some."""
    trl, which = trl_jsd()
    exact, published = (
        DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0, temperature=Sharpness(4.0, solve=solve))
        for solve in ("exact", "published")
    )
    whole = DTKD(warmup=0.0)
    variants: dict[str, Loss] = {
        "DTKD repository, dynamic term": lambda v, u, y: dtkd_term(v, u),
        "mdistiller KD term": lambda v, u, y: kd_term(v, u),
        "TRL generalised JSD": lambda v, u, y: trl(v, u),
        "ours, plain: dynamic term, published": ours(published, chunks=False),
        "ours, plain: dynamic term, exact": ours(exact, chunks=False),
        "ours, chunks: KL at one temperature": ours(KD(soft=1.0, hard=0.0, temperature=Static(4.0)), chunks=True),
        "ours, chunks: dynamic term, published": ours(published, chunks=True),
        "ours, chunks: dynamic term, exact": ours(exact, chunks=True),
        "ours, chunks: all three DTKD terms, exact": ours(whole, chunks=True),
    }
    if compile:
        variants |= {
            "ours, compiled: dynamic term, published": ours(published, chunks=True, compile=True),
            "ours, compiled: dynamic term, exact": ours(exact, chunks=True, compile=True),
            "ours, compiled: all three DTKD terms, exact": ours(whole, chunks=True, compile=True),
            "of it: published temperatures alone": ours(Temperatures("published"), chunks=True, compile=True),
            "of it: exact temperatures alone": ours(Temperatures("exact"), chunks=True, compile=True),
        }
    notes = {"DTKD repository, dynamic term": RESTATED, "mdistiller KD term": RESTATED, "TRL generalised JSD": which}
    return variants, notes


def variant(loss: Loss, n: int, classes: int, dtype: torch.dtype) -> Variant:
    """One forward and backward on fixed logits; the DTKD expressions get positive maxima, which they need."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, classes, generator=generator).mul_(by).to(device(), dtype) for by in (3.0, 2.0))
    y = torch.randint(classes, (n,), generator=generator).to(device())

    def run() -> None:
        leaf = v.detach().requires_grad_()
        loss(leaf, u, y).backward()

    return run


def main() -> None:
    """Time every variant in every case, then ask for its peak in a process of its own."""
    args = arguments(__doc__, rounds=7).parse_args()
    sheet = Sheet("loss", args)
    made, notes = losses(compile=not args.tiny)
    cases = TINY if args.tiny else CASES
    if args.peak:
        case, name = args.peak.split("|")
        n, classes, dtype = cases[case]
        print(grown(variant(made[name], n, classes, dtype), variant(made[name], 4, classes, dtype)))
        return
    for case, (n, classes, dtype) in cases.items():
        taken = in_turn({name: variant(loss, n, classes, dtype) for name, loss in made.items()}, rounds=args.rounds)
        one = n * classes * torch.empty(0, dtype=dtype).element_size()
        asked = made if classes > 10_000 and n < 2000 else {}
        peaks = peaks_of("loss.py", case, asked, args=args, one=one)
        sheet.add(case, taken, notes=notes, peaks=peaks, unit="logits tensors")
    print(sheet.write())


if __name__ == "__main__":
    main()
