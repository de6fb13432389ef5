"""Score generated texts against their references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.text import eos_ids
from tempering.rollouts.generation_config import Sampling
from tempering.rollouts.sampling import generate, learned_turns, prompts_and_source
from tempering.rows import IGNORE_INDEX
from tempering.utils.tensors import on_host, to_device

WORD = re.compile(r"[a-z0-9]+")
ANSWER = re.compile(r"####\s*([^\n]*)")


class GenerationScorer:
    """Generates greedily and averages a score over texts: {name: mean}.

    Args:
        grade: (generated, reference) -> score; both are results of ``decode``.
        name: name of the score.
        decode: maps token ids, without the end-of-text token, to the input of ``grade``; None passes the list.
        eos: end-of-text token id, or several, of which any ends a text; None for none.
        pad: padding token id.
        max_new_tokens: most tokens to generate.
        prompt_length: fewest prompt tokens per text, for causal models.

    Raises:
        ValueError: for max_new_tokens or prompt_length below 1.
    """

    def __init__(
        self,
        grade: Callable[[Any, Any], float],
        *,
        name: str,
        decode: Callable[[list[int]], Any] | None = None,
        eos: int | Sequence[int] | None = None,
        pad: int = 0,
        max_new_tokens: int = 128,
        prompt_length: int = 1,
    ) -> None:
        if max_new_tokens < 1 or prompt_length < 1:
            raise ValueError(
                f"GenerationScorer needs max_new_tokens and prompt_length >= 1; got {max_new_tokens} and "
                f"{prompt_length}."
            )
        self.grade, self.name, self.decode, self.eos, self.pad = grade, name, decode, eos, pad
        self.max_new_tokens, self.prompt_length = max_new_tokens, prompt_length

    @torch.no_grad()
    def __call__(
        self, student: nn.Module, batches: Iterable[Any], *, vocabulary: int | None = None
    ) -> dict[str, float]:
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        grades = []
        for batch in batches:
            batch = to_device(dict(batch), device)
            prompts, source = prompts_and_source(student, batch, self.prompt_length)
            options: dict[str, Any] = {
                "max_new_tokens": self.max_new_tokens,
                "eos": self.eos,
                "pad": self.pad,
                "vocabulary": vocabulary,
            }
            out, _ = generate(student, None, prompts, source=source, sampling=Sampling(temperature=0.0), **options)
            tokens = out["input_ids"] if source is None else out["generated"]
            for ids, learn, labels in zip(*on_host((tokens, out["learn"], batch["labels"])), strict=True):
                reference = labels != IGNORE_INDEX
                if source is None and (turns := learned_turns(reference.tolist())):
                    reference = slice(*turns[-1])  # the turn that the prompt ends before
                grades.append(float(self.grade(self._decode(ids[learn != 0]), self._decode(labels[reference]))))
        return {self.name: sum(grades) / max(1, len(grades))}

    def _decode(self, ids: Tensor) -> Any:
        tokens = ids.tolist()
        tokens = tokens[:-1] if {*eos_ids(self.eos)}.intersection(tokens[-1:]) else tokens
        return tokens if self.decode is None else self.decode(tokens)


def rouge_l(generated: str | Sequence[Any], reference: str | Sequence[Any]) -> float:
    """Return ROUGE-L F1 in [0, 1]: the longest common subsequence's share of either side, in harmonic mean.

    It is 0 if one side is empty. Texts are compared by their lower-case words of letters and digits, not stemmed;
    sequences by their items.

    Reference: Lin, "ROUGE", 2004; words as in Google's rouge_score.
    """
    a, b = (WORD.findall(x.lower()) if isinstance(x, str) else list(x) for x in (generated, reference))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2.0 * row[-1] / (len(a) + len(b))


def exact_match(generated: str, reference: str) -> float:
    """Return 1 if the answers after the last "####" are equal, as in GSM8K, else 0; commas in numbers are ignored.

    Raises:
        ValueError: if the reference has no answer.
    """
    answers, expected = (ANSWER.findall(text) for text in (generated, reference))
    if not expected:
        raise ValueError(f'the reference has no answer after "####": {reference[-40:]!r}.')
    return float(bool(answers) and _normalize(answers[-1]) == _normalize(expected[-1]))


def _normalize(answer: str) -> str:
    return answer.replace(",", "").strip().rstrip(".")
