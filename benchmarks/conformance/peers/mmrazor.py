"""MMRazor: its losses on logits and features."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from peers import Library, Unregistered, bare, stand_in
from tempering.conformance import Promises
from tempering.conformance.definitions import kl

LIBRARY = Library("mmrazor", "1.0.0")


def module(name: str) -> Any:
    bare("mmrazor", "mmrazor.models", "mmrazor.models.losses")
    stand_in("mmrazor.registry", MODELS=Unregistered())
    return importlib.import_module(f"mmrazor.models.losses.{name}")


@LIBRARY.loss(
    "models.losses.KLDivergence",
    kind="logits",
    promises=Promises(definition="kl", reduction="mean", temperature_squared=True),
    said=("no gradient into the teacher",),
)
def divergence() -> Any:
    """KL divergence at a temperature; by default the sum is divided by the batch size; (N, C) or maps."""
    made = module("kl_divergence").KLDivergence
    return lambda student, teacher, temperature=1.0: made(tau=temperature)(student, teacher)


def decoupled(student: Tensor, teacher: Tensor, temperature: float, *, target: Tensor) -> Tensor:
    is_target = torch.nn.functional.one_hot(target, student.shape[-1]).bool()
    pairs, rest = [], []
    for logits in (student, teacher):
        log_p = torch.log_softmax(logits / temperature, -1)
        own = log_p.gather(-1, target[:, None])
        pairs.append(torch.cat((own, log_p.masked_fill(is_target, -torch.inf).logsumexp(-1, keepdim=True)), -1))
        rest.append(logits.masked_fill(is_target, -torch.inf))
    return kl(pairs[0], pairs[1], 1.0) + kl(rest[0], rest[1], temperature)


@LIBRARY.loss(
    "models.losses.DKDLoss, alpha=1, beta=1",
    kind="logits",
    promises=Promises(definition=decoupled, reduction="mean", temperature_squared=True, identifies_teacher=False),
)
def dkd() -> Any:
    """Target and non-target parts of the divergence, of 2203.08679; the reduction is 'batchmean' by default: the
    sum of the output is divided by the batch size."""
    made = module("decoupled_kd").DKDLoss

    def loss(student: Any, teacher: Any, labels: Any, temperature: float = 1.0) -> Any:
        return made(tau=temperature)(student, teacher, labels.clamp(min=0))

    return loss


@LIBRARY.loss(
    "models.losses.DISTLoss",
    kind="logits",
    promises=Promises(divergence=True, batch_dependent=True, identifies_teacher=False),
    unsaid=("slope", "zero at agreement", "stationary at agreement"),
)
def dist() -> Any:
    """Nothing is said; the name is that of the Pearson distances of DIST; a correlation with something constant is
    undefined, and nearly so at the largest temperatures."""
    made = module("dist_loss").DISTLoss
    return lambda student, teacher, temperature=1.0: made(tau=temperature)(student, teacher)


@LIBRARY.loss(
    "models.losses.PKDLoss",
    kind="features",
    promises=Promises(feature_shape=(3, 2, 2), batch_dependent=True, identifies_teacher=False),
)
def pearson() -> Any:
    """Mean squared error of features that are normalized per channel over the batch."""
    made = module("pkd_loss").PKDLoss()
    return lambda student, teacher: made(student, teacher)


@LIBRARY.loss(
    "models.losses.ChannelWiseDivergence",
    kind="features",
    promises=Promises(feature_shape=(3, 2, 2), identifies_teacher=False),
)
def channels() -> Any:
    """Divergence of the softmaxes over positions of every channel, times T^2 over the number of channels."""
    made = module("cwd").ChannelWiseDivergence()
    return lambda student, teacher: made(student, teacher)
