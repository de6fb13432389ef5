"""From hidden states to the loss and back: the chunked losses that people use today, beside ours, at the same work.

Every variant computes one divergence at temperature 1, the mean over rows, and its gradient in the student's hidden
states and, unless it is frozen, in its head. Peers are imported from where ``make bench`` puts them, or left out;
torchtune's needs the logits of both sides. Notes have versions, and the relative error of the gradient in the hidden
states. A variant that would take minutes, in half precision on a CPU without instructions for it, runs at the
smallest size only.

Usage:
    python benchmarks/chunked_losses.py [--rounds 3] [--threads 1] [--width 256] [--cases "N=512 *"] [--tiny]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fused_linear import Sides, sides
from timing import Sheet, arguments, grown, in_turn, peaks_of
from torch import Tensor

from tempering.kernels import linear_loss
from tempering.methods import DTKD, KD, Divergence, Method
from tempering.rows import Rows, total
from tempering.temperature import Static
from tempering.utils.device import has_native_bf16

KL, JSD = "KL", "JSD"
Run = Callable[[Sides], Tensor]
OURS: dict[str, Method] = {KL: KD(soft=1.0, hard=0.0, temperature=Static(1.0)), JSD: Divergence(objective="jsd")}


class Case(NamedTuple):
    """One size."""

    n: int
    V: int
    dtype: torch.dtype
    objective: str = KL
    frozen: bool = False

    def __str__(self) -> str:
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"N={self.n} V={self.V} {dtype} {self.objective}{', frozen head' if self.frozen else ''}"


SIZES = [(n, V) for V in (32_000, 152_000) for n in (512, 2048, 4096)]
CASES = [
    *(Case(n, V, dtype) for dtype in (torch.float32, torch.bfloat16) for n, V in SIZES),
    *(Case(2048, 32_000, dtype, frozen=True) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(2048, 32_000, dtype, JSD) for dtype in (torch.float32, torch.bfloat16)),
]
TINY = [Case(16, 64, torch.float32), Case(16, 64, torch.float32, JSD, frozen=True)]


def ours(method: Method, compile: bool, x: Sides) -> Tensor:
    """Return our loss."""
    return linear_loss(method, *x[:4], target=x.y, compile=compile).loss


def trl(objective: str) -> Run:
    """Return the chunked loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # pyright: ignore

    def run(x: Sides) -> Tensor:
        mask = torch.ones(1, len(x.hs), dtype=torch.long, device=x.hs.device)
        return _chunked_divergence_loss(x.hs[None], x.ht[None], x.ws, x.wt, mask, 0.0 if objective == KL else 0.5)[0]

    return run


def liger(objective: str) -> Run:
    """Return Liger's fused loss at its default size of a chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    beta = 0.0 if objective == KL else 0.5
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return lambda x: loss(x.hs, x.ws, x.ht, x.wt, x.y)


def torchtune(objective: str) -> Run:
    """Return torchtune's loss in eight chunks of logits: its file alone, as its package needs old releases."""
    if objective != KL:
        raise ImportError("torchtune has no JSD")
    found = importlib.util.find_spec("torchtune")
    if found is None or found.origin is None:
        raise ImportError("torchtune is not installed")
    path = Path(found.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ForwardKLWithChunkedOutputLoss()

    def run(x: Sides) -> Tensor:
        with torch.no_grad():
            taught = [part[None] @ x.wt.T for part in x.ht.chunk(8)]
        return loss([part[None] @ x.ws.T for part in x.hs.chunk(8)], taught, x.y[None])

    return run


PEERS = {"TRL": ("trl", trl), "Liger": ("liger-kernel", liger), "torchtune": ("torchtune", torchtune)}


def variants(objective: str, *, compile: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Return every variant that is installed by name, and its version."""
    made: dict[str, Run] = {}
    versions: dict[str, str] = {}
    for name, (package, make) in PEERS.items():
        try:
            made[name], versions[name] = make(objective), f"{package} {metadata.version(package)}"
        except ImportError:
            continue
    made["ours, eager"] = partial(ours, OURS[objective], False)
    if compile:
        made["ours"] = partial(ours, OURS[objective], True)
        made["ours, DTKD's exact dynamic term"] = partial(ours, DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0), True)
    return made, versions


def made_for(case: Case, width: int) -> Sides:
    """Return hidden states and heads of a case."""
    x = sides(case.n, case.V, width, width, case.dtype)
    x.ws.requires_grad_(not case.frozen)
    return x


def slow(name: str, case: Case) -> bool:
    """Whether a variant multiplies in half precision where the device has no instructions for it."""
    emulated = case.dtype == torch.bfloat16 and not has_native_bf16("cuda" if torch.cuda.is_available() else "cpu")
    return emulated and name in ("Liger", "torchtune") and case.n * case.V > 512 * 32_000


def step(run: Run, x: Sides) -> None:
    """Compute one loss and its gradients."""
    x.hs.grad = x.ws.grad = None
    run(x).backward()


def error(run: Run, method: Method, x: Sides) -> float:
    """Return the relative error of the gradient in the first 32 rows' hidden states, against float64."""
    step(run, x)
    assert x.hs.grad is not None
    got = x.hs.grad[:32].double().cpu()
    hs = x.hs.detach()[:32].double().cpu().requires_grad_()
    ht, ws, wt = (z.detach().double().cpu() for z in (x.ht[:32], x.ws, x.wt))
    rows = Rows(hs @ ws.T, ht @ wt.T, x.y[:32].cpu())
    wanted = torch.autograd.grad(total(method(rows), rows), hs)[0] * len(hs) / len(x.hs)
    return float((got - wanted).norm() / wanted.norm())


def main() -> None:
    """Time every variant in every case, then ask for its peak in a process of its own."""
    parser = arguments(__doc__, rounds=3, width=256)
    parser.add_argument("--cases", default="*", help="pattern of the cases to run; others stay as they were")
    args: Any = parser.parse_args()
    sheet = Sheet("chunked_losses", args)
    cases = {str(case): case for case in (TINY if args.tiny else CASES) if fnmatchcase(str(case), args.cases)}
    if args.peak:
        title, name = args.peak.split("|")
        run, case = variants(cases[title].objective, compile=not args.tiny)[0][name], cases[title]
        small = made_for(case._replace(n=8, V=64), args.width)
        print(grown(partial(step, run, made_for(case, args.width)), partial(step, run, small)))
        return
    sheet.keep(cases)
    for title, case in cases.items():
        made, notes = variants(case.objective, compile=not args.tiny)
        made = {name: run for name, run in made.items() if not slow(name, case)}
        x = made_for(case, args.width)
        for name, run in made.items():
            method = OURS[case.objective] if "DTKD" not in name else DTKD(dynamic=1.0, soft=0.0, hard=0.0, warmup=0.0)
            off = f"gradient off by {error(run, method, x):.1g}"
            notes[name] = f"{notes[name]}, {off}" if name in notes else off
        taken = in_turn({name: partial(step, run, x) for name, run in made.items()}, rounds=args.rounds, warm=0)
        one = case.n * case.V * x.hs.element_size()
        del x
        peaks = {} if args.tiny else peaks_of("chunked_losses.py", title, made, args=args, one=one)
        sheet.add(title, taken, notes=notes, peaks=peaks, unit="logits tensors")
        if not args.tiny:
            sheet.write()
    print(sheet.write())


if __name__ == "__main__":
    main()
