"""What a loss promises: its definition, temperature scale, mask and reduction."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["logits", "tokens", "top_k", "features", "scores"]
KINDS: tuple[Kind, ...] = ("logits", "tokens", "top_k", "features", "scores")
Definition = Callable[..., Any]
"""(student (N, C), teacher (N, C), temperature), float64 -> (N,); a parameter ``target`` gets the labels (N,)."""
DEFINITION_NAMES = (
    "kl",
    "reverse_kl",
    "cross_entropy",
    "jsd",
    "jsd(0.1)",
    "jsd(0.9)",
    "mse",
    "mse_of_probabilities",
    "total_variation",
    "l1",
    "smooth_l1",
    "cosine",
)
"""Keys of ``definitions.DEFINITIONS``; this module imports no torch, so that the command's help does not."""
Reduction = Literal["mean", "sum", "batch", "elements", "none"]
Tail = Literal["truncated", "renormalized", "bucket"]


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What the documentation of a loss says. None: nothing is said, and a difference is no failure.

    Args:
        definition: the divergence of one row without its temperature scale, a key of ``DEFINITIONS`` or a function
            (see ``Definition``); for features and scores the function takes both sides and returns the loss. None: the
            harness looks for the known definition that the loss computes, and compares with that.
        temperature: T of a loss without an argument ``temperature``.
        temperature_squared: whether the loss is multiplied by T^2.
        reduction: "mean" over valid rows, "sum" over them, "batch" (sum over the rows, divided by the first dimension),
            "elements" (mean over rows and classes), "none" (a value per row).
        batch_dependent: whether a row's loss depends on other rows.
        divergence: whether the loss is 0 at agreement and positive elsewhere. None: as the definition.
        identifies_teacher: whether a student at the minimum has the teacher's probabilities. None: yes, for a
            divergence.
        detached_scale: whether factors of the loss are constants for the gradient (weights, adaptive temperatures), so
            that the gradient is not the slope of the value.
        ignored_rows: whether rows labeled -100 (or masked; for features: masked positions) are left out.
        sequences: for logits: whether (B, T, V) logits give the loss of their B * T rows.
        shift: for tokens: position i predicts the label of position i + shift.
        masked_classes: whether logits may be minus infinity on both sides.
        masked_teacher: whether the teacher's logits alone may be minus infinity.
        padded_vocabulary: whether a teacher with more columns than the student, or the reverse, is allowed.
        low_precision: whether logits may be bfloat16, with the arithmetic in float32.
        shift_invariant: whether a constant added to a row's logits has no effect (unless the definition depends on it).
            None: yes, if the definition is known.
        class_order: whether the order of the classes has no effect.
        row_order: whether the order of the rows has no effect.
        tail: for top-k: the teacher's mass outside its list is "truncated" (left out), the list is "renormalized", or
            the mass is one more class (a "bucket").
        sampled: for top-k: the entries are classes drawn from the teacher, and the loss is unbiased.
        top_k_values: for top-k: what the list holds: "log_probs", "probs" or "logits".
        feature_shape: for features: their shape without the batch dimension. A mask has this shape without its last
            dimension, such as (N, L) for (N, L, D).
        scale_power: for features: the loss of both sides multiplied by c is c to this power times the loss.
    """

    definition: str | Definition | None = None
    temperature: float = 1.0
    temperature_squared: bool | None = None
    reduction: Reduction | None = None
    batch_dependent: bool = False
    divergence: bool | None = None
    identifies_teacher: bool | None = None
    detached_scale: bool = False
    ignored_rows: bool | None = None
    sequences: bool | None = None
    shift: int = 0
    masked_classes: bool | None = None
    masked_teacher: bool | None = None
    padded_vocabulary: bool | None = None
    low_precision: bool | None = None
    shift_invariant: bool | None = None
    class_order: bool = True
    row_order: bool = True
    tail: Tail | None = None
    sampled: bool = False
    top_k_values: Literal["log_probs", "probs", "logits"] = "log_probs"
    feature_shape: tuple[int, ...] = (4,)
    scale_power: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.definition, str) and self.definition not in DEFINITION_NAMES:
            raise ValueError(
                f"definition must be a function or one of {', '.join(DEFINITION_NAMES)}; got {self.definition!r}."
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite; got {self.temperature!r}.")


def takes(function: Callable[..., object], *names: str) -> str | None:
    """Return the first of these names that is a parameter of the function, or None."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in names if name in parameters), None)
