"""From hidden states to the loss and back, against the four matrix products alone.

Peaks are in units of one logits tensor in the inputs' dtype, the gradient of the head counted. Liger's chunked loss is
timed where liger-kernel is installed.

Usage:
    python benchmarks/fused_linear.py [--rounds 5] [--threads 1] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peers import dtkd_term, trl_jsd
from timing import Sheet, Variant, arguments, device, grown, in_turn, installed, peaks_of
from torch import Tensor

from tempering.kernels import linear_loss
from tempering.methods import DTKD
from tempering.temperature import Sharpness

CASES = {
    "N=512 V=32k H=512/1024 fp32": (512, 32_000, 512, 1024, torch.float32),
    "N=1024 V=32k H=1024/2048 bf16": (1024, 32_000, 1024, 2048, torch.bfloat16),
}
TINY = {"N=16 V=64 H=8/16 fp32": (16, 64, 8, 16, torch.float32)}
PRODUCTS = "the four matrix products alone"


class Sides(NamedTuple):
    """Hidden states (N, H) and heads (V, H) of both sides, and targets."""

    hs: Tensor
    ws: Tensor
    ht: Tensor
    wt: Tensor
    y: Tensor


def sides(n: int, V: int, H: int, H_t: int, dtype: torch.dtype) -> Sides:
    """Logits of a spread of 2 and 3."""
    g = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, by: float) -> Tensor:
        return torch.randn(rows, columns, generator=g).mul_(by).to(device(), dtype)

    hs, ws = normal(n, H, 1.0).requires_grad_(), normal(V, H, 2.0 * H**-0.5).requires_grad_()
    y = torch.randint(V, (n,), generator=g).to(device())
    return Sides(hs, ws, normal(n, H_t, 1.0), normal(V, H_t, 3.0 * H_t**-0.5), y)


def products(x: Sides, *, upcast: bool = False) -> None:
    """Both sides' logits and the two products of the way back, over rows in fours, so that no logits are held.

    ``upcast`` makes the logits in float32, as DTKD's gradient needs them, also of inputs of half precision.
    """
    by_head, own = torch.zeros_like(x.ws), x.ws.dtype
    dtype = torch.float32 if upcast else own
    with torch.no_grad():
        for part in torch.arange(len(x.hs)).split(max(1, len(x.hs) // 4)):
            v = (x.hs[part].to(dtype) @ x.ws.to(dtype).T).to(own)
            torch.mm(x.ht[part].to(dtype), x.wt.to(dtype).T)
            torch.mm(v, x.ws)
            by_head.addmm_(v.T, x.hs[part])


def dense(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sides], None]:
    """A loss of logits that are held whole."""

    def run(x: Sides) -> None:
        loss(x.hs @ x.ws.T, x.ht @ x.wt.T).backward()

    return run


def ours(method: DTKD, **how: Any) -> Callable[[Sides], None]:
    """Ours, by its options."""

    def run(x: Sides) -> None:
        linear_loss(method, *x[:4], target=x.y, **how).loss.backward()

    return run


def liger(compiled: bool) -> Callable[[Sides], None]:
    """Liger's chunked JSD at chunks of 256."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled, chunk_size=256)

    def run(x: Sides) -> None:
        loss(x.hs, x.ws, x.ht, x.wt, x.y).backward()

    return run


def variants(*, compile: bool) -> tuple[dict[str, Callable[[Sides], None]], dict[str, str]]:
    """Every variant by name, the products first, and what to say of some."""
    trl, which = trl_jsd()
    published, exact = (
        DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0, temperature=Sharpness(4.0, solve=solve))
        for solve in ("published", "exact")
    )
    made = {
        PRODUCTS: products,
        "the same, logits' in float32": partial(products, upcast=True),
        "logits, DTKD repository's term": dense(lambda v, u: dtkd_term(v, u)),
        "logits, TRL generalised JSD": dense(trl),
        "ours, published, eager": ours(published, compile=False),
    }
    if compile:
        made |= {
            "ours, published, compiled": ours(published, compile=True),
            "ours, exact, compiled": ours(exact, compile=True),
            "ours, exact, compiled, logits in bf16": ours(exact, compile=True, upcast=False),
        }
    if installed("liger_kernel"):
        made |= {"Liger JSD, chunks of 256": liger(False), "Liger JSD, compiled": liger(True)}
    notes = {"logits, DTKD repository's term": "re-stated", "logits, TRL generalised JSD": which}
    return made, notes


def main() -> None:
    """Time every variant in every case, then ask for its peak in a process of its own."""
    args = arguments(__doc__, rounds=5).parse_args()
    sheet = Sheet("fused_linear", args)
    made, notes = variants(compile=not args.tiny)
    cases = TINY if args.tiny else CASES

    def bound(name: str, x: Sides) -> Variant:
        def run() -> None:
            x.hs.grad = x.ws.grad = None
            made[name](x)

        return run

    if args.peak:
        case, name = args.peak.split("|")
        n, V, *rest = cases[case]
        print(grown(bound(name, sides(n, V, *rest)), bound(name, sides(8, 64, *rest))))
        return
    for case, sizes in cases.items():
        x = sides(*sizes)
        taken = in_turn({name: bound(name, x) for name in made}, rounds=args.rounds)
        one = sizes[0] * sizes[1] * x.hs.element_size()
        asked = () if args.tiny else made
        peaks = peaks_of("fused_linear.py", case, asked, args=args, one=one)
        sheet.add(case, taken, notes=notes, peaks=peaks, unit="logits tensors")
    print(sheet.write())


if __name__ == "__main__":
    main()
