"""This library, held to everything that is promised anywhere on its methods, kernels and features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peers import Library
from tempering._version import __version__
from tempering.conformance import Promises
from tempering.conformance.adapters import of_method

LIBRARY = Library("", __version__)
ALL = Promises(
    definition="kl",
    temperature_squared=True,
    reduction="mean",
    ignored_rows=True,
    masked_classes=True,
    low_precision=True,
)


def on_logits(path: str, promises: Promises, documented: str, **arguments: Any) -> None:
    name = path.partition(",")[0]

    @LIBRARY.loss(path, kind="logits", promises=promises, documented=documented, said=("NaN in ignored rows",))
    def make() -> Any:
        from tempering import methods
        from tempering.temperature.static import Static

        def loss(student: Any, teacher: Any, labels: Any, temperature: float = 1.0, normalizer: Any = None) -> Any:
            method = getattr(methods, name)(temperature=Static(temperature), **arguments)
            return of_method(method)(student, teacher, labels, normalizer)

        return loss


SAID = "Weighted mean over rows of T_s T_t times the divergence named, without rows of weight 0; in float32 at least; "
SAID += "classes of minus infinity on both sides are left out."
on_logits("KD, hard=0", ALL, SAID, hard=0.0, soft=1.0)
for objective, definition in {"kl": "kl", "reverse_kl": "reverse_kl", "jsd": "jsd", "tvd": "total_variation"}.items():
    on_logits(f"Divergence, objective={objective}", replace(ALL, definition=definition), SAID, objective=objective)


@LIBRARY.loss(
    "kernels.linear_loss, KD, hard=0",
    kind="logits",
    promises=replace(ALL, masked_classes=None),  # a mask is an argument: hidden states cannot give minus infinity
    documented="The loss of a method on the logits of two heads, without the logits in memory, equal to the plain one.",
    said=("NaN in ignored rows",),
)
def fused() -> Any:
    from tempering.kernels import linear_loss
    from tempering.methods import KD
    from tempering.rows import IGNORE_INDEX
    from tempering.temperature.static import Static

    def loss(student: Any, teacher: Any, labels: Any, temperature: float = 1.0, normalizer: Any = None) -> Any:
        method = KD(hard=0.0, soft=1.0, temperature=Static(temperature))
        eye = torch.eye(student.shape[-1], dtype=student.dtype)
        given = {"target": labels, "weight": (labels != IGNORE_INDEX).float(), "normalizer": normalizer}
        return linear_loss(method, student, eye, teacher.detach(), eye.clone(), **given).loss

    return loss


def features(name: str, shape: tuple[int, ...], documented: str, scale: float | None = None) -> None:
    @LIBRARY.loss(
        f"methods.{name}, hard=0",
        kind="features",
        promises=Promises(
            feature_shape=shape, batch_dependent=True, identifies_teacher=False, divergence=True, scale_power=scale
        ),
        documented=documented,
        said=("no gradient into the teacher",),
    )
    def make() -> Any:
        from tempering import methods
        from tempering.rows import Rows, total

        def loss(student: Any, teacher: Any) -> Any:
            method = getattr(methods, name)(hard=0.0, feature=1.0, names=("last",))
            logits = student.flatten(1)
            rows = Rows(logits, logits.detach(), features={"last": (student, teacher.detach())})
            method.setup(rows)
            return total(method.to(student.dtype)(rows), rows)

        return loss


features("SP", (4,), "Squared distance of the row-normalized similarities of a batch.", 0.0)
features("PKT", (4,), "Divergence of the similarities of a batch, as probabilities.", 0.0)
features("RKD", (4,), "Distances, over their mean, and angles between the samples of a batch.", 0.0)
features("AT", (3, 2, 2), "Distance of normalized maps of squared activations.", 0.0)
