"""Compare several teachers, and teachers made of the student, on digits: every arm with the same students and steps.

python benchmarks/several_teachers.py OUT [--seeds 3] writes OUT/runs.jsonl, a line per run, and continues it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tempering as kd
from tempering.data import digits
from tempering.methods import KD, Mutual, Supervised
from tempering.models import build_seeded
from tempering.recipes.digits import SGD, decay
from tempering.tasks import validation_weights
from tempering.teachers import Ensemble, MeanTeacher, Routed

SUBSET, EPOCHS, TEACHER_EPOCHS, TEACHERS = 256, 40, 10, 3
build = partial(build_seeded, classes=10, channels=1)


def train(
    student: nn.Module, teacher: Any, method: Any, seed: int, *, epochs: int = EPOCHS, subset: bool = True
) -> float:
    """Return the test accuracy after the last epoch."""
    data = digits(batch_size=64, seed=seed)
    batches = data.train.subset(SUBSET) if subset else data.train
    run = kd.distill(
        student, teacher, batches, method=method, optimizer=partial(SGD, lr=0.05), schedule=decay, epochs=epochs,
        test=data.test, evaluate_every=epochs, seed=seed, quiet=True, skip_checks=["above chance"],
    )  # fmt: skip
    return run.facts["result"]["last"]["test"]["accuracy"]


def teachers() -> list[nn.Module]:
    """Return teachers that differ in their seeds."""
    out = [build("digits_large", seed=100 + i) for i in range(TEACHERS)]
    for i, net in enumerate(out):
        print(f"teacher {i}: {train(net, None, Supervised(), i, epochs=TEACHER_EPOCHS, subset=False):.4f}", flush=True)
    return out


def arms(nets: list[nn.Module], seed: int) -> dict[str, Callable[[], float]]:
    """Return arm -> what trains a new student of this seed and returns its accuracy."""
    split = digits(batch_size=64, seed=seed).validation
    assert split is not None

    def student(more: int = 0) -> nn.Module:
        return build("digits_small", seed=seed + more)

    def born_again() -> float:
        first = student()
        train(first, nets[0], KD(), seed)
        return train(student(1000), first, KD(), seed)

    route = torch.randint(TEACHERS, (100_000,), generator=torch.Generator().manual_seed(seed))
    kinds: dict[str, Callable[[], Any]] = {
        "one teacher": lambda: nets[0],
        "ensemble, logits": lambda: Ensemble(nets),
        "ensemble, probabilities": lambda: Ensemble(nets, mean="probabilities"),
        "ensemble, by confidence": lambda: Ensemble(nets, weights="confidence"),
        "ensemble, by validation": lambda: Ensemble(nets, weights=validation_weights(nets, split)),
        "routed at random": lambda: Routed(nets, by=route),
        "mean teacher": lambda: MeanTeacher(0.99),
    }
    runs: dict[str, Callable[[], float]] = {"supervised": lambda: train(student(), None, Supervised(), seed)}
    runs |= {name: lambda make=make: train(student(), make(), KD(), seed) for name, make in kinds.items()}
    return runs | {
        "mutual": lambda: train(student(), student(1000), Mutual(), seed),
        "born again, generation 2": born_again,
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(line["arm"], line["seed"]) for line in lines}
    nets = teachers()
    for seed in range(given.seeds):
        for arm, run in arms(nets, seed).items():
            if (arm, seed) not in done:
                line = {"arm": arm, "seed": seed, "accuracy": run(), "subset": SUBSET, "epochs": EPOCHS}
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
