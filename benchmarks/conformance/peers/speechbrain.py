"""SpeechBrain: its losses for knowledge distillation."""

from __future__ import annotations

from typing import Any

import torch

from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("speechbrain", "1.1.2", needs=("hyperpyyaml==1.2.2", "ruamel.yaml==0.18.10"), absent=("torchaudio",))


@LIBRARY.loss(
    "nnet.losses.nll_loss_kd",
    kind="tokens",
    promises=Promises(definition="cross_entropy", reduction="mean"),
    documented="Distillation by negative log-likelihood; the arguments are documented as the probabilities of the student "
    "and of the teacher, and are probabilities in the example.",
)
def likelihood() -> Any:
    from speechbrain.nnet.losses import nll_loss_kd

    return lambda student, teacher: nll_loss_kd(student.softmax(-1), teacher.softmax(-1), torch.ones(len(student)))


@LIBRARY.loss(
    "nnet.losses.nll_loss_kd, given log-probabilities of the student",
    kind="tokens",
    promises=Promises(definition="cross_entropy", reduction="mean"),
    documented="As above, with the log-probabilities that its recipes give it.",
)
def log_likelihood() -> Any:
    from speechbrain.nnet.losses import nll_loss_kd

    return lambda student, teacher: nll_loss_kd(student.log_softmax(-1), teacher.softmax(-1), torch.ones(len(student)))
