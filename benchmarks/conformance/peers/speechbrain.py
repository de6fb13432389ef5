"""SpeechBrain: its losses for knowledge distillation."""

from __future__ import annotations

from typing import Any

import torch

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("speechbrain", "1.1.2", absent=("torchaudio",))


def likelihood() -> Any:
    bare("speechbrain", "speechbrain.nnet")
    for name in ("dataio", "decoders", "utils"):
        stand_in(f"speechbrain.{name}", __path__=[])
    stand_in("speechbrain.dataio.dataio", length_to_mask=mask_of)
    stand_in("speechbrain.decoders.ctc", filter_ctc_output=None)
    stand_in("speechbrain.utils.data_utils", unsqueeze_as=None)
    stand_in("speechbrain.utils.logger", get_logger=lambda name: None)
    from speechbrain.nnet.losses import nll_loss_kd

    return nll_loss_kd


def mask_of(lengths: Any, max_len: int, dtype: Any, device: Any) -> Any:
    return (torch.arange(max_len) < lengths[:, None]).to(dtype)


@LIBRARY.loss("nnet.losses.nll_loss_kd", kind="tokens", promises=Promises(definition="cross_entropy", reduction="mean"))
def of_probabilities() -> Any:
    """Distillation by negative log-likelihood; the arguments are documented as the probabilities of both sides,
    and are probabilities in the example."""
    made = likelihood()
    return lambda student, teacher: made(student.softmax(-1), teacher.softmax(-1), torch.ones(len(student)))


@LIBRARY.loss(
    "nnet.losses.nll_loss_kd, given log-probabilities of the student",
    kind="tokens",
    promises=Promises(definition="cross_entropy", reduction="mean"),
)
def of_log_probabilities() -> Any:
    """As above, with the log-probabilities that its recipes give it."""
    made = likelihood()
    return lambda student, teacher: made(student.log_softmax(-1), teacher.softmax(-1), torch.ones(len(student)))
