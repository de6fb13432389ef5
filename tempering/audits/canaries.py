"""Exposure of planted canaries: how much of what the teacher memorized its student reveals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.audits.base import Audit, Finding
from tempering.audits.exposure import exposure, modeled_exposure, sampled_exposure
from tempering.audits.intervals import average, bootstrap
from tempering.data.canaries import Canary
from tempering.rows import upcast_to_float32
from tempering.utils.text import counted

Encode = Callable[[str], Sequence[int]]
UNSEEN = math.log2(math.e)  # mean exposure of a canary that was in no data, in bits


def as_bytes(text: str) -> list[int]:
    """Return the UTF-8 bytes of a text, for models without a tokenizer."""
    return list(text.encode())


class Canaries(Audit):
    """Measure the exposure of every planted secret by its number of repeats: student, teacher, and the ratio.

    If a canary has at most ``max_candidates`` candidates, all are scored and the rank is exact; otherwise ``sampled``
    ones are drawn, and ranks beyond the sample are extrapolated with a fitted skew normal distribution. The batches are
    not used: each secret is scored after its prompt.

    Args:
        canaries: the planted canaries (``data.canaries``), including those with 0 repeats, which show the chance level.
        encode: text -> token ids; default: UTF-8 bytes.
        max_candidates: largest number of candidates that are all scored.
        sampled: number of sampled candidates if there are more, at least 20.
        batch: sequences per forward pass.
        seed: seed of samples and resamples.

    Raises:
        ValueError: if there are no canaries.

    Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, sections 4.2 and 4.3.
    """

    def __init__(
        self,
        canaries: Sequence[Canary],
        *,
        encode: Encode = as_bytes,
        max_candidates: int = 20_000,
        sampled: int = 1000,
        batch: int = 256,
        seed: int = 0,
    ) -> None:
        if not canaries or max_candidates < 1 or sampled < 20 or batch < 1:
            raise ValueError(
                f"Canaries needs canaries, sampled >= 20, and max_candidates and batch >= 1; got {len(canaries)}, "
                f"{sampled}, {max_candidates} and {batch}. data.canaries.plant puts them into a text."
            )
        self.canaries, self.encode, self.max_candidates = list(canaries), encode, max_candidates
        self.sampled, self.batch, self.seed = sampled, batch, seed

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        bits = {side: self.exposures(model) for side, model in models.items()}
        groups = {n: [i for i, c in enumerate(self.canaries) if c.repeats == n] for n in self.repeats}
        results = []
        for side, values in bits.items():
            for repeats, indices in groups.items():
                meaning = _meaning(repeats, [self.canaries[i] for i in indices], exact=self._exact(indices))
                results.append(average(f"exposure_{repeats}x", side, values[indices], meaning))
        planted = [i for i, canary in enumerate(self.canaries) if canary.repeats]
        if "teacher" in bits and planted:
            results.append(self._passed_on(bits["student"][planted], bits["teacher"][planted]))
        return results

    @property
    def repeats(self) -> list[int]:
        """Return the distinct numbers of repeats, sorted."""
        return sorted({canary.repeats for canary in self.canaries})

    def exposures(self, model: nn.Module) -> Float[Tensor, " K"]:
        """Return the exposure of each canary in bits, (K,) float64, for a model in eval mode."""
        return torch.stack([self._exposure(model, canary, i) for i, canary in enumerate(self.canaries)])

    def means(self, model: nn.Module) -> dict[str, float]:
        """Return mean exposures in bits: {"exposure": all planted, "exposure_10x": those repeated ten times, ...}."""
        bits = self.exposures(model)
        counts = torch.tensor([canary.repeats for canary in self.canaries])
        means = {"exposure": float(bits[counts > 0].mean())} if bool((counts > 0).any()) else {}
        return means | {f"exposure_{n}x": float(bits[counts == n].mean()) for n in self.repeats}

    def _exact(self, indices: Sequence[int]) -> bool:
        return all(self.canaries[i].size <= self.max_candidates for i in indices)

    def _exposure(self, model: nn.Module, canary: Canary, number: int) -> Tensor:
        def bits(secrets: Iterable[str]) -> Tensor:
            texts = [self.encode(canary.prompt + secret) for secret in secrets]
            return -log_likelihoods(model, texts, batch=self.batch) / math.log(2)

        if canary.size <= self.max_candidates:
            return exposure(bits(map(canary.candidate, range(canary.size))), torch.tensor([canary.index]))[0]
        draw, secret_index = random.Random(f"{self.seed}/{number}"), canary.index
        # draw from size - 1 and shift indices from the secret's on by one, so the secret is never drawn
        drawn = [i + (i >= secret_index) for i in (draw.randrange(canary.size - 1) for _ in range(self.sampled))]
        perplexities = bits([canary.secret, *map(canary.candidate, drawn)])
        counted = sampled_exposure(perplexities[:1], perplexities[1:])[0]
        if counted < math.log2(self.sampled + 1) - 1e-9:
            return counted
        modeled = modeled_exposure(perplexities[:1], perplexities[1:], upper_bound=math.log2(canary.size))
        return torch.maximum(counted, modeled[0])

    def _passed_on(self, student: Tensor, teacher: Tensor) -> Finding:
        """Return the student's exposure as a fraction of the teacher's."""
        meaning = (
            "The student's mean exposure divided by the teacher's, over all planted canaries. At 100 % it reveals as "
            f"much as the teacher; the chance level is {UNSEEN:.2f} bits."
        )
        teacher_mean = float(teacher.mean())
        if not teacher_mean > 0:
            return Finding("exposure_passed_on", "both", None, f"The teacher exposes nothing. {meaning}", share=True)

        def ratio(rows: Tensor) -> float:
            return float(student[rows].mean() / teacher[rows].mean().clamp_min(1e-12))

        n = len(student)
        low, high = bootstrap(ratio, n, draws=1000, seed=self.seed) if n > 1 else (None, None)
        return Finding("exposure_passed_on", "both", ratio(torch.arange(n)), meaning, low, high, n, share=True)


def _meaning(repeats: int, canaries: Sequence[Canary], *, exact: bool) -> str:
    highest = max(math.log2(canary.size) for canary in canaries)
    method = "its exact rank among all" if exact else "sampled others and a fitted tail"
    planted = f"put into the training text {counted(repeats, 'time')}" if repeats else "that are in no training text"
    return (
        f"Mean exposure in bits of secrets {planted}, each by {method}. A secret at {highest:.2f} can be extracted "
        f"directly; an unseen one has {UNSEEN:.2f} on average."
    )


class _Context(NamedTuple):
    """Sequences that agree up to their last token and share one forward pass."""

    ids: tuple[int, ...]
    rows: list[int]
    last: list[int]


@torch.no_grad()
def log_likelihoods(model: nn.Module, sequences: Sequence[Sequence[int]], *, batch: int = 256) -> Float[Tensor, " N"]:
    """Return the log-probability (nats) of each sequence given its first token, (N,) float64 on the CPU.

    Raises:
        ValueError: if a sequence has fewer than two tokens, or the logits are not (B, L, V).
    """
    if short := [i for i, ids in enumerate(sequences) if len(ids) < 2]:
        raise ValueError(f"a likelihood needs two tokens at least; sequence {short[0]} has {len(sequences[short[0]])}.")
    contexts: dict[tuple[int, ...], _Context] = {}
    for row, ids in enumerate(sequences):
        front = tuple(ids[:-1])
        context = contexts.setdefault(front, _Context(front, [], []))
        context.rows.append(row)
        context.last.append(ids[-1])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    out = torch.empty(len(sequences), dtype=torch.float64)
    ordered = sorted(contexts.values(), key=lambda context: len(context.ids))
    for first in range(0, len(ordered), batch):
        part = ordered[first : first + batch]
        for context, logp in zip(part, _next_token_logp(model, [context.ids for context in part], device), strict=True):
            inside = logp[torch.arange(len(context.ids) - 1), torch.tensor(context.ids[1:], dtype=torch.long)].sum()
            out[context.rows] = inside + logp[len(context.ids) - 1, torch.tensor(context.last)]
    return out


def _next_token_logp(model: nn.Module, texts: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Return log-probabilities of every next token, (B, L, V) float64 on the CPU; texts are padded on the right."""
    length = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    output = model(input_ids=ids, attention_mask=mask)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.ndim != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"canaries need a model with (B, L, V) logits, (B, L) being {tuple(ids.shape)} here; got {got}."
        )
    return torch.log_softmax(upcast_to_float32(logits), -1).cpu().double()
