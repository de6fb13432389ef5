"""Student and teacher with different tokenizers: one row per piece of text with equal ends on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32
from tempering.tasks.base import Task, TeacherForward
from tempering.tasks.language_modeling import LanguageModeling
from tempering.utils.tensors import on_host, to_device

Merge = Literal["bayesian", "observed"]


class CrossTokenizer(Task):
    """Task whose batches have "student" and "teacher", the same texts in two tokenizations, with "groups" (B, L).

    ``data.spans`` makes them. A group of tokens that cover the same bytes on both sides is a row: the distribution of
    one of its tokens, given those before it, times the probability of the group's other tokens. The last column is the
    tail, all remaining probability, so a row is a distribution, and its cross entropy with the label is exactly that of
    the whole group. A group of one token is the unchanged row of that token. The logits of a token are at the position
    before it, on both sides.

    This is an approximation. For a group of several tokens a model has a probability of the one continuation in the
    text, and of other continuations only of their last ("bayesian") or first ("observed") token; and the columns of two
    vocabularies mean different tokens. So methods that compare column by column, such as KD or any KL, are meaningless
    here: use ``methods.ULD``, which compares sorted probabilities, or ``methods.HybridULD(matched=task.matched)``.

    Args:
        merge: which token of a group keeps its distribution. "bayesian": the last one, after the others: every column
            is a probability of the same length of text. "observed": the first one, times the probability of its
            continuation in the text, whatever its column.
        shared: ids of tokens that are the same on both sides, ``data.spans.shared_tokens``: they become the first
            columns, in that order. None leaves the columns as they are.

    Raises:
        ValueError: for an unknown merge, or shared ids that are no one-to-one mapping.

    Reference: TRL's GOLD trainer, "Unlocking On-Policy Distillation for Any Model Family", 2025, for the two merges.
    There a merged row is not a distribution, since the probability of the other tokens is lost from it, and "observed"
    uses the logits at the position of a token instead of those before it.
    """

    comparable = False

    def __init__(self, *, merge: Merge = "bayesian", shared: tuple[Sequence[int], Sequence[int]] | None = None) -> None:
        if merge not in get_args(Merge):
            raise ValueError(f"CrossTokenizer needs merge 'bayesian' or 'observed'; got {merge!r}.")
        sides = ([], []) if shared is None else shared
        if len(sides) != 2 or len(sides[0]) != len(sides[1]) or any(len(set(side)) != len(side) for side in sides):
            raise ValueError(
                "CrossTokenizer needs shared=(student's ids, teacher's ids), as many on both sides and none twice; got "
                f"{[len(side) for side in sides]} ids. data.spans.shared_tokens makes them."
            )
        self.merge, self.shared = merge, shared
        self._own = LanguageModeling()

    @property
    def matched(self) -> int:
        """Number of first columns that are the same token on both sides."""
        return 0 if self.shared is None else len(self.shared[0])

    def prepare_model(self, model: nn.Module) -> None:
        self._own.prepare_model(model)

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        student, teacher = (self._own.inputs(_without_groups(_side(batch, name)))[0] for name in ("student", "teacher"))
        return student, teacher, batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        s, order = self._merge(student, _side(batch, "student"), 0)
        t, teacher_order = (s, order) if teacher is None else self._merge(teacher, _side(batch, "teacher"), 1)
        if len(s.tail) != len(t.tail):
            raise ValueError(
                f"the student's texts have {len(s.tail)} groups and the teacher's {len(t.tail)}: they are not of one "
                "alignment. data.spans.make_aligned_example makes both."
            )
        width = max(s.logp.shape[1], t.logp.shape[1])
        target = s.target if order is None else order.argsort()[s.target]
        ids = batch["ids"].index_select(0, s.text) if "ids" in batch else None
        return [Rows(_columns(s, order, width), _columns(t, teacher_order, width).detach(), target, ids=ids)]

    def row_weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        return {"logits": (_side(batch, "student")["groups"].amax(1) + 1).sum()}

    def scored_rows(self, student: Any, teacher: Any, batch: Any) -> tuple[Rows, Tensor | None]:
        return self._own.scored_rows(student, None, _without_groups(_side(batch, "student")))

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return the loss in nats per token of the student, its perplexity, and accuracy; agreement is undefined."""
        return self._own.score(student, (_without_groups(_side(batch, "student")) for batch in batches))

    def headline(self) -> tuple[str, bool]:
        return self._own.headline()

    def _merge(self, output: Any, batch: Mapping[str, Tensor], side: int) -> tuple[_Merged, Tensor | None]:
        """Return one side's groups, in the order of the texts, and the order of its columns."""
        tokens, groups = batch["input_ids"], batch["groups"]
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        name = ("student", "teacher")[side]
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise ValueError(
                f"CrossTokenizer needs the {name}'s logits of its whole vocabulary, here ({tokens.shape[0]}, "
                f"{tokens.shape[1]}, V); got {got}."
            )
        order = (
            None if self.shared is None else to_device(_order(self.shared[side], logits.shape[2], name), logits.device)
        )
        # the numbers of tokens and of groups depend on the texts: on the host, where they are known
        on_cpu, spans = on_host((tokens, groups))
        text, column = (spans >= 0).nonzero(as_tuple=True)
        starts = (spans.amax(1) + 1).cumsum(0) - (spans.amax(1) + 1)
        group = starts[text] + spans[text, column]
        token = on_cpu[text, column]
        is_first = torch.ones_like(group, dtype=torch.bool)
        is_first[1:] = group[1:] != group[:-1]
        is_kept = is_first if self.merge == "observed" else torch.cat((is_first[1:], is_first[:1]))
        kept = is_kept.nonzero().squeeze(1)
        several = torch.bincount(group, minlength=len(kept)) > 1
        places = (text * tokens.shape[1] + column - 1, token, text, group, is_kept, kept, several)
        index, token, text, group, is_kept, kept, several = to_device(places, logits.device)
        z = upcast_to_float32(logits.flatten(0, 1).index_select(0, index))
        total = torch.logsumexp(z, -1)
        token_logp = z.gather(1, token[:, None]).squeeze(1) - total
        others = token_logp.new_zeros(len(kept)).index_add(0, group, token_logp.masked_fill(is_kept, 0.0))
        # a float cannot represent probabilities just below 1: the tail of a group of several tokens is never empty
        others = torch.where(several, others.clamp_max(-torch.finfo(token_logp.dtype).eps), 0.0)
        tail = torch.log(-torch.expm1(torch.where(several, others, -1.0))).masked_fill(~several, -torch.inf)
        logp = z.index_select(0, kept) - total.index_select(0, kept)[:, None] + others[:, None]
        return _Merged(logp, tail, token.index_select(0, kept), text.index_select(0, kept)), order


class _Merged(NamedTuple):
    """G groups: log-probabilities (G, V) and of the tail (G,), the kept token and the index of the text, (G,)."""

    logp: Tensor
    tail: Tensor
    target: Tensor
    text: Tensor


def _side(batch: Any, name: str) -> Mapping[str, Tensor]:
    part = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(part, Mapping) or "groups" not in part or part["groups"].shape != part["input_ids"].shape:
        raise ValueError(
            f"CrossTokenizer needs batches with {name!r}, a mapping with input_ids and groups (B, L). "
            "data.spans.collate_spans makes them."
        )
    return part


def _without_groups(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one side as a ``LanguageModeling`` batch."""
    return {name: value for name, value in part.items() if name != "groups"}


def _order(first: Sequence[int], columns: int, name: str) -> Tensor:
    """Return the order of the columns: those of ``first``, then the others."""
    if len(first) and not 0 <= min(first) <= max(first) < columns:
        raise ValueError(f"the {name} has {columns} logits, and no token {max(first)}, which is in shared.")
    shared, other = torch.tensor(list(first), dtype=torch.long), torch.ones(columns, dtype=torch.bool)
    other[shared] = False
    return torch.cat((shared, other.nonzero().squeeze(1)))


def _columns(side: _Merged, order: Tensor | None, width: int) -> Tensor:
    """Return (G, width + 1): the vocabulary in its order, classes of the other side only, and the tail."""
    logp = side.logp if order is None else side.logp.index_select(1, order)
    absent = logp.new_full((len(logp), width - logp.shape[1]), -torch.inf)
    return torch.cat((logp, absent, side.tail[:, None]), 1)
