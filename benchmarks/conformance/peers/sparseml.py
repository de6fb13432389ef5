"""SparseML: the losses of its distillation modifiers."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("sparseml", "1.8.0")


class Modifier:
    """What its class statements look at."""

    sparsification_types = property(lambda self: None)


@LIBRARY.loss(
    "pytorch.sparsification.distillation.kl_logsoftmax",
    kind="logits",
    promises=Promises(definition="kl", temperature_squared=True, reduction="mean", sequences=True),
)
def divergence() -> Any:
    """Nothing is said; its callers give it the logits and the temperature of distillation."""
    bare(
        "sparseml",
        "sparseml.pytorch",
        "sparseml.pytorch.sparsification",
        "sparseml.pytorch.sparsification.distillation",
    )
    stand_in("sparseml.optim", BaseModifier=Modifier, ModifierProp=lambda *a, **kw: lambda f: property(f))
    base = type("Base", (), {"log_call": lambda f: f})
    stand_in("sparseml.pytorch.sparsification.modifier", ScheduledModifier=base, ScheduledUpdateModifier=base)
    stand_in("sparseml.pytorch.utils", BaseLogger=object, device_of=None, tensors_module_forward=None)
    stand_in("sparseml.sparsification", SparsificationTypes=MagicMock())
    from sparseml.pytorch.sparsification.distillation.modifier_distillation_base import kl_logsoftmax

    return lambda student, teacher, temperature=1.0: kl_logsoftmax(student, teacher, temperature)


def comparison(name: str, documented: str, unsaid: tuple[str, ...] = ()) -> None:
    @LIBRARY.loss(
        f"modifiers.distillation.utils.pytorch.kd_factory.{name}_comparison",
        kind="features",
        promises=Promises(),
        documented=documented,
        unsaid=unsaid,
    )
    def make() -> Any:
        bare(
            "sparseml", "sparseml.modifiers", "sparseml.modifiers.distillation", "sparseml.modifiers.distillation.utils"
        )
        bare("sparseml.modifiers.distillation.utils.pytorch")
        stand_in("sparseml.core", State=object)
        from sparseml.modifiers.distillation.utils.pytorch import kd_factory

        compare = getattr(kd_factory, f"{name}_comparison")(f"{name}_distance" if name.startswith("l") else name)
        return lambda student, teacher: compare(student, teacher).mean()


comparison("l1", "Nothing is said; the sum of absolute differences.")
comparison("l2", "Nothing is said; the sum of squared differences.")
comparison("square_head", "The loss of SquareHead: squared error over the teacher's squares.", ("constant features",))
