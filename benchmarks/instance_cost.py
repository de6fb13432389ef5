"""What a training step costs with Instance's temperature over KD's, in one process, the steps taken in turn.

Usage:
    python benchmarks/instance_cost.py [--student resnet8x4] [--teacher resnet32x4] [--batch 64] [--steps 40]

Outside a span (where the agent acts and does not learn) the ratio is to stay at or below 1.25; within one it is shown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import nn

from tempering.methods import KD, Method
from tempering.models import build
from tempering.rows import Rows, total
from tempering.temperature import Instance, Static


def step(
    method: Method,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    progress: float,
) -> float:
    """Seconds of one step as the engine makes it, the second forward for a bandit's reward included."""
    begun = time.perf_counter()
    with torch.no_grad():
        taught = teacher(x)
    rows = Rows(student(x), taught, y)
    total(method(rows, progress), rows).backward()
    optimizer.step()
    with torch.no_grad():
        for policy in method.adaptive_policies():
            reward = None
            if policy.needs_reward:
                student.eval()
                after = nn.functional.cross_entropy(student(x), y, reduction="none")
                student.train()
                reward = nn.functional.cross_entropy(rows.student, y, reduction="none") - after
            policy.update(reward)
    optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    """Print a line a method: median milliseconds, and the median ratio to KD's step beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.randn(args.batch, 3, 32, 32, device=device), torch.randint(100, (args.batch,), device=device)
    teacher = build(args.teacher, classes=100).eval().to(device)
    variants: dict[str, tuple[Method, float]] = {"KD": (KD(temperature=Static(4.0)), 0.5)}
    for form in ("ppo", "bandit", "published"):
        for where, progress in (("outside a span", 30 / 240), ("in a span", 40 / 240)):
            variants[f"Instance({form}), {where}"] = (KD(temperature=Instance(form=form)), progress)
    parts = {}
    for name, (method, progress) in variants.items():
        student = build(args.student, classes=100).to(device)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        parts[name] = (method.to(device), student, optimizer, progress)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(args.steps + 3):
        for name, (method, student, optimizer, progress) in parts.items():
            took = step(method, student, teacher, optimizer, x, y, progress)
            if round_ >= 3:
                seconds[name].append(took)
    print(f"{args.teacher} -> {args.student}, batch {args.batch}, {device}, {platform.machine()}, {torch.__version__}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["KD"], strict=True))
        print(f"{name:38s} {1e3 * statistics.median(values):8.2f} ms  {ratio:6.3f} x KD")


if __name__ == "__main__":
    main()
