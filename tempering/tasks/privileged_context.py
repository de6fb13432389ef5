"""Privileged context: the teacher reads another prompt than the student, and both predict the same completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tempering.rollouts.sampling import TEACHER_PROMPT
from tempering.rows import is_labeled
from tempering.tasks.language_modeling import NO_INPUTS, LanguageModeling, host_fields
from tempering.utils.tensors import to_device


class PrivilegedContext(LanguageModeling):
    """Language modeling with a teacher that sees what the student does not: the answer, a hint, a retrieved text.

    Of every text the teacher reads "teacher_prompt", (B, P) with "teacher_prompt_mask", in place of the tokens before
    the first learned one, and then the same tokens as the student, from the same tensor, so both sides predict the same
    completion whatever the prompts. ``data.text.with_privileged_context`` makes such examples, ``collate`` and
    ``data.Tokens`` such batches, and ``OnPolicy`` generates from the student's prompt. With ``teachers.SelfTeacher()``
    one model is both sides: it learns to do without the context.

    The logits that ``Speculative(reuse=True)`` stores are those without the context, so the teacher is run again. The
    arguments are as in ``LanguageModeling``.

    Raises:
        ValueError: while it runs, for batches without teacher_prompt, with an empty one, packed, or with other inputs.

    Reference: Snell et al., "Learning by Distilling Context", arXiv:2209.15189; on the student's own texts: Shenfeld et
    al., "Self-Distillation Enables Continual Learning", arXiv:2601.19897.
    """

    reads_same_texts = False

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        order, kept = _order(batch)
        student, _, ids = super().inputs(batch)
        tokens = torch.cat((batch["teacher_prompt"], batch["input_ids"]), 1).gather(1, order)
        teacher, _, _ = super().inputs({"input_ids": tokens, "attention_mask": kept})
        return student, teacher, ids

    def teacher_index(self, batch: Any, index: Tensor, shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        order, _ = _order(batch)
        width = batch["teacher_prompt"].shape[1]
        # where the token of every column is in the teacher's texts, and its logits are those before it
        places = torch.zeros(len(order), width + shape[1], dtype=torch.long, device=order.device)
        steps = torch.arange(order.shape[1], device=order.device)
        places.scatter_(1, order, steps.expand_as(order))
        row, column = index // shape[1], index % shape[1]
        place = places[row, (width + column + 1).clamp_max(width + shape[1] - 1)] - 1
        return row * order.shape[1] + place.clamp_min(0), (len(order), order.shape[1])


def _order(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the columns of [teacher_prompt, input_ids] in the teacher's texts, (B, L'), and the mask of those."""
    if not isinstance(batch, Mapping) or any(batch.get(name) is None for name in ("input_ids", *TEACHER_PROMPT)):
        raise ValueError(
            'PrivilegedContext needs batches with input_ids, "teacher_prompt" and "teacher_prompt_mask"; got '
            f"{', '.join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__}. "
            "data.text.with_privileged_context makes such examples."
        )
    others = [n for n in batch if n not in NO_INPUTS | {"input_ids", "attention_mask"} and batch[n] is not None]
    if others:
        raise ValueError(
            f"PrivilegedContext makes the teacher's texts from tokens, padded and not packed, without {others[0]}."
        )
    device, host = batch["input_ids"].device, host_fields(batch)
    ids, mask = host["input_ids"], host.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    learn = host.get("learn")
    if learn is None:
        learn = ids if host.get("labels") is None else host["labels"]
        learn = is_labeled(learn)
    learned = (learn != 0) & (mask != 0)
    completion = (learned.long().cumsum(-1) > 0) & (mask != 0)
    prompt = host["teacher_prompt_mask"] != 0
    if not bool(prompt.any(-1).all()):
        raise ValueError("PrivilegedContext needs a token of teacher_prompt for every text, and one has none.")
    kept = torch.cat((prompt, completion), 1)
    longest = int(kept.sum(-1).max())
    order = (~kept).long().argsort(dim=-1, stable=True)[:, :longest]  # the kept ones first, in their order
    return to_device((order, kept.gather(1, order).long()), device)
