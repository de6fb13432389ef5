"""KD-Lib: the losses of its distillers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from torch import nn

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("KD-Lib", "0.0.32", absent=("transformers", "pandas", "matplotlib", "contextualized_topic_models"))


def method(path: str, name: str) -> Any:
    module, _, folder = path.rpartition(".")
    bare("KD_Lib", "KD_Lib.KD", "KD_Lib.KD.vision", f"KD_Lib.KD.vision.{module or folder}")
    stand_in("KD_Lib.KD.common", BaseClass=object)
    return getattr(importlib.import_module(f"KD_Lib.KD.vision.{path}"), name).calculate_kd_loss


def register(path: str, name: str, loss_fn: Any, promises: Promises, documented: str, **more: Any) -> None:
    @LIBRARY.loss(
        f"KD.vision.{name}, its default loss function, distil_weight=1",
        kind="logits",
        promises=promises,
        documented=documented,
        unsaid=("no gradient into the teacher", *more.pop("unsaid", ())),
    )
    def make() -> Any:
        compute = method(path, name)

        def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
            held = SimpleNamespace(temp=temperature, distil_weight=1.0, loss_fn=loss_fn, device="cpu", gen=1, **more)
            # the labels are the teacher's own predictions, so that no target is corrected
            return compute(held, student, teacher, teacher.argmax(-1))

        return loss


SQUARE = Promises(definition="mse_of_probabilities", temperature_squared=True)
register(
    "vanilla.vanilla_kd",
    "VanillaKD",
    nn.MSELoss(),
    SQUARE,
    "Distillation of Hinton et al.; the loss function (by default mean squared error) of both softmaxes at the "
    "temperature, times its square.",
)
KL = Promises(definition="kl", temperature_squared=True)
register("noisy.messy_collab", "MessyCollab", nn.KLDivLoss(), KL, "KL divergence at the temperature, times its square.")
register("BANN.BANN", "BANN", nn.KLDivLoss(), KL, "Born-again networks: KL divergence at the temperature.")
register(
    "teacher_free.self_training",
    "SelfTraining",
    nn.KLDivLoss(),
    Promises(definition="kl"),
    "Self-training (1909.11723): KL divergence to the pre-trained student; 'temp' is the distillation temperature.",
)
ADJUSTED = "Knowledge adjustment of 1911.07471: KL divergence to the teacher's probabilities, which are "
register(
    "KA.PS",
    "ProbShift",
    nn.KLDivLoss(reduction="batchmean"),
    Promises(definition="kl", reduction="mean"),
    ADJUSTED + "swapped where its prediction is wrong; here it is right everywhere.",
    label_loss=nn.CrossEntropyLoss(),
    unsaid=("order of the classes",),
)
register(
    "KA.LSR",
    "LabelSmoothReg",
    nn.KLDivLoss(reduction="batchmean"),
    Promises(definition="kl", reduction="mean"),
    ADJUSTED + "smoothed where its prediction is wrong; here it is right everywhere.",
    correct_prob=0.9,
    unsaid=("order of the classes",),
)


def on_features(path: str, name: str, shape: tuple[int, ...], documented: str) -> None:
    @LIBRARY.loss(
        f"KD.vision.{name}",
        kind="features",
        promises=Promises(feature_shape=shape, batch_dependent=True, identifies_teacher=False),
        documented=documented,
    )
    def make() -> Any:
        bare("KD_Lib", "KD_Lib.KD", "KD_Lib.KD.vision", f"KD_Lib.KD.vision.{path.split('.')[0]}")
        made = getattr(importlib.import_module(f"KD_Lib.KD.vision.{path}"), name)()
        if name == "ATLoss":
            return lambda student, teacher: made([teacher], [student])
        return lambda student, teacher: made(teacher, student)


on_features("RKD.loss_metric", "RKDLoss", (4,), "Distances and angles between the samples of a batch.")
on_features("attention.loss_metric", "ATLoss", (3, 2, 2), "Distance of normalized maps of squared activations.")
