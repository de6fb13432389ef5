"""Distill pixels, labels and numbers of images of shapes: 3 seeds, beside the student alone; and time a step.

Command:  python benchmarks/dense.py                (--seeds 0 1 2, --out FOLDER, --speed)
Hardware: one CPU core; some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tempering as kd
from tempering.data import synthetic_masks

ROOT = Path(__file__).parents[1]
ADAM = partial(torch.optim.Adam, lr=2e-3)
EPOCHS, TEACHER_EPOCHS = 8, 16
KD, Supervised, RegressionKD = kd.methods.KD, kd.methods.Supervised, kd.methods.RegressionKD


class Problem(NamedTuple):
    """A task, its outputs, the labels made from masks, and the methods compared; the first is the control."""

    task: Callable[[], Any]
    outputs: int
    labels: Callable[[Tensor], Tensor]
    methods: dict[str, Callable[[], Any]]
    metric: str
    dense: bool = False


def present(masks: Tensor) -> Tensor:
    """Which shapes are in an image, (N, 3)."""
    return torch.stack([(masks == c).flatten(1).any(1) for c in (1, 2, 3)], 1).long()


def covered(masks: Tensor) -> Tensor:
    """The share of an image that each shape covers, in units of 10 %, (N, 3)."""
    return torch.stack([(masks == c).flatten(1).float().mean(1) * 10 for c in (1, 2, 3)], 1)


SOFT = {"alone": Supervised, "kd": lambda: KD(soft=0.5, hard=0.5, temperature=2.0)}
PROBLEMS = {
    "segmentation": Problem(
        lambda: kd.tasks.Segmentation(features={"maps": ("4", "4")}),
        4,
        lambda masks: masks,
        SOFT | {"kd + cwd": lambda: kd.methods.Sum(SOFT["kd"](), kd.methods.CWD(hard=0.0, names=["maps"]))},
        "miou",
        dense=True,
    ),
    "several labels": Problem(kd.tasks.MultiLabel, 3, present, SOFT, "map"),
    "numbers": Problem(
        kd.tasks.Regression,
        3,
        covered,
        {"alone": Supervised, "teacher": RegressionKD, "bound": lambda: RegressionKD(bound=0.0)},
        "rmse",
    ),
}


def net(width: int, outputs: int, *, dense: bool, seed: int) -> nn.Module:
    """A convolutional net of stride 4, whose module "4" gives its last maps."""
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    body += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU()]
    if dense:
        return nn.Sequential(*body, nn.Conv2d(2 * width, outputs, 1))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, outputs))


def loaders(problem: Problem, size: int = 32) -> tuple[Any, Any]:
    data = synthetic_masks(size=size, train=160, test=160)
    for loader in (data.train, data.test):
        images, masks, ids = loader.dataset.tensors
        loader.dataset.tensors = (images, problem.labels(masks), ids)
    return data.train, data.test


def run(name: str, seed: int) -> dict[str, float]:
    """The score of the teacher and of a student per method."""
    problem = PROBLEMS[name]
    train, test = loaders(problem)
    options: dict[str, Any] = {
        "optimizer": ADAM,
        "schedule": "cosine",
        "quiet": True,
        "seed": seed,
        "evaluate_every": 100,
    }
    task = problem.task()
    build = partial(net, outputs=problem.outputs, dense=problem.dense)
    teacher = build(16, seed=100 + seed)
    taught = kd.distill(
        teacher, None, train, method="supervised", test=test, epochs=TEACHER_EPOCHS, task=type(task)(), **options
    )
    out = {"the teacher": taught.last["test"][problem.metric]}
    for arm, method in problem.methods.items():
        torch.manual_seed(seed)
        student = build(4, seed=seed)
        made = kd.distill(student, teacher, train, method=method(), test=test, epochs=EPOCHS, task=task, **options)
        out[arm] = made.last["test"][problem.metric]
    return out


def plain(name: str, student: nn.Module, teacher: nn.Module, batches: list[Any]) -> None:
    """The loop that one would write."""
    optimizer = ADAM(student.parameters())
    for images, labels in batches:
        with torch.no_grad():
            u = teacher(images)
        v = student(images)
        if name == "segmentation":
            u, v = (F.interpolate(z, labels.shape[1:], mode="bilinear", align_corners=False) for z in (u, v))
            kl = F.kl_div((v / 2).log_softmax(1), (u / 2).softmax(1), reduction="none").sum(1)
            known = labels != 255
            loss = 2.0 * kl[known].mean() + 0.5 * F.cross_entropy(v, labels.long(), ignore_index=255)
        elif name == "several labels":
            p = (u / 2).sigmoid()
            soft = F.binary_cross_entropy_with_logits(v / 2, p) - F.binary_cross_entropy(p, p)
            loss = 2.0 * soft + 0.5 * F.binary_cross_entropy_with_logits(v, labels.float())
        else:
            loss = F.mse_loss(v, u) + F.mse_loss(v, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def speed(name: str, *, steps: int = 30, size: int = 64, repeats: int = 7) -> dict[str, float]:
    """CPU milliseconds of a step of distill and of the plain loop, in turn; the median of their ratios."""
    problem = PROBLEMS[name]
    train, _ = loaders(problem, size)
    batches = [batch[:2] for batch in train]
    batches = (batches * (1 + steps // len(batches)))[:steps]
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    task = type(problem.task())()
    for _ in range(repeats):
        build = partial(net, outputs=problem.outputs, dense=problem.dense)
        teacher, student = build(64, seed=0).eval().requires_grad_(False), build(32, seed=1)
        marks: list[float] = []
        kd.distill(student, teacher, batches, method=(RegressionKD if name == "numbers" else SOFT["kd"])(), task=task,
                   optimizer=ADAM, epochs=1, quiet=True, selfcheck=False, log_every=10**6,
                   on_step=lambda *_, marks=marks: marks.append(time.process_time()))  # fmt: skip
        times["ours"].append((marks[-1] - marks[0]) / (len(marks) - 1))
        plain(name, build(32, seed=1), teacher, batches[:1])
        start = time.process_time()
        plain(name, build(32, seed=1), teacher, batches[1:])
        times["plain"].append((time.process_time() - start) / (steps - 1))
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
    return {side: 1000 * statistics.median(values) for side, values in times.items()} | {"ratio": ratio}


def table(records: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| problem | score | method | mean ± sample standard deviation | minus alone, per seed |",
        "|---|---|---|---|---|",
    ]
    for name, runs in records.items():
        metric = PROBLEMS[name].metric
        for arm in runs[0]:
            values = [run[arm] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            gaps = "" if arm == "alone" else ", ".join(f"{run[arm] - run['alone']:+.3f}" for run in runs)
            lines.append(f"| {name} | {metric} | {arm} | {statistics.mean(values):.3f} ± {spread:.3f} | {gaps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dense-shapes")
    parser.add_argument("--speed", action="store_true", help="time steps instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.speed:
        for name in PROBLEMS:
            print(name, {key: round(value, 3) for key, value in speed(name).items()}, flush=True)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, float]]] = {name: [] for name in PROBLEMS}
    for seed in args.seeds:
        for name, runs in records.items():
            runs.append(run(name, seed))
            print(name, seed, runs[-1], flush=True)
    (args.out / "scores.json").write_text(json.dumps({"seeds": args.seeds, "scores": records}, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
