"""What a CUDA device shows in ten minutes: its numbers beside the CPU's, who waits for it, kernels and steps timed.

The record is written after every stage, so that a machine that is taken away leaves what was measured. A stage that
fails is recorded with its error, and the next begins; none begins after ``--minutes``.

Usage:
    python benchmarks/device.py [--minutes 10] [--device cuda] [--out DIR] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timing import RESULTS, ROOT, Variant, in_turn, machine
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

from tempering import distill
from tempering.kernels import chunked, linear_loss
from tempering.methods import DIST, DKD, DTKD, KD, Method
from tempering.models import build
from tempering.rows import Rows, total
from tempering.teachers import Live
from tempering.temperature import Sharpness
from tempering.utils.files import write_atomic
from tempering.utils.tensors import to_device

CASES = {
    "N=65536 C=100 fp32": (65536, 100, torch.float32),
    "N=16384 C=1000 fp32": (16384, 1000, torch.float32),
    "N=4096 V=32k fp32": (4096, 32_000, torch.float32),
    "N=4096 V=152k bf16": (4096, 152_000, torch.bfloat16),
}
TINY = {"N=8 C=50 fp32": (8, 50, torch.float32)}
Stage = Callable[[torch.device, bool], dict[str, Any]]


def close(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of what float32 arithmetic on another device may change: 1 is still equal."""
    got, wanted = got.double().cpu(), wanted.double()
    return float(((got - wanted).abs() / (1e-5 + 1e-4 * wanted.abs())).nan_to_num(1e9).max()) if wanted.numel() else 0.0


def hardware(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return what the device is, the bytes it copies in a second, and the exponentials it computes in one."""
    n = 1 << (16 if tiny else 28)
    source, target = torch.randn(n, device=device), torch.empty(n, device=device)
    small = source[: n // 16].clone()

    def exponentials() -> None:
        y = small
        for _ in range(8):
            y = torch.exp(-y.abs_())

    taken = {
        name: min(x)
        for name, x in in_turn({"copy": lambda: target.copy_(source), "exp": exponentials}, rounds=7).items()
    }
    found: dict[str, Any] = {
        "bytes_per_second": 8 * n / max(taken["copy"], 1e-9),
        "eager_exponentials_per_second": 8 * len(small) / max(taken["exp"], 1e-9),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def numbers(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return how far losses and gradients of every case of the contract are from the CPU's."""
    from tests.contract import CASES, block
    from tests.simulated import one_call

    worst: dict[str, float] = {}
    errors: dict[str, str] = {}
    kinds = {"": block()} if tiny else {"": block(), "weighted ": block(weighted=True)}
    for how, rows in kinds.items():
        for name, method in CASES[:12] if tiny else CASES:
            method.setup(rows)
            try:
                got, _ = one_call(method, rows, Counter(), str(device))
                wanted, _ = one_call(method, rows, Counter(), "cpu")
                worst[how + name] = max(map(close, got, wanted))
            except Exception as error:
                errors[how + name] = f"{type(error).__name__}: {error}"[:500]
    far = {name: x for name, x in worst.items() if x > 1.0}
    return {"cases": len(worst) + len(errors), "equal": len(worst) - len(far), "different": far, "errors": errors}


@contextmanager
def synchronizations(device: torch.device):
    """Count by line where the host waits for the device."""
    found: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            found[f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def waits(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return where the host waits for the device in the steps of a run that logs nothing."""
    from tests.simulated import Embedded, classified, tokens, written

    made: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(classified, method)
        for name, method in {"DTKD": DTKD(), "KD": KD(), "DKD": DKD(), "DIST": DIST()}.items()
    }
    made |= {
        "language": lambda: written(student=Embedded(8), teacher=Embedded(12)),
        "language, left padding": lambda: written(
            student=Embedded(8), teacher=Embedded(12), batches=tokens(side="left")
        ),
    }
    found: dict[str, Any] = {}
    for name, make in list(made.items())[: 1 if tiny else None]:
        marks: list[Counter[str]] = []
        with synchronizations(device) as seen:
            how = {"optimizer": partial(torch.optim.SGD, lr=0.05), "quiet": True, "log_every": 1000, "steps": 5}
            on_step = lambda step, loss, marks=marks, seen=seen: marks.append(Counter(seen))  # noqa: E731
            distill(**how | make() | {"accelerator": device.type, "on_step": on_step})
        found[name] = dict(marks[-2] - marks[1])
    return found


def resume(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return whether an interrupted run ends with the weights of one that was not."""
    from tests.simulated import resumed

    with tempfile.TemporaryDirectory() as folder:
        try:
            resumed(Path(folder), device.type)
        except AssertionError:
            return {"bit_equal": False}
    return {"bit_equal": True}


def logits(n: int, classes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return student's and teacher's logits and targets of one seed."""
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(n, classes, generator=generator).mul_(by).to(device, dtype) for by in (2.0, 3.0))
    return v, u, torch.randint(classes, (n,), generator=generator).to(device)


def gradient(method: Method, logits: tuple[Tensor, Tensor, Tensor], kind: str) -> Tensor:
    """Return the gradient in the student's logits: of the plain loss, in chunks, or in compiled chunks."""
    leaf = logits[0].detach().requires_grad_()
    rows = Rows(leaf, *logits[1:])
    loss = total(method(rows), rows) if kind == "plain" else chunked(method, rows, compile=kind == "compiled").loss
    return torch.autograd.grad(loss, leaf)[0]


def losses(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return every loss's milliseconds, and how far its gradient is from float64's.

    ``over_copy`` is the time over that of one read of both logits and one write of the gradient at the speed of a copy.
    """
    speed = hardware(device, tiny)["bytes_per_second"]
    options: dict[str, Any] = {"soft": 0.0, "hard": 0.0, "warmup": 0.0}
    methods: dict[str, Method] = {
        "KL at one temperature": KD(soft=1.0, hard=0.0),
        "dynamic term, published": DTKD(dynamic=1.0, temperature=Sharpness(4.0, solve="published"), **options),
        "dynamic term, exact": DTKD(dynamic=1.0, temperature=Sharpness(4.0), **options),
        "all three terms, exact": DTKD(warmup=0.0),
    }
    found: dict[str, Any] = {}
    for case, (n, classes, dtype) in (TINY if tiny else CASES).items():
        made = logits(n, classes, device, dtype)
        few = cast(
            "tuple[Tensor, Tensor, Tensor]", tuple(x[:64].cpu() for x in made)
        )  # float64 is slow on most devices
        few = (few[0].double(), few[1].double(), few[2])
        variants: dict[str, Variant] = {}
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, method in methods.items():
            wanted = gradient(method, few, "plain") * len(few[2]) / n
            for kind in ("plain", "chunks") if tiny else ("plain", "chunks", "compiled"):
                variant = partial(gradient, method, made, kind)
                try:
                    error = (variant()[:64].double().cpu() - wanted).norm() / wanted.norm()
                except Exception as raised:
                    failed[f"{name}, {kind}"] = f"{type(raised).__name__}: {raised}"[:500]
                else:
                    variants[f"{name}, {kind}"], errors[f"{name}, {kind}"] = variant, float(error)
        ideal = 3 * made[0].numel() * made[0].element_size() / speed
        taken = {name: min(x) for name, x in in_turn(variants, rounds=2 if tiny else 7, warm=2).items()}
        found[case] = {"ms_of_copy": 1e3 * ideal, "failed": failed} | {
            name: {"ms": 1e3 * x, "over_copy": x / ideal, "gradient_error": errors[name]} for name, x in taken.items()
        }
    return found


def heads(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return time and memory of a loss from hidden states and a head, beside the same from stored logits."""
    N, V, D = (16, 64, 8) if tiny else (4096, 152_000, 1024)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    h, taught = (torch.randn(N, D, device=device, dtype=dtype) for _ in range(2))
    heads = [nn.Linear(D, V, bias=False, device=device, dtype=dtype) for _ in range(2)]
    heads[1].requires_grad_(False)
    y = torch.randint(V, (N,), device=device)
    method = DTKD(warmup=0.0)

    def stored() -> None:
        leaf = h.detach().requires_grad_()
        rows = Rows(heads[0](leaf), heads[1](taught), y)
        total(method(rows), rows).backward()

    def fused(compile: bool) -> None:
        leaf = h.detach().requires_grad_()
        linear_loss(method, leaf, heads[0], taught, heads[1], target=y, compile=compile).loss.backward()

    variants: dict[str, Callable[[], None]] = {"stored logits": stored, "linear_loss": partial(fused, False)}
    variants |= {} if tiny else {"linear_loss, compiled": partial(fused, True)}
    found: dict[str, Any] = {}
    for name, run in variants.items():
        run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            found[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    for name, x in in_turn(variants, rounds=2 if tiny else 5).items():
        found.setdefault(name, {})["ms"] = 1e3 * min(x)
    return found


def steps(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return images a second of whole CIFAR steps: mdistiller's loop and ours."""
    from step import compiled, mdistiller, ours

    n = 4 if tiny else 1024
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(100, (n,), device=device)
    student, teacher = (
        build(name, classes=100).to(device)
        for name in (("resnet8", "resnet14") if tiny else ("resnet8x4", "resnet32x4"))
    )
    variants = {
        "mdistiller, KD": mdistiller(student, teacher, (x, y), name="KD", checkout=None),
        "ours, fp32": ours(student, Live(teacher, channels_last=True, fuse_conv_bn=True), (x, y), bf16=False),
        "ours, bf16": ours(student, Live(teacher, precision="bf16", fuse_conv_bn=True), (x, y), bf16=True),
    }
    variants |= {} if tiny else compiled(student, teacher, (x, y))
    return {
        name: {"images_per_second": n / min(t)}
        for name, t in in_turn(variants, rounds=2 if tiny else 7, warm=2).items()
    }


def transfers(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return milliseconds in which the host hands a batch of images to the device, by ``to_device`` and plainly."""
    batch = torch.randn(8 if tiny else 512, 3, 224, 224 if not tiny else 8)
    variants = {"plain": lambda: batch.to(device), "to_device": lambda: to_device(batch, device)}
    return {name: 1e3 * min(x) for name, x in in_turn(variants, rounds=5).items()}


STAGES: dict[str, Stage] = {
    "hardware": hardware,
    "numbers": numbers,
    "waits": waits,
    "resume": resume,
    "losses": losses,
    "heads": heads,
    "steps": steps,
    "transfers": transfers,
}


def main() -> None:
    """Run the stages in turn, and write the record after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="no stage begins after so many")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record, device-NAME.json")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that it runs, times nothing")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"no CUDA device; this is torch {torch.__version__}. --device cpu --tiny only tries the script")
    begun = time.monotonic()
    record: dict[str, Any] = {**machine(torch.get_num_threads()), "stages": {}}
    name = str(record["device"]).lower().replace(" ", "-")
    path = args.out / f"device-{name}.json"
    for title, stage in STAGES.items():
        if time.monotonic() - begun > 60.0 * args.minutes:
            record["stages"][title] = {"skipped": f"after {args.minutes:g} minutes"}
        else:
            start = time.monotonic()
            try:
                found = stage(device, args.tiny)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
            record["stages"][title] = {"seconds": round(time.monotonic() - start, 1), **found}
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record, indent=1) + "\n")
        print(title, json.dumps(record["stages"][title])[:400], flush=True)
    print(path)


if __name__ == "__main__":
    main()
