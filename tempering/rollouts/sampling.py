"""Generate text with the student, alone or speculatively with a teacher that verifies blocks of tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.data.text import eos_ids, sources_right
from tempering.rollouts.decoders import Decoder, decoder_start_id, is_encoder_decoder
from tempering.rollouts.decoding import make_causal_decoder, make_decoder, max_positions
from tempering.rollouts.generation_config import Sampling, as_sampling
from tempering.rows import IGNORE_INDEX, TEACHER_OUTPUTS, upcast_to_float32
from tempering.teachers.outputs import PrecomputedLogits
from tempering.utils.tensors import eval_mode, on_host, to_device

TEACHER_PROMPT = ("teacher_prompt", "teacher_prompt_mask")  # of a batch, for ``tasks.PrivilegedContext``
CARRIED = {
    "input_ids",
    "attention_mask",
    "labels",
    "learn",
    "replaced",
    "rollout_log_prob",
    "generated",
    "ids",
    "privacy_score",
    "reward",
    TEACHER_OUTPUTS,
    *TEACHER_PROMPT,
}
TURNS = {"last": -1, "first": 0, "random": None}  # index among the learned turns of a text


class Verification(NamedTuple):
    """Ranks of proposed tokens in the teacher's logits, whether each is accepted, and the accepted prefix's length."""

    rank: Int[Tensor, "B G"]
    ok: Bool[Tensor, "B G"]
    accepted: Int[Tensor, " B"]


def scheduled_top_k(top_k: int, expected_length: int, verified: int) -> int:
    """Return the accepted rank after this many verified blocks: it falls from ``top_k`` to 1 over a text.

    Reference: the released code of Xu et al., "Speculative Knowledge Distillation", ICLR 2025, arXiv:2410.11325: every
    max(expected_length // top_k, 1) blocks, the first among them, max(ceil(top_k / expected_length), 1) less.
    """
    every, less = max(expected_length // top_k, 1), max(-(-top_k // expected_length), 1)
    return max(top_k - less * -(-verified // every), 1)


def verify_tokens(
    teacher: Float[Tensor, "B G V"], proposed: Int[Tensor, "B G"], top_k: int | None, nucleus: float = 1.0
) -> Verification:
    """Accept a token if fewer than ``top_k`` of the teacher's raw logits are larger than its own; ties are accepted.

    None accepts every rank.

    With ``nucleus`` below 1 it also has to be in the teacher's nucleus at temperature 1: the tokens of larger logits
    have less than this probability together. A token that the teacher does not have is rejected.

    Reference: Xu et al., "Speculative Knowledge Distillation", ICLR 2025, arXiv:2410.11325, algorithm 1. The released
    code uses the distribution after the teacher's own top-k and top-p, where tokens of probability 0 fill the top K.
    """
    vocabulary = teacher.shape[-1]
    above = teacher > teacher.gather(-1, proposed.clamp_max(vocabulary - 1)[..., None])
    rank = above.sum(-1)
    ok = (rank < (vocabulary if top_k is None else top_k)) & (proposed < vocabulary)
    if nucleus < 1.0:
        ok &= (upcast_to_float32(teacher).softmax(-1) * above).sum(-1) < nucleus
    return Verification(rank, ok, ok.long().cumprod(-1).sum(-1))


@dataclass
class GenerationStats:
    """Counts of generated texts and tokens, summed over batches."""

    texts: int = 0
    ended: int = 0
    tokens: int = 0
    replaced: int = 0
    repeated: int = 0
    student_forwards: int = 0
    teacher_forwards: int = 0
    batches: int = 0
    stale: int = 0  # batches since the engine's weights were refreshed, summed
    reward: float = 0.0

    def add(self, other: GenerationStats) -> None:
        """Add the counts of another batch."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float]:
        """Return shares of accepted, replaced and repeated tokens, the mean length, and the share of ended texts."""
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
    """State of generating a batch: the tokens of each row, and the mask of its slots in the caches."""

    def __init__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None,
        device: torch.device,
    ) -> None:
        self.prompts, self.max_new_tokens, self.eos = prompts, max_new_tokens, set(eos_ids(eos))
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.replaced: list[list[bool]] = [[] for _ in prompts]
        self.logits: list[list[Tensor]] = [[] for _ in prompts]
        self.log_probs: list[Tensor] = []  # of the blocks' tokens, of which a row has the first ones
        self.done = [max_new_tokens < 1] * len(prompts)
        width = max(map(len, prompts)) - 1  # the last token of a prompt is decoded with the first block
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            if len(prompt) > 1:
                mask[row, width - len(prompt) + 1 :] = 1
                ids[row, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
        position = torch.tensor([len(prompt) - 1 for prompt in prompts])  # of the last token of each row
        last = torch.tensor([prompt[-1] for prompt in prompts])
        made = (ids, mask, last, position, position + max_new_tokens, ~torch.tensor(self.done))
        self.start, self.mask, self.last, self.position, self.limit, self.active = to_device(made, device)

    def positions(self, first: int, count: int) -> Int[Tensor, "B count"]:
        """Return the positions of the block's tokens, limited to the longest possible row."""
        return (self.position[:, None] + first + self._arange(count)).minimum(self.limit[:, None])

    def _arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.last.device)

    def block_mask(self, count: int) -> Int[Tensor, "B slots"]:
        """Return the mask with ``count`` slots of the block appended, masked for finished rows."""
        return torch.cat((self.mask, self.active.long()[:, None].expand(-1, count)), 1)

    def append(
        self,
        block: Int[Tensor, "B G"],
        accepted: Int[Tensor, " B"] | None = None,
        logits: Float[Tensor, "B G V"] | None = None,
        log_probs: Float[Tensor, "B G"] | None = None,
    ) -> None:
        """Append a block's accepted tokens and, if it is longer, the one that replaces the next.

        Args:
            block: the proposed tokens, with replacements.
            accepted: number of accepted tokens of each row; None: all.
            logits: logits before each token of the block, to be stored for the appended ones.
            log_probs: log-probability of each token where it was sampled, if the student generates alone.
        """
        width = block.shape[1]
        counts = torch.full_like(block[:, :1], width) if accepted is None else accepted[:, None]
        kept = torch.zeros(len(block), dtype=torch.long)
        for row, (*ids, n) in enumerate(torch.cat((block, counts), 1).tolist()):  # the only wait for the device
            if self.done[row]:
                continue
            ids = ids[: min(n + 1, width, self.max_new_tokens - len(self.generated[row]))]
            ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in self.eos), len(ids))]
            self.generated[row] += ids
            self.replaced[row] += [i == n for i in range(len(ids))]
            self.done[row] = len(self.generated[row]) >= self.max_new_tokens or ids[-1] in self.eos
            kept[row] = len(ids)
            if logits is not None:
                self.logits[row].append(logits[row, : len(ids)].clone())
        self.log_probs += [] if log_probs is None else [log_probs]
        kept, self.active = to_device((kept, ~torch.tensor(self.done)), block.device)
        self.position = self.position + kept
        self.last = torch.where(kept > 0, block.gather(1, (kept - 1).clamp_min(0)[:, None])[:, 0], self.last)
        # the block's slots contain the token before it and all of its tokens but the last
        self.mask = torch.cat((self.mask, (self._arange(width) < kept[:, None]).long()), 1)

    def batch(self, pad: int) -> dict[str, Tensor]:
        """Return prompts with the generated tokens, padded on the right; exactly the sampled ids."""
        rows = [p + w for p, w in zip(self.prompts, self.generated, strict=True)]
        shape = (len(rows), max(map(len, rows)))
        out = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        out["input_ids"].fill_(pad)
        out["labels"] = torch.full(shape, IGNORE_INDEX)
        out |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("learn", "replaced")}
        log_probs = torch.cat(self.log_probs, 1).to("cpu") if self.log_probs else None
        if log_probs is not None:
            out["rollout_log_prob"] = log_probs.new_zeros(shape)
        for i, row in enumerate(rows):
            begin = len(self.prompts[i])
            if log_probs is not None:
                out["rollout_log_prob"][i, begin : len(row)] = log_probs[i, : len(row) - begin]
            out["input_ids"][i, : len(row)] = torch.tensor(row)
            out["attention_mask"][i, : len(row)] = 1
            out["learn"][i, begin : len(row)] = True
            out["replaced"][i, begin : len(row)] = torch.tensor(self.replaced[i], dtype=torch.bool)
        return to_device(out, self.last.device)

    def seq2seq_batch(self, pad: int, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the source with the tokens generated after the decoder's start: a batch for ``Seq2Seq``."""
        batch = {name: x[:, 1:] for name, x in on_host(self.batch(pad)).items()}
        names = [name for name in ("labels", "learn", "replaced", "rollout_log_prob") if name in batch]
        targets = {"generated": batch["input_ids"]} | {name: batch[name] for name in names}
        return {**source, **to_device(targets, self.last.device)}

    def stats(self) -> GenerationStats:
        """Return the counts of this batch."""
        repeated = sum(a == b for w in self.generated for a, b in pairwise(w))
        ended = sum(bool(self.eos.intersection(w[-1:])) for w in self.generated)
        tokens, replaced = sum(map(len, self.generated)), sum(map(sum, self.replaced))
        return GenerationStats(len(self.prompts), ended, tokens, replaced, repeated, batches=1)


@torch.no_grad()
def generate(
    student: nn.Module,
    teacher: nn.Module | None,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    top_k: int | None = 25,
    nucleus: float = 1.0,
    expected_length: int | None = None,
    block: int = 5,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    sampling: Any = None,
    resampling: Any = None,
    vocabulary: int | None = None,
    seed: int = 0,
    source: Mapping[str, Tensor] | None = None,
    reuse: bool = False,
    mixture: float | None = None,
) -> tuple[dict[str, Any], GenerationStats]:
    """Generate completions of prompts with the student, verified by the teacher; return the batch and its statistics.

    The student proposes a block, the teacher verifies it in one forward, and the first token outside the ``top_k`` of
    its raw logits is replaced by one that the teacher samples; the tokens after it are proposed again. Without a
    teacher the student generates alone. Student and teacher have separate random generators, so ``top_k`` of the whole
    vocabulary generates the same texts as the student alone. Both models run in eval mode.

    Args:
        student, teacher: the models.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens to generate.
        top_k, nucleus: which of the teacher's likeliest tokens are accepted; see ``verify_tokens``.
        expected_length: let ``top_k`` fall over a text of this many tokens; see ``scheduled_top_k``. None: it is fixed.
        block: tokens proposed at a time.
        eos: end-of-text token id, or several, of which any ends a text; None for none.
        pad: padding token id.
        sampling, resampling: of the student, and of the teacher's replacements: a ``Sampling``, a GenerationConfig or a
            dict; None is ``Sampling()``.
        vocabulary: number of tokens; None is the smallest embedding of the models.
        seed: seed of the sampling.
        source: inputs of an encoder-decoder; the prompts are then its start, and the batch is for ``Seq2Seq``.
        reuse: store the teacher's logits of generated tokens as "teacher_outputs" of the batch: 4 V bytes per token.
        mixture: sample every token from mixture * teacher + (1 - mixture) * student, both by ``sampling``, and reject
            none; None: the teacher verifies.

    Raises:
        TypeError: for a causal model without a cache, an encoder-decoder without a source, or one of each.
        ValueError: for no prompts, an empty one, or top_k, block or max_new_tokens below 1.
    """
    if not prompts or not all(prompts) or min(1 if top_k is None else top_k, block, max_new_tokens) < 1:
        raise ValueError(
            f"generate needs prompts of at least one token, and top_k, block and max_new_tokens >= 1; got "
            f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens, {top_k}, {block} and "
            f"{max_new_tokens}."
        )
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    source = None if source is None else to_device(dict(source), device)
    state = GenerationState(prompts, max_new_tokens=max_new_tokens, eos=eos, device=device)
    generators = [torch.Generator(device).manual_seed((2 * seed + side) % 2**63) for side in (0, 1)]
    sampling, resampling = as_sampling(sampling) or Sampling(), as_sampling(resampling) or Sampling()
    with eval_mode(student, teacher):
        models = [model for model in (student, teacher) if model is not None]
        size, longest = vocabulary_size(models, vocabulary), max(map(len, prompts))
        for model in models:
            check_positions(model, longest if source is None else 0, max_new_tokens)
        decoders = [
            make_causal_decoder(
                m, size, rejects=teacher is not None and mixture is None, max_length=longest + max_new_tokens
            )
            if source is None
            else make_decoder(m, size, source, max_length=max_new_tokens)
            for m in models
        ]
        if state.start.shape[1]:
            positions = (state.mask.cumsum(-1) - 1).clamp_min(0)
            for decoder in decoders:
                decoder.decode(state.start, positions, state.mask)
        for verified_blocks in itertools.count():
            if all(state.done):
                break
            both = decoders if mixture is not None else decoders[:1]
            proposed, previous, log_probs = _propose(both, state, block, sampling, generators[0], mixture or 0.0)
            accepted, stored = None, None
            if teacher is not None and mixture is None:
                logits = decoders[1].decode(previous, state.positions(0, block), state.block_mask(block))
                k = top_k
                if k is not None and expected_length is not None:
                    k = scheduled_top_k(k, expected_length, verified_blocks)
                verified = verify_tokens(logits, proposed, k, nucleus)
                index = verified.accepted.clamp_max(block - 1)[:, None]
                log_probs = None  # of a text that both models generate there is none
                replacement, _ = resampling.draw(
                    logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))[:, 0], generators[1]
                )
                replace = (verified.accepted < block)[:, None] & (torch.arange(block, device=device) == index)
                proposed = torch.where(replace, replacement[:, None], proposed)
                accepted, stored = verified.accepted, logits if reuse else None
            state.append(proposed, accepted, stored, log_probs)
    stats = state.stats()
    stats.student_forwards = decoders[0].forwards
    stats.teacher_forwards = decoders[1].forwards if teacher is not None else 0
    batch: dict[str, Any] = state.batch(pad) if source is None else state.seq2seq_batch(pad, source)
    if reuse and teacher is not None:
        batch[TEACHER_OUTPUTS] = PrecomputedLogits(torch.cat([part for row in state.logits for part in row]), teacher)
    return batch, stats


def prompts_and_source(
    model: nn.Module,
    batch: Mapping[str, Any],
    least: int,
    turn: str = "last",
    generator: random.Random | None = None,
) -> tuple[list[list[int]], dict[str, Tensor] | None]:
    """Return the prompts of a batch and None; for an encoder-decoder its start tokens and its encoder inputs.

    Raises:
        ValueError: for a batch without input_ids, or with inputs that generated texts cannot have; names them.
    """
    others = [name for name, value in batch.items() if name not in CARRIED and value is not None]
    if others or "input_ids" not in batch:
        raise ValueError(
            f"texts are generated from input_ids and attention_mask; got {', '.join(map(str, batch))}. A model that "
            f"needs {', '.join(map(str, others)) or 'other inputs'} cannot generate here, since generated tokens have "
            "no such values; if it does not need them, leave them out of the batches."
        )
    if not is_encoder_decoder(model):
        return prompts_of(batch, least, turn, generator), None
    source = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    return [[decoder_start_id(model)] for _ in batch["input_ids"]], sources_right(source)


def vocabulary_size(models: list[nn.Module], vocabulary: int | None) -> int | None:
    """Return the number of tokens that all models have; None if no model has an input embedding."""
    tables = [model.get_input_embeddings() for model in models if hasattr(model, "get_input_embeddings")]  # pyright: ignore
    sizes = [len(table.weight) for table in tables if isinstance(table, nn.Embedding)]
    return min([*sizes, *([] if vocabulary is None else [vocabulary])], default=None)


def check_positions(model: nn.Module, prompt: int, max_new_tokens: int) -> None:
    """Raise ValueError if a prompt with its completion is longer than the model's positions."""
    limit = max_positions(model)
    if limit is not None and prompt + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {prompt} tokens, and with max_new_tokens={max_new_tokens} that is more than the "
            f"{limit} positions of {type(model).__name__}. Use max_new_tokens={max(1, limit - prompt)} or less, "
            "or shorter prompts; or, if it was trained for more, set max_position_embeddings in its config."
        )


def _propose(
    decoders: Sequence[Decoder],
    state: GenerationState,
    block: int,
    sampling: Sampling,
    generator: torch.Generator,
    mixture: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block of tokens, the decoders' inputs for it, shifted by one, and log-probabilities.

    Each is (B, block). With two decoders tokens are of the mixture of both.
    """
    inputs, tokens, log_probs = [state.last], [], []
    for i in range(block):
        where = (inputs[-1][:, None], state.positions(i, 1), state.block_mask(i + 1))
        logits, *others = (decoder.decode(*where)[:, -1] for decoder in decoders)
        token, log_prob = sampling.draw(logits, generator, others[0] if others else None, mixture)
        tokens.append(token)
        log_probs.append(log_prob)
        inputs.append(tokens[-1])
    return torch.stack(tokens, 1), torch.stack(inputs[:-1], 1), torch.stack(log_probs, 1)


def learned_turns(learn: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the (begin, end) of each run of learned tokens, such as the assistant's turns of a chat."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *learn, False])) if bool(a) != bool(b)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def prompts_of(
    batch: Mapping[str, Any], least: int = 1, turn: str = "last", generator: random.Random | None = None
) -> list[list[int]]:
    """Return the tokens of each text before a learned turn, at least ``least`` of them.

    Args:
        batch: of ``LanguageModeling``.
        least: fewest tokens of a prompt.
        turn: which run of learned tokens the prompt ends before: "last", "first" or "random", drawn by ``generator``.
        generator: of the random turns.
    """
    batch = on_host(
        {n: batch[n] for n in ("input_ids", "attention_mask", "learn", "labels") if batch.get(n) is not None}
    )
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if batch.get("attention_mask") is not None else torch.ones_like(ids)
    learn = batch.get("learn")
    if learn is None:
        learn = batch["labels"] != IGNORE_INDEX if batch.get("labels") is not None else mask
    out = []
    for row, kept, learned in zip(ids.tolist(), mask.tolist(), learn.tolist(), strict=True):
        text = [(i, flag) for i, keep, flag in zip(row, kept, learned, strict=True) if keep]
        begins = [begin for begin, _ in learned_turns([flag for _, flag in text])] or [len(text)]
        index = (generator or random.Random(0)).randrange(len(begins)) if turn == "random" else TURNS[turn]
        out.append([i for i, _ in text[: max(begins[index], least)]])
    return out
