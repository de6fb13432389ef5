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
)
def log_target() -> Any:
    """KL divergence of log-probabilities; 'batchmean' aligns with the mathematical definition."""
    return lambda student, teacher: F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


@LIBRARY.loss(
    "nn.KLDivLoss() (reduction=mean)", kind="logits", promises=Promises(definition="kl", reduction="elements")
)
def default() -> Any:
    """'mean' divides by rows and classes, which the documentation says is not the KL divergence."""
    loss = nn.KLDivLoss()
    return lambda student, teacher: loss(student.log_softmax(-1), teacher.softmax(-1))


@LIBRARY.loss(
    "nn.CrossEntropyLoss, probabilities as targets",
    kind="logits",
    promises=Promises(definition="cross_entropy", reduction="mean"),
)
def cross_entropy() -> Any:
    """Cross entropy with probabilities of the classes as targets, a mean over the batch."""
    loss = nn.CrossEntropyLoss()
    return lambda student, teacher: loss(student, teacher.softmax(-1))
