"""Optimize as in the standard CIFAR-100 recipe of the distillation literature (mdistiller's).

SGD with momentum 0.9 and weight decay 5e-4; learning rate 0.05, and 0.01 for MobileNets and ShuffleNets, divided by 10
after epochs 150, 180 and 210 of 240.
"""

from __future__ import annotations

from functools import partial

import torch

from tempering.models import parted

MILESTONES = (150 / 240, 180 / 240, 210 / 240)
LIGHT = ("mobilenet", "shuffle")  # networks that are trained at a fifth of the learning rate


def cifar_decay(progress: float) -> float:
    """Return the factor on the learning rate: divided by 10 after each milestone, a fraction of the run."""
    return 0.1 ** sum(progress >= m for m in MILESTONES)


def cifar_lr(name: str) -> float:
    """Return the initial learning rate of a network, by its name."""
    return 0.01 if parted(name)[1].lower().startswith(LIGHT) else 0.05


def cifar_sgd(lr: float) -> partial[torch.optim.SGD]:
    """Return the optimizer's constructor: parameter groups -> optimizer."""
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
