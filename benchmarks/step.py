"""One classification step, a batch to updated weights: mdistiller's loop against ours, live and cached teacher.

Usage:
    python benchmarks/step.py [--rounds 7] [--threads 1] [--batch 64] [--mdistiller DIR] [--dtkd DIR] [--tiny]

mdistiller and DTKD are repositories: given a checkout of one, its own distiller is timed; else mdistiller's with KD is
re-stated in peers.py, as torchdistill's step is. Ours has the DTKD loss.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from peers import CHECKOUT, CONFIG, RESTATED, Answering, Meters, distiller, mdistiller_step, torchdistill_step
from timing import Sheet, Variant, arguments, device, in_turn
from torch import Tensor, nn

from tempering.methods import DTKD
from tempering.models import build
from tempering.rows import Rows, total
from tempering.teachers import Live, Teacher

PAIRS = {"resnet32x4 -> resnet8x4": ("resnet32x4", "resnet8x4"), "resnet14 -> resnet8": ("resnet14", "resnet8")}
Batch = tuple[Tensor, Tensor]


def sgd(net: nn.Module) -> torch.optim.SGD:
    """The peers' optimizer, as they make it."""
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def mdistiller(student: nn.Module, teacher: nn.Module, batch: Batch, *, name: str, checkout: Path | None) -> Variant:
    """A step of its loop."""
    made = distiller(name, checkout)
    whole = made(Answering(copy.deepcopy(student)), Answering(copy.deepcopy(teacher)), CONFIG).train()
    whole.get_submodule("teacher").eval()
    return partial(mdistiller_step, whole, sgd(whole.get_submodule("student")), Meters(), batch)


def torchdistill(student: nn.Module, teacher: nn.Module, batch: Batch) -> Variant:
    """A step of its box."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    return partial(torchdistill_step, student, teacher, sgd(student), batch)


def ours(student: nn.Module, teacher: Teacher | Tensor, batch: Batch, *, bf16: bool, compile: bool = False) -> Variant:
    """Channels-last, DTKD, the mean loss kept where it is; a tensor for a teacher is a cache that holds its answers."""
    student = copy.deepcopy(student).to(memory_format=torch.channels_last)  # pyright: ignore
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, foreach=True)
    forward = torch.compile(student) if compile else student
    method, x = DTKD(warmup=0.0), batch[0].contiguous(memory_format=torch.channels_last)
    seen = torch.zeros((), device=x.device)
    order = torch.arange(len(x), device=x.device)

    def run() -> None:
        taught = teacher.index_select(0, order).float() if isinstance(teacher, Tensor) else teacher(x, None)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = forward(x)
        rows = Rows(logits, taught, batch[1])
        loss = total(method(rows), rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.add_(loss.detach())

    return run


def compiled(student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Variant]:
    """Both nets compiled, the teacher folded."""
    plain = Live(copy.deepcopy(teacher), channels_last=True, fuse_conv_bn=True, compile=True)
    half = Live(teacher, precision="bf16", fuse_conv_bn=True, compile=True)
    return {
        "ours, fp32, compiled": ours(student, plain, batch, bf16=False, compile=True),
        "ours, bf16, compiled": ours(student, half, batch, bf16=True, compile=True),
    }


def main() -> None:
    """Time the variants of every pair."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mdistiller", type=Path, default=None, help="root of a checkout of mdistiller")
    parser.add_argument("--dtkd", type=Path, default=None, help="root of a checkout of the DTKD repository")
    args = parser.parse_args()
    sheet = Sheet("step", args)
    n = 4 if args.tiny else args.batch
    pairs = {"resnet14 -> resnet8": ("resnet14", "resnet8")} if args.tiny else PAIRS
    for case, (large, small) in pairs.items():
        torch.manual_seed(0)
        x, y = torch.randn(n, 3, 32, 32, device=device()), torch.randint(100, (n,), device=device())
        student, teacher = (build(name, classes=100).to(device()) for name in (small, large))
        kept = Live(copy.deepcopy(teacher))(x).half()
        folded = Live(teacher, channels_last=True, fuse_conv_bn=True)
        half = Live(teacher, precision="bf16", fuse_conv_bn=True)
        theirs = {"mdistiller, KD": mdistiller(student, teacher, (x, y), name="KD", checkout=args.mdistiller)}
        if args.dtkd is not None:
            theirs["DTKD repository"] = mdistiller(student, teacher, (x, y), name="DTKD", checkout=args.dtkd)
        variants = {
            **theirs,
            "torchdistill, KDLoss": torchdistill(student, teacher, (x, y)),
            "ours, fp32": ours(student, Live(copy.deepcopy(teacher), channels_last=True), (x, y), bf16=False),
            "ours, fp32, teacher folded": ours(student, folded, (x, y), bf16=False),
            "ours, bf16, teacher folded": ours(student, half, (x, y), bf16=True),
            **({} if args.tiny else compiled(student, teacher, (x, y))),
            "ours, fp32, teacher cached": ours(student, kept, (x, y), bf16=False),
            "ours, bf16, teacher cached": ours(student, kept, (x, y), bf16=True),
        }
        taken = in_turn(variants, rounds=args.rounds, warm=2)
        notes = dict.fromkeys(variants, "") | {"torchdistill, KDLoss": RESTATED, "DTKD repository": CHECKOUT}
        notes["mdistiller, KD"] = RESTATED if args.mdistiller is None else CHECKOUT
        sheet.add(f"{case}, batch {n}", taken, notes=notes)
    print(sheet.write())


if __name__ == "__main__":
    main()
