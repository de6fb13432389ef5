"""Rows and their one reduction: what every task ends as, and how terms become a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORE_INDEX = -100  # torch's ignore_index: a row whose target is negative has no label


@dataclass(frozen=True, slots=True)
class Rows:
    """N predictions of the student beside the teacher's.

    An image is a row, a kept anchor is a row, a valid token is a row. A class that may not be predicted is minus
    infinity on both sides. A row of weight 0 is left out of every term and gets no gradient.

    Args:
        student: (N, C) logits, carrying the gradient.
        teacher: (N, C) logits, carrying none.
        target: (N,) class indices; a negative one (torch's -100) means the row has no label. None: no labels at all.
        weight: (N,) non-negative weights. None: every row weighs 1.
        features: name -> (student's, teacher's) features, for methods that look inside.
        name: of this block of rows, as it stands in records and error messages.
        ids: which sample of the data set each row is, (N,), for methods that remember samples.
        places: where in its sample each row stands, (N,), such as the position of the token before it.
        private: how private what each row predicts is, (N,), 0 for not at all to 1. None: nothing is.
        hard: the task's own supervised loss of each row, (N,), with its gradient, where that is not the cross entropy
            of the target, as a detector's is not. Hard terms are then this.

    Raises:
        ValueError: for shapes that do not fit, a teacher that requires grad, a target that is not integer, or (seen on
            the CPU alone) weights that are negative or not finite, or a privacy outside [0, 1] where there is weight.
    """

    student: Float[Tensor, "N C"]
    teacher: Float[Tensor, "N C"]
    target: Int[Tensor, " N"] | None = None
    weight: Float[Tensor, " N"] | None = None
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    name: str = "logits"
    ids: Int[Tensor, " N"] | None = None
    positions: Int[Tensor, " N"] | None = None
    privacy_score: Float[Tensor, " N"] | None = None
    task_loss: Float[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        s, t = self.student, self.teacher
        if s.ndim != 2 or s.shape != t.shape:
            raise ValueError(
                f"Rows(name={self.name!r}) needs student and teacher of one shape (N, C); got {tuple(s.shape)} and "
                f"{tuple(t.shape)}. Other classes or a padded vocabulary? Cut, map or mask them (minus infinity on "
                "both sides) in the task, not in the loss. More dimensions? Flatten them: logits.flatten(0, -2)."
            )
        if t.requires_grad:
            raise ValueError(
                f"Rows(name={self.name!r}): the teacher's logits require grad, so the teacher would be trained. Wrap "
                "it in teachers.Live(model), or .detach() its output."
            )
        if not s.is_floating_point() or not t.is_floating_point():
            raise ValueError(
                f"Rows(name={self.name!r}) needs floating point logits; got student {s.dtype} and teacher {t.dtype}. "
                "Stored as integers? Convert with .float() first."
            )
        for label in ("target", "weight", "ids", "positions", "privacy_score", "task_loss"):
            value = getattr(self, label)
            if value is not None and value.shape != s.shape[:1]:
                raise ValueError(
                    f"Rows(name={self.name!r}) needs {label} of shape (N,) = ({s.shape[0]},); got {tuple(value.shape)}."
                )
        w = self.weight
        # looked at on the CPU alone, where it costs nothing
        if w is not None and w.device.type == "cpu" and not bool(((w >= 0) & torch.isfinite(w)).all()):
            raise ValueError(
                f"Rows(name={self.name!r}) needs weights >= 0 and finite; got {w.min().item():g} to "
                f"{w.max().item():g}. 0 leaves a row out."
            )
        if self.privacy_score is not None and self.privacy_score.device.type == "cpu":
            seen = self.privacy_score if w is None else self.privacy_score[w > 0]
            if not ((seen >= 0) & (seen <= 1)).all():
                raise ValueError(
                    f"Rows(name={self.name!r}) needs a privacy in [0, 1]; got {seen.min().item():g} to "
                    f"{seen.max().item():g}. 0 is public."
                )
        if self.target is not None and (self.target.is_floating_point() or self.target.dtype == torch.bool):
            raise ValueError(
                f"Rows(name={self.name!r}) needs class indices as target, an integer tensor; got {self.target.dtype}. "
                "One-hot or soft labels? Pass labels.argmax(-1), or let a teacher carry the soft ones."
            )

    def __len__(self) -> int:
        return self.student.shape[0]

    @property
    def total_weight(self) -> Float[Tensor, ""]:
        """The weight of these rows together, (): N where they have no weights."""
        if self.weight is None:
            return torch.tensor(float(len(self)), device=self.student.device)
        return self.weight.sum(dtype=upcast_to_float32(self.weight).dtype)

    def replace(self, **changes: object) -> Rows:
        """A copy with some fields exchanged."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


def upcast_to_float32(x: Tensor) -> Tensor:
    """``x`` in float32 at least; float64 stays float64. Temperatures and losses are computed so."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def expand_to_rows(value: Float[Tensor, ""], rows: Rows) -> Float[Tensor, " N"]:
    """A block's one value given to each of its rows, (N,): the mean over rows is the value itself."""
    return value.expand(len(rows))


def total(
    terms: Mapping[str, Float[Tensor, " N"]], rows: Rows, *, normalizer: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """The weighted mean of the rows' summed terms, (): the only reduction there is.

    Args:
        terms: name -> (N,), unreduced, as a method returns them.
        rows: the rows they belong to.
        normalizer: the weight of the whole optimizer step: all micro-batches, all ranks. Then the losses of the
            parts add up to the loss of the whole, however it was split. None: these rows are the whole.

    Returns:
        (); 0 with a gradient path where no row has any weight.

    Raises:
        ValueError: for no terms, or a term that is not (N,).
    """
    if not terms:
        raise ValueError("total() got no terms; a method returns at least one, {name: (N,)}")
    wrong = {name: tuple(term.shape) for name, term in terms.items() if term.shape != (len(rows),)}
    if wrong:
        raise ValueError(f"every term must have shape (N,) = ({len(rows)},), unreduced; got {wrong}")
    per_row = torch.stack(tuple(terms.values())).sum(0)
    if rows.weight is not None:
        weight = rows.weight.to(per_row.dtype)
        # where, not a product: a row of weight 0 may hold anything, also an infinity
        per_row = torch.where(weight > 0, per_row * weight, torch.zeros_like(per_row))
    whole = normalizer
    if whole is None:
        whole = rows.total_weight if rows.weight is not None else len(rows)
    if isinstance(whole, Tensor):
        whole = whole.to(device=per_row.device, dtype=per_row.dtype)
        return per_row.sum() / torch.where(whole > 0, whole, torch.ones_like(whole))
    return per_row.sum() / (whole if whole > 0 else 1.0)
