"""Schedules of the learning rate by name, with warm-up; and the standard CIFAR-100 recipe (mdistiller's).

The recipe is SGD with momentum 0.9 and weight decay 5e-4; learning rate 0.05, and 0.01 for MobileNets and ShuffleNets,
divided by 10 after epochs 150, 180 and 210 of 240.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from tempering.models import parted
from tempering.training.config import BEFORE_END

MILESTONES = (150 / 240, 180 / 240, 210 / 240)
LIGHT = ("mobilenet", "shuffle")  # networks that are trained at a fifth of the learning rate


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Return half a cosine, from 1 to 0, as torch's CosineAnnealingLR. Reference: arXiv:1608.03983."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Return a line from 1 to 0."""
    return 1.0 - progress


def step(progress: float) -> float:
    """Return 1, 0.1 and 0.01, a third of the run each, as for epochs 30 and 60 of 90 on ImageNet."""
    return 0.1 ** sum(progress >= third / 3 - 1e-9 for third in (1, 2))


SCHEDULES: dict[str, Callable[[float], float]] = {f.__name__: f for f in (constant, cosine, linear, step)}


def with_warmup(schedule: Callable[[float], float], warmup: float) -> Callable[[float], float]:
    """Return a schedule that rises linearly from 0 in the first ``warmup`` of the run; ``schedule`` spans the rest.

    With "cosine" and "linear" these are the factors of transformers' schedules of these names.
    """

    def factor(progress: float) -> float:
        if progress < warmup:
            return schedule(0.0) * progress / warmup
        rest = round((progress - warmup) / (1.0 - warmup), 12)  # else rounding misses milestones by a step
        return schedule(min(rest, BEFORE_END))

    return factor


def cifar_decay(progress: float) -> float:
    """Return the factor on the learning rate: divided by 10 after each milestone, a fraction of the run."""
    return 0.1 ** sum(progress >= m for m in MILESTONES)


def imagenet_decay(progress: float) -> float:
    """Return the factor on the learning rate: divided by 10 after 30, 60 and 90 % of the run."""
    return 0.1 ** sum(progress >= m - 1e-9 for m in (0.3, 0.6, 0.9))


def cifar_lr(name: str) -> float:
    """Return the initial learning rate of a network, by its name."""
    return 0.01 if parted(name)[1].lower().startswith(LIGHT) else 0.05


def cifar_sgd(lr: float) -> partial[torch.optim.SGD]:
    """Return the optimizer's constructor: parameter groups -> optimizer."""
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
