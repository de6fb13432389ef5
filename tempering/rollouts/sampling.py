"""Texts that a student writes, alone or under a teacher's eye: blocks of tokens, caches, and a row's own pace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.rollouts.decoding import (
    CachedDecoder,
    RecomputingDecoder,
    ShiftingCacheDecoder,
    decoder_start_id,
    is_encoder_decoder,
    make_decoder,
)
from tempering.rows import IGNORE_INDEX, upcast_to_float32
from tempering.teachers.outputs import PrecomputedLogits


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn: softmax(logits / temperature) cut to its likeliest part ``top_p``; 0 is the likeliest.

    Raises:
        ValueError: for a temperature below 0 or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf") or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"Sampling needs temperature >= 0 and top_p in (0, 1]; got {self.temperature} and {self.top_p}."
            )

    def draw(self, logits: Float[Tensor, "B V"], generator: torch.Generator) -> Int[Tensor, " B"]:
        """A token a row."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        p = torch.softmax(upcast_to_float32(logits) / self.temperature, -1)
        if self.top_p < 1.0:
            likeliest, order = p.sort(dim=-1, descending=True, stable=True)
            outside = likeliest.cumsum(-1) - likeliest >= self.top_p  # what comes before is enough; the first stays
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        return torch.multinomial(p, 1, generator=generator).squeeze(-1)


class Verification(NamedTuple):
    """What a teacher says of proposed tokens: their rank among its logits, whether each will do, how many in a row."""

    rank: Int[Tensor, "B G"]
    ok: Bool[Tensor, "B G"]
    accepted: Int[Tensor, " B"]


def verify_tokens(teacher: Float[Tensor, "B G V"], proposed: Int[Tensor, "B G"], top_k: int) -> Verification:
    """A token will do where fewer than ``top_k`` of the teacher's raw logits are larger than its own; ties will do.

    A token that the teacher does not have never will.

    Reference: Xu et al., "Speculative Knowledge Distillation", ICLR 2025, arXiv:2410.11325, algorithm 1. The released
    code looks at the distribution after the teacher's own sampling cuts, where tokens of probability 0 fill the top K.
    """
    vocabulary = teacher.shape[-1]
    rank = (teacher > teacher.gather(-1, proposed.clamp_max(vocabulary - 1)[..., None])).sum(-1)
    ok = (rank < top_k) & (proposed < vocabulary)
    return Verification(rank, ok, ok.long().cumprod(-1).sum(-1))


@dataclass
class GenerationStats:
    """What was written, in counts that add up over batches."""

    texts: int = 0
    ended: int = 0
    tokens: int = 0
    replaced: int = 0
    repeated: int = 0
    student_forwards: int = 0
    teacher_forwards: int = 0

    def add(self, other: GenerationStats) -> None:
        """Count another batch too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float]:
        """acceptance and replaced share of tokens, repeated tokens' share, mean length, share of texts that ended."""
        tokens, texts = max(1, self.tokens), max(1, self.texts)
        return {
            "acceptance": 1.0 - self.replaced / tokens,
            "replaced": self.replaced / tokens,
            "repeated": self.repeated / tokens,
            "length": self.tokens / texts,
            "ended": self.ended / texts,
            "tokens_per_teacher_forward": self.tokens / self.teacher_forwards if self.teacher_forwards else 0.0,
        }


class GenerationState:
    """A batch of texts being written: what is there of each row, and the mask of its slots in the caches."""

    def __init__(self, prompts: list[list[int]], *, length: int, eos: int | None, device: torch.device) -> None:
        self.prompts, self.length, self.eos = prompts, length, eos
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.replaced: list[list[bool]] = [[] for _ in prompts]
        self.logits: list[list[Tensor]] = [[] for _ in prompts]
        self.done = [length < 1] * len(prompts)
        width = max(map(len, prompts)) - 1  # the last token of a prompt is read with the first block
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            if len(prompt) > 1:
                self.mask[row, width - len(prompt) + 1 :] = 1
                ids[row, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1], device=device)
        self.start = ids
        self.last = torch.tensor([prompt[-1] for prompt in prompts], device=device)

    def positions(self, first: int, count: int) -> Int[Tensor, "B count"]:
        """Those of the block's tokens, none beyond the longest that a row may become."""
        at = [len(p) + len(w) - 1 for p, w in zip(self.prompts, self.generated, strict=True)]
        most = torch.tensor([len(p) + self.length - 1 for p in self.prompts], device=self.last.device)
        return (torch.tensor(at, device=self.last.device)[:, None] + first + self._count(count)).minimum(most[:, None])

    def _count(self, count: int) -> Tensor:
        return torch.arange(count, device=self.last.device)

    def seen(self, count: int) -> Int[Tensor, "B slots"]:
        """The mask with ``count`` slots of the block behind it, which are none of a row that is done."""
        writing = (~torch.tensor(self.done, device=self.mask.device)).long()
        return torch.cat((self.mask, writing[:, None].expand(-1, count)), 1)

    def take(self, block: Int[Tensor, "B G"], accepted: list[int], said: Float[Tensor, "B G V"] | None = None) -> None:
        """Add what stands of a block: its accepted tokens and, where it was longer, the one that replaces the next.

        ``said`` are logits before each of its tokens, kept of those that stand.
        """
        tokens, width = block.tolist(), block.shape[1]
        kept = torch.zeros(len(tokens), dtype=torch.long)
        for row, (ids, n) in enumerate(zip(tokens, accepted, strict=True)):
            if self.done[row]:
                continue
            ids = ids[: min(n + 1, width, self.length - len(self.generated[row]))]
            if self.eos in ids:
                ids = ids[: ids.index(self.eos) + 1]
            self.generated[row] += ids
            self.replaced[row] += [i == n for i in range(len(ids))]
            self.done[row] = len(self.generated[row]) >= self.length or ids[-1] == self.eos
            kept[row] = len(ids)
            if said is not None:
                self.logits[row].append(said[row, : len(ids)].clone())
        kept = kept.to(block.device)
        self.last = torch.where(kept > 0, block.gather(1, (kept - 1).clamp_min(0)[:, None])[:, 0], self.last)
        # the block's slots hold the token before it and all of it but the last
        self.mask = torch.cat((self.mask, (self._count(width) < kept[:, None]).long()), 1)

    def batch(self, pad: int) -> dict[str, Tensor]:
        """Prompts and what was written, padded on the right; exactly the ids that were drawn."""
        rows = [p + w for p, w in zip(self.prompts, self.generated, strict=True)]
        shape, device = (len(rows), max(map(len, rows))), self.last.device
        out = {name: torch.zeros(shape, dtype=torch.long, device=device) for name in ("input_ids", "attention_mask")}
        out["input_ids"].fill_(pad)
        out["labels"] = torch.full(shape, IGNORE_INDEX, device=device)
        out |= {name: torch.zeros(shape, dtype=torch.bool, device=device) for name in ("learn", "replaced")}
        for i, row in enumerate(rows):
            begin = len(self.prompts[i])
            out["input_ids"][i, : len(row)] = torch.tensor(row, device=device)
            out["attention_mask"][i, : len(row)] = 1
            out["learn"][i, begin : len(row)] = True
            out["replaced"][i, begin : len(row)] = torch.tensor(self.replaced[i], dtype=torch.bool, device=device)
        return out

    def answer(self, pad: int, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was written behind an encoder-decoder's start, with the source: a batch for ``Seq2Seq``."""
        whole = self.batch(pad)
        held = {name: whole[name][:, 1:] for name in ("labels", "learn", "replaced")}
        return {**source, **held, "generated": whole["input_ids"][:, 1:]}

    def stats(self) -> GenerationStats:
        """The counts of this batch."""
        again = sum(a == b for w in self.generated for a, b in pairwise(w))
        ended = sum(self.eos is not None and w[-1:] == [self.eos] for w in self.generated)
        tokens, replaced = sum(map(len, self.generated)), sum(map(sum, self.replaced))
        return GenerationStats(len(self.prompts), ended, tokens, replaced, again)


@torch.no_grad()
def generate(
    student: nn.Module,
    teacher: nn.Module | None,
    prompts: list[list[int]],
    *,
    length: int,
    top_k: int = 25,
    block: int = 5,
    eos: int | None = None,
    pad: int = 0,
    sampling: Sampling | None = None,
    resampling: Sampling | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
    source: Mapping[str, Tensor] | None = None,
    reuse: bool = False,
) -> tuple[dict[str, Any], GenerationStats]:
    """What the student writes after the prompts, with what the teacher replaces: a ``LanguageModeling`` batch, counts.

    The student proposes a block, the teacher reads it in one forward, and the first token outside the ``top_k`` of its
    raw logits gives way to one that the teacher draws; what came behind it is proposed anew. Without a teacher the
    student writes alone. Student and teacher draw from generators of their own, so ``top_k`` of the whole vocabulary
    writes what the student alone would. Both are in eval mode meanwhile.

    Args:
        source: what an encoder-decoder reads; the prompts are then its start, and the batch is for ``Seq2Seq``.
        reuse: keep the teacher's logits of what was written as the batch's "taught": 4 V bytes a token in float32.

    Raises:
        TypeError: for a causal model without a cache, an encoder-decoder without a source, or one of each.
        ValueError: for no prompts, an empty one, or top_k, block or length below 1.
    """
    if not prompts or not all(prompts) or min(top_k, block, length) < 1:
        raise ValueError(
            f"write needs prompts of at least one token, and top_k, block and length >= 1; got {len(prompts)} prompts, "
            f"the shortest of {min(map(len, prompts), default=0)} tokens, {top_k}, {block} and {length}."
        )
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    source = None if source is None else {name: x.to(device) for name, x in source.items()}
    draft = GenerationState(prompts, length=length, eos=eos, device=device)
    generators = [torch.Generator(device).manual_seed((2 * seed + side) % 2**63) for side in (0, 1)]
    sampling, resampling = sampling or Sampling(), resampling or Sampling()
    with eval_mode(student, teacher):
        models = [model for model in (student, teacher) if model is not None]
        known = _known(models, vocabulary)
        readers = [
            CachedDecoder(m, known) if source is None else make_decoder(m, known, source, most=length) for m in models
        ]
        if draft.start.shape[1]:
            positions = (draft.mask.cumsum(-1) - 1).clamp_min(0)
            for reader in readers:
                reader.decode(draft.start, positions, draft.mask)
        while not all(draft.done):
            proposed, read = _proposed(readers[0], draft, block, sampling, generators[0])
            accepted, said = [block] * len(prompts), None
            if teacher is not None:
                logits = readers[1].decode(read, draft.positions(0, block), draft.seen(block))
                found = verify_tokens(logits, proposed, top_k)
                at = found.accepted.clamp_max(block - 1)[:, None]
                instead = resampling.draw(
                    logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))[:, 0], generators[1]
                )
                replace = (found.accepted < block)[:, None] & (torch.arange(block, device=device) == at)
                proposed, accepted = torch.where(replace, instead[:, None], proposed), found.accepted.tolist()
                said = logits if reuse else None
            draft.take(proposed, accepted, said)
    pace = draft.stats()
    pace.student_forwards = readers[0].forwards
    pace.teacher_forwards = readers[1].forwards if teacher is not None else 0
    batch: dict[str, Any] = draft.batch(pad) if source is None else draft.answer(pad, source)
    if reuse and teacher is not None:
        batch["taught"] = PrecomputedLogits(torch.cat([part for row in draft.logits for part in row]), teacher)
    return batch, pace


def asked_for(
    model: nn.Module, batch: Mapping[str, Any], least: int
) -> tuple[list[list[int]], dict[str, Tensor] | None]:
    """The prompts of a batch, and what an encoder-decoder reads: then its prompts are its own start."""
    if not is_encoder_decoder(model):
        return prompts_of(batch, least), None
    source = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    return [[decoder_start_id(model)] for _ in batch["input_ids"]], source


def _known(models: list[nn.Module], vocabulary: int | None) -> int | None:
    """How many tokens all of them can read; None where no model says."""
    tables = [model.get_input_embeddings() for model in models if hasattr(model, "get_input_embeddings")]  # pyright: ignore
    sizes = [len(table.weight) for table in tables if isinstance(table, nn.Embedding)]
    return min([*sizes, *([] if vocabulary is None else [vocabulary])], default=None)


def _proposed(
    reader: CachedDecoder | RecomputingDecoder | ShiftingCacheDecoder,
    draft: GenerationState,
    block: int,
    drawn: Sampling,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A block that the student goes on with, (B, block), and the tokens that were read for it, one before."""
    read, tokens = [draft.last], []
    for i in range(block):
        logits = reader.decode(read[-1][:, None], draft.positions(i, 1), draft.seen(i + 1))[:, -1]
        tokens.append(drawn.draw(logits, generator))
        read.append(tokens[-1])
    return torch.stack(tokens, 1), torch.stack(read[:-1], 1)


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """The models in eval mode; every module's mode is put back."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    for model in models:
        if model is not None:
            model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def prompts_of(batch: Mapping[str, Any], least: int = 1) -> list[list[int]]:
    """The tokens of each text before the first that is learned, at least ``least`` of them."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if batch.get("attention_mask") is not None else torch.ones_like(ids)
    learn = batch.get("learn")
    if learn is None:
        learn = batch["labels"] != IGNORE_INDEX if batch.get("labels") is not None else mask
    out = []
    for row, kept, learned in zip(ids.tolist(), mask.tolist(), learn.tolist(), strict=True):
        text = [(i, flag) for i, here, flag in zip(row, kept, learned, strict=True) if here]
        first = next((place for place, (_, flag) in enumerate(text) if flag), len(text))
        out.append([i for i, _ in text[: max(first, least)]])
    return out
