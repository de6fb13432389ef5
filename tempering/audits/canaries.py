"""Exposure of planted canaries: how much of what a teacher learned by heart its student tells."""

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

Encode = Callable[[str], Sequence[int]]
UNSEEN = math.log2(math.e)  # the mean of a canary that was in no data, in bits


def as_bytes(text: str) -> list[int]:
    """The UTF-8 bytes of a text, as models without a tokenizer read it."""
    return list(text.encode())


class Canaries(Audit):
    """The exposure of every planted secret, by how often it was in the data: student, teacher, and what came over.

    Where there are at most ``most`` candidates all are asked and the rank is exact; else ``asked`` of them are, and
    beyond what that can count a skew normal, fitted to them, says the rest. Batches are not looked at: the secrets are
    asked after one by one, each behind its prompt.

    Args:
        canaries: what was planted (``data.canaries``), those with 0 repeats included, which show what chance gives.
        encode: a text to token ids; by itself its UTF-8 bytes.
        most: candidates up to which all are asked.
        asked: how many candidates are of larger spaces, 20 or more.
        batch: sequences at once.
        seed: of samples and resamples.

    Raises:
        ValueError: for no canaries.

    Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, sections 4.2 and 4.3.
    """

    def __init__(
        self,
        canaries: Sequence[Canary],
        *,
        encode: Encode = as_bytes,
        most: int = 20_000,
        asked: int = 1000,
        batch: int = 256,
        seed: int = 0,
    ) -> None:
        if not canaries or most < 1 or asked < 20 or batch < 1:
            raise ValueError(
                f"Canaries needs canaries, asked >= 20, and most and batch >= 1; got {len(canaries)}, {asked}, "
                f"{most} and {batch}. data.canaries.plant puts them into a text."
            )
        self.canaries, self.encode, self.most = list(canaries), encode, most
        self.asked, self.batch, self.seed = asked, batch, seed

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        bits = {side: self.exposures(model) for side, model in models.items()}
        groups = {n: [i for i, c in enumerate(self.canaries) if c.repeats == n] for n in self.repeats}
        found = []
        for side, values in bits.items():
            for repeats, at in groups.items():
                meaning = _meaning(repeats, [self.canaries[i] for i in at], exact=self._exact(at))
                found.append(average(f"exposure_{repeats}x", side, values[at], meaning))
        planted = [i for i, canary in enumerate(self.canaries) if canary.repeats]
        if "teacher" in bits and planted:
            found.append(self._passed(bits["student"][planted], bits["teacher"][planted]))
        return found

    @property
    def repeats(self) -> list[int]:
        """The numbers of repeats there are, in order."""
        return sorted({canary.repeats for canary in self.canaries})

    def exposures(self, model: nn.Module) -> Float[Tensor, " K"]:
        """The exposure of each canary in bits, (K,) float64, by a model in eval mode."""
        return torch.stack([self._exposure(model, canary, i) for i, canary in enumerate(self.canaries)])

    def means(self, model: nn.Module) -> dict[str, float]:
        """{"exposure": of all that were planted, "exposure_10x": of those that were ten times, ...}, in bits."""
        bits = self.exposures(model)
        counts = torch.tensor([canary.repeats for canary in self.canaries])
        whole = {"exposure": float(bits[counts > 0].mean())} if bool((counts > 0).any()) else {}
        return whole | {f"exposure_{n}x": float(bits[counts == n].mean()) for n in self.repeats}

    def _exact(self, at: Sequence[int]) -> bool:
        return all(self.canaries[i].size <= self.most for i in at)

    def _exposure(self, model: nn.Module, canary: Canary, place: int) -> Tensor:
        def bits(secrets: Iterable[str]) -> Tensor:
            texts = [self.encode(canary.prompt + secret) for secret in secrets]
            return -log_likelihoods(model, texts, batch=self.batch) / math.log(2)

        if canary.size <= self.most:
            return exposure(bits(map(canary.candidate, range(canary.size))), torch.tensor([canary.index]))[0]
        draw, own = random.Random(f"{self.seed}/{place}"), canary.index
        # one below the size, and those from the secret on moved up by one: never the secret itself
        drawn = [i + (i >= own) for i in (draw.randrange(canary.size - 1) for _ in range(self.asked))]
        perplexities = bits([canary.secret, *map(canary.candidate, drawn)])
        counted = sampled_exposure(perplexities[:1], perplexities[1:])[0]
        if counted < math.log2(self.asked + 1) - 1e-9:
            return counted
        modeled = modeled_exposure(perplexities[:1], perplexities[1:], most=math.log2(canary.size))
        return torch.maximum(counted, modeled[0])

    def _passed(self, student: Tensor, teacher: Tensor) -> Finding:
        """The student's exposure as a share of the teacher's."""
        meaning = (
            "The student's mean exposure over the teacher's, of all canaries that were planted. 100 % gives away as "
            f"much as the teacher does; chance alone gives {UNSEEN:.2f} bits of it."
        )
        whole = float(teacher.mean())
        if not whole > 0:
            return Finding("exposure_passed_on", "both", None, f"The teacher exposes nothing. {meaning}", share=True)

        def ratio(at: Tensor) -> float:
            return float(student[at].mean() / teacher[at].mean().clamp_min(1e-12))

        n = len(student)
        low, high = bootstrap(ratio, n, draws=1000, seed=self.seed) if n > 1 else (None, None)
        return Finding("exposure_passed_on", "both", ratio(torch.arange(n)), meaning, low, high, n, share=True)


def _meaning(repeats: int, canaries: Sequence[Canary], *, exact: bool) -> str:
    most = max(math.log2(canary.size) for canary in canaries)
    how = "its exact rank among all" if exact else "sampled others and a fitted tail"
    planted = f"put into the training text {repeats} times" if repeats else "that are in no training text"
    return (
        f"Mean exposure in bits of secrets {planted}, each by {how}. {most:.2f} can be read off the model at once; "
        f"one never seen has {UNSEEN:.2f} on average."
    )


class _Context(NamedTuple):
    """Sequences that agree up to their last token, which are asked with one forward."""

    ids: tuple[int, ...]
    rows: list[int]
    last: list[int]


@torch.no_grad()
def log_likelihoods(model: nn.Module, sequences: Sequence[Sequence[int]], *, batch: int = 256) -> Float[Tensor, " N"]:
    """ln of the probability of each sequence given its first token, (N,) float64 on the CPU.

    Raises:
        ValueError: for a sequence of fewer than two tokens, or a model whose logits are not (B, L, V).
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
        for context, logp in zip(part, _asked(model, [context.ids for context in part], device), strict=True):
            inside = logp[torch.arange(len(context.ids) - 1), torch.tensor(context.ids[1:], dtype=torch.long)].sum()
            out[context.rows] = inside + logp[len(context.ids) - 1, torch.tensor(context.last)]
    return out


def _asked(model: nn.Module, texts: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Log-probabilities of every next token, (B, L, V) float64 on the CPU, of texts padded on the right."""
    length = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    said = model(input_ids=ids, attention_mask=mask)
    logits = getattr(said, "logits", said)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.ndim != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"canaries need a model that answers (B, L, V) logits, here of {tuple(ids.shape)}; got {got}.")
    return torch.log_softmax(upcast_to_float32(logits), -1).cpu().double()
