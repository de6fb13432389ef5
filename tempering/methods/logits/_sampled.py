"""Shared by the methods over sampled tokens: log-probabilities, importance weights and sums over the rest of a text."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering import objectives
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Temperatures


def sampled_log_prob(logits: Float[Tensor, "N C"], ids: Tensor) -> Float[Tensor, " N"]:
    """Return the log-probability of one class per row, in at least float32."""
    z = upcast_to_float32(logits)
    return z.gather(1, ids[:, None]).squeeze(1) - z.logsumexp(-1)


def rollout_log_prob(rows: Rows, owner: str) -> Float[Tensor, " N"]:
    """Return the log-probabilities with which the rows were sampled.

    Raises:
        ValueError: for rows that have none; names the method.
    """
    if rows.rollout_log_prob is None:
        raise ValueError(
            f"{owner} needs the log-probabilities of sampled tokens, and these rows have none: a teacher's most likely "
            "tokens leave out the others. Use a live teacher, or importance=False."
        )
    return upcast_to_float32(rows.rollout_log_prob)


def sum_of_rest(rows: Rows, values: Float[Tensor, " N"], discount: float, owner: str) -> Float[Tensor, " N"]:
    """Return of each row the sum over its text from it on, of discount^distance times the values, (N,).

    Raises:
        ValueError: for rows without text and positions; names the method.
    """
    if rows.text is None or rows.positions is None:
        raise ValueError(f"{owner} adds up the rewards of texts: its rows need text and positions.")
    values = values if rows.weight is None else values.masked_fill(rows.weight == 0, 0.0)
    shape = (int(rows.text.max()) + 1, int(rows.positions.max()) + 1)
    table = values.new_zeros(shape).index_put((rows.text, rows.positions), values, accumulate=True)
    steps = torch.arange(shape[1], device=values.device)
    distance = steps[:, None] - steps
    decay = torch.where(distance >= 0, discount ** distance.clamp_min(0).to(values.dtype), 0.0)
    return (table @ decay)[rows.text, rows.positions]


def reverse_kl_at_1(rows: Rows) -> Float[Tensor, " N"]:
    """Return KL(student || teacher) at temperature 1, (N,): the expected value over the student's own tokens."""
    one = rows.student.new_ones((1, 1), dtype=upcast_to_float32(rows.student).dtype)
    return objectives.reverse_kl(rows, Temperatures(one, one, one))


def clipped_gain(ratio: Float[Tensor, " N"], gain: Float[Tensor, " N"], clip: float) -> Float[Tensor, " N"]:
    """Return -ratio * gain, (N,), with the ratio kept from leaving [1 - clip, 1 + clip] in its favor; 0 never clips."""
    term = -ratio * gain
    return torch.maximum(term, -ratio.clamp(1.0 - clip, 1.0 + clip) * gain) if clip else term


def reference_term(rows: Rows, weight: float, owner: str) -> dict[str, Float[Tensor, " N"]]:
    """Return the term "reference", weight * KL(student || reference) at temperature 1, (N,).

    {} for a weight of 0, and for rows of data without reference.

    Raises:
        ValueError: for sampled rows without reference; names the method.
    """
    if not weight or (rows.reference is None and rows.sampled_id is None):
        return {}
    if rows.reference is None:
        raise ValueError(
            f"{owner}(reference={weight:g}) needs the logits of a reference model, such as the initial student. Give "
            "the run teacher=teachers.WithReference(teacher, copy.deepcopy(student)); of a PEFT student the reference "
            "is teachers.SelfTeacher(adapters=False)."
        )
    return {"reference": weight * reverse_kl_at_1(rows.replace(teacher=rows.reference, reference=None))}
