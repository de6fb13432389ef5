"""TextBrewer: its losses on logits, attention scores and hidden states."""

from __future__ import annotations

from typing import Any

from peers import Library, bare
from tempering.conformance import Promises

LIBRARY = Library("textbrewer", "0.2.1.post1")


def losses() -> Any:
    bare("textbrewer")
    from textbrewer import losses as module

    return module


def on_logits(name: str, definition: str, divergence: bool | None, reduction: Any, documented: str) -> None:
    @LIBRARY.loss(
        f"losses.{name}",
        kind="logits",
        promises=Promises(definition=definition, divergence=divergence, reduction=reduction, sequences=True),
        documented=documented,
    )
    def make() -> Any:
        made = getattr(losses(), name)
        return lambda student, teacher, temperature=1.0: made(student, teacher, temperature)


on_logits("kd_ce_loss", "cross_entropy", None, "mean", "Cross entropy of logits at a temperature, rows or sequences.")
on_logits("kd_mse_loss", "mse", None, None, "Mean squared error of logits over a temperature, rows or sequences.")


def on_features(name: str, shape: tuple[int, ...], documented: str, listed: bool = False, **promised: Any) -> None:
    @LIBRARY.loss(
        f"losses.{name}",
        kind="features",
        promises=Promises(feature_shape=shape, **promised),
        documented=documented,
    )
    def make() -> Any:
        made = getattr(losses(), name)
        if listed:
            return lambda student, teacher: made([student, student], [teacher, teacher])
        return lambda student, teacher: made(student, teacher)


def mean_squared_error(student: Any, teacher: Any) -> Any:
    return (student - teacher).square().mean()


def attention_cross_entropy(student: Any, teacher: Any) -> Any:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


ATTENTION = "of attention scores (batch, heads, length, length)"
on_features("att_mse_loss", (1, 2, 2), f"Mean squared error {ATTENTION}.", definition=mean_squared_error)
on_features(
    "att_ce_loss",
    (1, 2, 2),
    f"Cross entropy {ATTENTION}, with a softmax over the last dimension.",
    definition=attention_cross_entropy,
    divergence=False,
)
on_features("hid_mse_loss", (2, 3), "Mean squared error of hidden states.", definition=mean_squared_error)
SIMILARITY = {"identifies_teacher": False, "divergence": True}
on_features("cos_loss", (2, 3), "Cosine similarity loss of hidden states.", **SIMILARITY)
on_features("pkd_loss", (3,), "Mean squared error of normalized vectors.", **SIMILARITY)
on_features("fsp_loss", (2, 3), "Mean squared error of products of two layers.", listed=True, **SIMILARITY)
on_features("mmd_loss", (2, 3), "Mean squared error of similarities of positions.", listed=True, **SIMILARITY)
