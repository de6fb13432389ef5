"""torch: the functions that most of the others are made of, in the ways in which their documentation calls them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("", torch.__version__.partition("+")[0])


@LIBRARY.loss(
    "nn.functional.kl_div, reduction=batchmean, log_target=True",
    kind="logits",
    promises=Promises(definition="kl", reduction="mean"),
    documented="KL divergence of log-probabilities; 'batchmean' aligns with the mathematical definition.",
)
def log_target() -> Any:
    return lambda student, teacher: F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


@LIBRARY.loss(
    "nn.KLDivLoss() (reduction=mean)",
    kind="logits",
    promises=Promises(definition="kl", reduction="elements"),
    documented="'mean' divides by rows and classes, which the documentation says is not the KL divergence.",
)
def default() -> Any:
    loss = nn.KLDivLoss()
    return lambda student, teacher: loss(student.log_softmax(-1), teacher.softmax(-1))


@LIBRARY.loss(
    "nn.CrossEntropyLoss, probabilities as targets",
    kind="logits",
    promises=Promises(definition="cross_entropy", reduction="mean"),
    documented="Cross entropy with probabilities of the classes as targets, a mean over the batch.",
)
def cross_entropy() -> Any:
    loss = nn.CrossEntropyLoss()
    return lambda student, teacher: loss(student, teacher.softmax(-1))
