"""Keras on torch: its distillation losses."""

from __future__ import annotations

from typing import Any

from peers import Library

from tempering.conformance import Promises

LIBRARY = Library("keras", "3.15.1")


def logits(name: str, **arguments: Any) -> Any:
    def make() -> Any:
        import keras

        if "from_logits" in arguments:
            chosen: Any = keras.losses.CategoricalCrossentropy(from_logits=True)
        else:
            chosen = name

        def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
            made = keras.distillation.LogitsDistillation(temperature=float(temperature), loss=chosen)
            return made.compute_loss(teacher, student)

        return loss

    return make


LIBRARY.loss(
    "distillation.LogitsDistillation, loss=kl_divergence (its default)",
    kind="logits",
    promises=Promises(definition="kl", temperature_squared=True, reduction="mean"),
    documented="KL divergence of the softmaxes of both logits over T, times T^2.",
)(logits("kl_divergence"))
LIBRARY.loss(
    "distillation.LogitsDistillation, loss=categorical_crossentropy",
    kind="logits",
    promises=Promises(divergence=False),
    documented="An example in the documentation, LogitsDistillation(temperature=4.0, loss='categorical_crossentropy'): "
    "scales the logits by T and passes them to the loss of that name.",
)(logits("categorical_crossentropy"))


@LIBRARY.loss(
    "distillation.LogitsDistillation, loss=CategoricalCrossentropy(from_logits=True)",
    kind="logits",
    promises=Promises(divergence=False),
    documented="An example in the documentation: scales the logits by T and passes them to the loss.",
)
def cross_entropy() -> Any:
    return logits("", from_logits=True)()


def features(name: str, **promised: Any) -> None:
    @LIBRARY.loss(
        f"distillation.FeatureDistillation, loss={name}",
        kind="features",
        promises=Promises(**promised),
        documented="The mean of the named Keras loss of the teacher's and the student's features.",
    )
    def make() -> Any:
        import keras

        made = keras.distillation.FeatureDistillation(loss=name)
        return lambda student, teacher: made.compute_loss(teacher, student)


features("mse")
features("cosine_similarity", divergence=False)
