"""Rows, the output of every task, and ``total``, the reduction of loss terms to a scalar."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE_INDEX = -100  # torch's ignore_index
TEACHER_OUTPUTS = "teacher_outputs"  # column of a batch with the teacher's outputs
GAUSSIAN = "gaussian"  # name of a block whose columns are the mean and the log variance of a number
UNLABELED = (IGNORE_INDEX, -1)  # targets of rows without a label
# optional fields (N,) of Rows
PER_ROW = (
    "target",
    "weight",
    "ids",
    "positions",
    "privacy_score",
    "task_loss",
    "teacher_loss",
    "sampled_id",
    "rollout_log_prob",
    "text",
    "reward",
)


@dataclass(frozen=True, slots=True)
class Rows:
    """N student predictions with the teacher's predictions for the same inputs.

    Rows are images, pixels, selected anchors or valid tokens. Of one logit z, as of a label that a sample has or not,
    rows are ``binary_logits(z)``: the divergences of the methods are then those of Bernoulli distributions, KL at T
    with the factor T^2 included. Numbers to regress are rows of one column (or of a mean and a log variance, in a block
    named ``GAUSSIAN``) with a ``task_loss``, for ``methods.RegressionKD`` and methods over features.

    Classes that must not be predicted are minus infinity on both sides. Rows of weight 0 are left out of every term and
    get no gradient.

    Args:
        student: (N, C) logits, with gradient.
        teacher: (N, C) logits, without gradient.
        target: (N,) class indices of any integer type, kept as int64; -100 (torch's) and -1 mark rows without a label.
            Such a row is learned from the teacher alone: its hard terms are 0 and it counts in the mean like any other.
            Or soft labels, (N, C) probabilities, as of MixUp; a row of zeros has no label. None: no labels.
        weight: (N,) non-negative weights. None: every row has weight 1. 0 leaves a row out of all terms and the mean.
        features: name -> (student features, teacher features), for methods that match features.
        name: name of this block of rows in records and error messages.
        ids: (N,) index in the data set of each row's sample, for methods that keep state per sample.
        positions: (N,) position of each row in its sample, such as the position of the token before it.
        privacy_score: (N,) how private each row's prediction is, from 0 (public) to 1. None: all rows are public.
        task_loss: (N,) the task's own supervised loss per row, with gradient, for tasks whose loss is not the cross
            entropy of the target, such as detection. Hard terms then use this loss.
        teacher_loss: (N,) the teacher's own loss in units of ``task_loss``, for methods that it bounds.
        sampled_id: (N,) the class that was sampled, of rows of generated texts; None: the rows are not sampled.
        rollout_log_prob: (N,) its log-probability where it was sampled, in nats, after temperature and cuts.
        text: (N,) the index of each row's text in the micro-batch.
        reward: (N,) the reward of each row's text, less a baseline if there is one.
        reference: (N, C) logits of a reference model, such as the initial student, without gradient.
        label_smoothing: share of the label's probability that the cross entropy spreads over all classes, in [0, 1].

    Raises:
        TypeError: for a field that is not a tensor, such as a list or a numpy array.
        ValueError: for shapes that do not match, logits that are sparse, on the meta device or of 8 bits, a teacher
            that requires grad, a target that is neither class indices nor soft labels, label smoothing outside
            [0, 1], or (checked on the CPU only) weights that are negative or not finite, a target below 0 other than
            -100 and -1, soft labels that are no probabilities, or a privacy score outside [0, 1] on a row of positive
            weight.
    """

    student: Float[Tensor, "N C"]
    teacher: Float[Tensor, "N C"]
    target: Int[Tensor, " N"] | Float[Tensor, "N C"] | None = None
    weight: Float[Tensor, " N"] | None = None
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    name: str = "logits"
    ids: Int[Tensor, " N"] | None = None
    positions: Int[Tensor, " N"] | None = None
    privacy_score: Float[Tensor, " N"] | None = None
    task_loss: Float[Tensor, " N"] | None = None
    teacher_loss: Float[Tensor, " N"] | None = None
    sampled_id: Int[Tensor, " N"] | None = None
    rollout_log_prob: Float[Tensor, " N"] | None = None
    text: Int[Tensor, " N"] | None = None
    reward: Float[Tensor, " N"] | None = None
    reference: Float[Tensor, "N C"] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        s, t = self.student, self.teacher
        if not all(isinstance(value, Tensor) for label in FIELDS if (value := getattr(self, label)) is not None):
            raise _not_a_tensor(self)
        if any(z.layout != torch.strided or z.device.type == "meta" or z.element_size() < 2 for z in (s, t)):
            raise _not_computable(self)
        if s.ndim != 2 or s.shape != t.shape:
            raise ValueError(
                f"Rows(name={self.name!r}) needs student and teacher of one shape (N, C); got {tuple(s.shape)} and "
                f"{tuple(t.shape)}. Other classes or a padded vocabulary? Cut, map or mask them (minus infinity on "
                "both sides) in the task, not in the loss. More dimensions? Flatten them: logits.flatten(0, -2)."
            )
        if self.reference is not None and (self.reference.shape != s.shape or self.reference.requires_grad):
            raise ValueError(
                f"Rows(name={self.name!r}) needs reference of shape {tuple(s.shape)} without gradient; got "
                f"{tuple(self.reference.shape)}."
            )
        if t.requires_grad:
            raise ValueError(
                f"Rows(name={self.name!r}): the teacher's logits require grad, so the teacher would be trained. Wrap "
                "it in teachers.Live(model), or .detach() its output."
            )
        if not s.is_floating_point() or not t.is_floating_point():
            raise _not_computable(self)
        for label in PER_ROW:
            value = getattr(self, label)
            if value is not None and value.shape != s.shape[:1] and not (label == "target" and is_soft(value)):
                raise _other_shape(self, label, value)
        w = self.weight
        # checked on the CPU only, where it needs no synchronization
        if w is not None and w.device.type == "cpu" and not bool(((w >= 0) & torch.isfinite(w)).all()):
            raise ValueError(
                f"Rows(name={self.name!r}) needs weights >= 0 and finite; got {w.min().item():g} to "
                f"{w.max().item():g}. 0 leaves out the row."
            )
        if self.privacy_score is not None and self.privacy_score.device.type == "cpu":
            scores = self.privacy_score if w is None else self.privacy_score[w > 0]
            if not ((scores >= 0) & (scores <= 1)).all():
                raise ValueError(
                    f"Rows(name={self.name!r}) needs privacy_score in [0, 1]; got {scores.min().item():g} to "
                    f"{scores.max().item():g}. 0 is public."
                )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"Rows(name={self.name!r}) needs label_smoothing in [0, 1]; got {self.label_smoothing}.")
        y = self.target
        if y is not None and y.ndim == 2:
            _check_soft(self, y)
            return
        if y is not None and (y.is_floating_point() or y.dtype == torch.bool):
            raise ValueError(
                f"Rows(name={self.name!r}) needs class indices as target, an integer tensor, or soft labels "
                f"(N, C); got {y.dtype} {tuple(y.shape)}. Write target.long()"
                f"{'' if y.dtype == torch.bool else ', unless they are numbers to regress: see task_loss'}."
            )
        if y is not None and (y.dtype != torch.int64 or (y.device.type == "cpu" and len(y) and int(y.min()) < 0)):
            object.__setattr__(self, "target", class_indices(y, f"Rows(name={self.name!r})"))

    def __len__(self) -> int:
        return self.student.shape[0]

    @property
    def total_weight(self) -> Float[Tensor, ""]:
        """The sum of the weights, (); N if there are none."""
        if self.weight is None:
            return torch.full((), float(len(self)), device=self.student.device)
        return self.weight.sum(dtype=upcast_to_float32(self.weight).dtype)

    def replace(self, **changes: object) -> Rows:
        """Return a copy with the given fields replaced, as ``dataclasses.replace`` does."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def select(self, index: slice | Tensor) -> Rows:
        """Return some of the rows, with their features: a slice, a mask (N,) or indices (K,).

        Rows of samples with several rows each are selected by a slice of whole samples.
        """
        of_features, per = index, rows_per_sample(self)
        if per > 1 and isinstance(index, slice):
            of_features = slice(*(None if i is None else i // per for i in (index.start, index.stop)))
        tensors = {name: getattr(self, name) for name in FIELDS}
        return self.replace(
            features={name: (s[of_features], t[of_features]) for name, (s, t) in self.features.items()},
            **{name: x[index] for name, x in tensors.items() if x is not None},
        )


FIELDS = ("student", "teacher", "reference", *PER_ROW)
SEVERAL_LABELS = "Use task=tasks.MultiLabel(): each label is a choice of two, in a row of its own."


def _not_a_tensor(rows: Rows) -> TypeError:
    fields: dict[str, object] = {name: getattr(rows, name) for name in FIELDS}
    label, value = next((n, x) for n, x in fields.items() if x is not None and not isinstance(x, Tensor))
    kind = type(value)
    how = "torch.from_numpy(x)" if kind.__module__ == "numpy" else "torch.tensor(x)"
    return TypeError(f"Rows(name={rows.name!r}) needs a tensor as {label}; got {kind.__name__}. Write {how}.")


def _other_shape(rows: Rows, label: str, value: Tensor) -> ValueError:
    """Return the error for a field that does not have one value per row."""
    n, classes = rows.student.shape
    advice = ""
    if tuple(value.shape) == (n, 1):
        advice = f" Write {label}.squeeze(1) in the data set."
    elif label == "target" and tuple(value.shape) == (n, classes):
        advice = " One-hot labels? Pass labels.float(), or labels.argmax(1)."
    return ValueError(
        f"Rows(name={rows.name!r}) needs {label} of shape (N,) = ({n},); got {tuple(value.shape)}.{advice}"
    )


def _not_computable(rows: Rows) -> ValueError:
    """Return the error for logits that are sparse, without values, or of 8 bits."""
    for label, z in (("student", rows.student), ("teacher", rows.teacher)):
        if z.layout != torch.strided:
            wrong = f"dense logits; got the {label}'s as {z.layout}. Write logits.to_dense()"
        elif z.device.type == "meta":
            wrong = f"logits with values; got the {label}'s on the meta device. Load its weights on a device first"
        elif z.element_size() < 2 and z.is_floating_point():
            wrong = f"logits of 16 bits or more; got the {label}'s in {z.dtype}. Write logits.float()"
        else:
            continue
        return ValueError(f"Rows(name={rows.name!r}) needs {wrong}.")
    return ValueError(
        f"Rows(name={rows.name!r}) needs floating point logits; got student {rows.student.dtype} and teacher "
        f"{rows.teacher.dtype}. Stored as integers? Convert with .float() first."
    )


def binary_logits(z: Float[Tensor, "*N"]) -> Float[Tensor, "*N 2"]:
    """Return the logits (-z / 2, z / 2) of the two outcomes "no" and "yes" of a logit z.

    Their softmax at T is (1 - sigmoid(z / T), sigmoid(z / T)). Of all pairs with the difference z this one has the mean
    0, so temperature policies that look at the size of logits treat "no" and "yes" alike.
    """
    half = z / 2
    return torch.stack((-half, half), -1)


def is_soft(target: Tensor) -> bool:
    """Whether the targets are soft labels, (N, C) floating point, and not class indices."""
    return target.ndim == 2 and target.is_floating_point()


def _check_soft(rows: Rows, target: Float[Tensor, "N C"]) -> None:
    if target.shape != rows.student.shape:
        raise ValueError(
            f"Rows(name={rows.name!r}) needs soft labels of the logits' shape {tuple(rows.student.shape)}; got "
            f"{tuple(target.shape)}."
        )
    if target.device.type == "cpu" and not bool(((target >= 0).all(-1) & (target.sum(-1) < 1.001)).all()):
        multi_hot = bool(((target == 0) | (target == 1)).all())
        advice = f"Several labels per sample? {SEVERAL_LABELS}" if multi_hot else "Logits? Pass logits.softmax(-1)."
        raise ValueError(
            f"Rows(name={rows.name!r}) needs soft labels that are probabilities: >= 0, with a sum of 1 per row, or "
            f"of 0 for a row without a label. {advice}"
        )


def class_labels(target: Tensor) -> Int[Tensor, " N"]:
    """Return class indices (N,): of soft labels the likeliest class, and -100 for rows without a label."""
    if not is_soft(target):
        return target
    return target.argmax(-1).masked_fill(~is_labeled(target), IGNORE_INDEX)


def without_labels(target: Tensor, where: Bool[Tensor, " N"] | None = None) -> Tensor:
    """Return the targets without labels on the rows ``where``; None: on all rows."""
    value = 0.0 if is_soft(target) else IGNORE_INDEX
    if where is None:
        return torch.full_like(target, value)
    return target.masked_fill(where.unsqueeze(-1) if is_soft(target) else where, value)


def is_scored(target: Tensor, weight: Tensor | None) -> Bool[Tensor, " N"]:
    """Return which rows have a label and a weight above 0: those that scores are of."""
    return is_labeled(target) if weight is None else is_labeled(target) & (weight > 0)


def is_labeled(target: Tensor) -> Bool[Tensor, ...]:
    """Return which targets are labels: all class indices but -100 and -1; of soft labels the rows that are not 0."""
    if is_soft(target):
        return target.sum(-1) > 0
    if not target.dtype.is_signed:
        return torch.ones_like(target, dtype=torch.bool)
    return (target != IGNORE_INDEX) & (target != UNLABELED[1])


def class_indices(target: Int[Tensor, "*N"], owner: str) -> Int[Tensor, "*N"]:
    """Return targets of any integer type as int64.

    Raises:
        ValueError: (checked on the CPU only) for a target below 0 other than -100 and -1; ``owner`` names who asks.
    """
    out = target if target.dtype == torch.int64 else target.long()
    if out.device.type == "cpu" and out.numel() and int(out.min()) < 0:
        wrong = out[(out < 0) & is_labeled(out)]
        if len(wrong):
            raise ValueError(
                f"{owner} needs class indices from 0 on; got {int(wrong[0])}. Only -100 and -1 mean that there is no "
                "label: another value is a fault of the data, or of an index that was shifted."
            )
    return out


def upcast_to_float32(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32; float64 is kept. Temperatures and losses are computed in it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def expand_to_rows(value: Float[Tensor, ""], rows: Rows) -> Float[Tensor, " N"]:
    """Expand one value per block to one per row, (N,); the mean over rows equals the value."""
    return value.expand(len(rows))


def total(
    terms: Mapping[str, Float[Tensor, " N"]], rows: Rows, *, normalizer: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Return the weighted mean over rows of the sum of the terms, (); the only reduction in the library.

    Args:
        terms: name -> (N,), unreduced, as a method returns them.
        rows: the rows that the terms belong to.
        normalizer: total weight of the optimizer step, over all micro-batches and ranks. The losses of the parts then
            add up to the loss of the full batch, however it is split. None: the total weight of these rows.

    Returns:
        (); 0, connected to the graph, if no row has weight.

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
        # torch.where instead of a product: rows of weight 0 may hold infinity or NaN
        per_row = torch.where(weight > 0, per_row * weight, torch.zeros_like(per_row))
    divisor = normalizer
    if divisor is None:
        divisor = rows.total_weight if rows.weight is not None else len(rows)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(device=per_row.device, dtype=per_row.dtype)
        return per_row.sum() / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
    return per_row.sum() / (divisor if divisor > 0 else 1.0)


def rows_per_sample(rows: Rows, names: Collection[str] | None = None) -> int:
    """Return the number of rows per sample: N / B for features (B, ...) of these names, or all; 1 if there are none.

    Raises:
        ValueError: for features of several numbers of samples, or one that does not divide N.
    """
    chosen = [pair for name, pair in rows.features.items() if names is None or name in names]
    counts = sorted({len(x) for pair in chosen for x in pair})
    if not counts or counts == [len(rows)]:
        return 1
    if len(counts) > 1 or not counts[0] or len(rows) % counts[0]:
        raise ValueError(
            f"the features have {' and '.join(map(str, counts))} samples, and Rows(name={rows.name!r}) has {len(rows)} "
            "rows. Every sample needs the same number of rows, in the order of the samples: logits (B, C, H, W) are "
            "rows logits.permute(0, 2, 3, 1).flatten(0, 2), with weight 0 where a pixel does not count."
        )
    return len(rows) // counts[0]
