"""Keras on torch: its distillation losses."""

from __future__ import annotations

from typing import Any

from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("keras", "3.15.1", needs=("optree==0.17.0", "namex==0.1.0", "ml_dtypes==0.5.3", "h5py==3.14.0"))


def register(
    loss: str,
    documented: str,
    promises: Promises,
    *,
    instance: str = "",
    unsaid: tuple[str, ...] = (),
    **arguments: Any,
) -> None:
    @LIBRARY.loss(
        f"distillation.LogitsDistillation, loss={loss}",
        kind="logits",
        promises=promises,
        documented=documented,
        unsaid=unsaid,
    )
    def make() -> Any:
        import keras

        chosen = getattr(keras.losses, instance)(**arguments) if instance else loss.split(" ")[0]

        def compute(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
            made = keras.distillation.LogitsDistillation(temperature=float(temperature), loss=chosen)
            return made.compute_loss(teacher, student)

        return compute


KL = Promises(definition="kl", temperature_squared=True, reduction="mean")
CROSS_ENTROPY = Promises(definition="cross_entropy", divergence=False)
register(
    "kl_divergence (its default)",
    "The default. Applies temperature scaling to the logits (a softmax temperature) and computes the named loss of "
    "teacher and student.",
    KL,
)
register(
    "KLDivergence()",
    "As the default, given as an instance of a Keras loss, whose example clips probabilities at 1e-7.",
    KL,
    instance="KLDivergence",
    unsaid=("confident rows",),
)
EXAMPLE = (
    "An example of the documentation: temperature is for softmax scaling; the named loss between teacher and student."
)
register("categorical_crossentropy", EXAMPLE, CROSS_ENTROPY)
register(
    "CategoricalCrossentropy(from_logits=True)",
    EXAMPLE,
    CROSS_ENTROPY,
    instance="CategoricalCrossentropy",
    from_logits=True,
)


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
