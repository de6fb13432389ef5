"""What a student writes by itself, beside what it should have: scores of texts, not of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rollouts.sampling import Sampling, asked_for, generate
from tempering.rows import IGNORE_INDEX
from tempering.utils.tensors import to_device

WORD = re.compile(r"[a-z0-9]+")
ANSWER = re.compile(r"####\s*([^\n]*)")


class GenerationScorer:
    """The mean grade of what a student writes greedily, text by text: {name: mean}.

    Args:
        grade: (what was written, what is wanted) -> a number; both are what ``decode`` makes of token ids.
        name: of the score.
        decode: token ids, without the end, to what is graded; None leaves the list.
        eos: the token that ends a text; None for none.
        pad: of the batches.
        length: how many tokens are written at most.
        prompt: how many tokens of a text are its prompt at least, of causal models.

    Raises:
        ValueError: for length or prompt below 1.
    """

    def __init__(
        self,
        grade: Callable[[Any, Any], float],
        *,
        name: str,
        decode: Callable[[list[int]], Any] | None = None,
        eos: int | None = None,
        pad: int = 0,
        length: int = 128,
        prompt: int = 1,
    ) -> None:
        if length < 1 or prompt < 1:
            raise ValueError(f"GenerationScorer needs length and prompt >= 1; got {length} and {prompt}.")
        self.grade, self.name, self.decode, self.eos, self.pad = grade, name, decode, eos, pad
        self.length, self.prompt = length, prompt

    @torch.no_grad()
    def __call__(
        self, student: nn.Module, batches: Iterable[Any], *, vocabulary: int | None = None
    ) -> dict[str, float]:
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        grades = []
        for batch in batches:
            batch = to_device(dict(batch), device)
            prompts, source = asked_for(student, batch, self.prompt)
            own: dict[str, Any] = {"length": self.length, "eos": self.eos, "pad": self.pad, "vocabulary": vocabulary}
            made, _ = generate(student, None, prompts, source=source, sampling=Sampling(temperature=0.0), **own)
            said = made["input_ids"] if source is None else made["generated"]
            for ids, learn, labels in zip(said, made["learn"], batch["labels"], strict=True):
                written, wanted = self._text(ids[learn != 0]), self._text(labels[labels != IGNORE_INDEX])
                grades.append(float(self.grade(written, wanted)))
        return {self.name: sum(grades) / max(1, len(grades))}

    def _text(self, ids: Tensor) -> Any:
        found = ids.tolist()
        found = found[:-1] if found[-1:] == [self.eos] else found
        return found if self.decode is None else self.decode(found)


def rouge_l(written: str | Sequence[Any], wanted: str | Sequence[Any]) -> float:
    """ROUGE-L F1 in [0, 1]: the harmonic mean of the longest common subsequence's share of either; 0 for an empty one.

    Of texts the lower-case words of letters and digits are compared, not stemmed; of sequences their items.

    Reference: Lin, "ROUGE", 2004; words as in Google's rouge_score.
    """
    a, b = (WORD.findall(x.lower()) if isinstance(x, str) else list(x) for x in (written, wanted))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2.0 * row[-1] / (len(a) + len(b))


def exact_match(written: str, wanted: str) -> float:
    """1 where both have the same answer behind their last "####", as GSM8K's do, else 0; commas in numbers are nothing.

    Raises:
        ValueError: where what is wanted has no answer.
    """
    said, asked = (ANSWER.findall(text) for text in (written, wanted))
    if not asked:
        raise ValueError(f'the wanted text has no answer behind "####": {wanted[-40:]!r}.')
    return float(bool(said) and _plain(said[-1]) == _plain(asked[-1]))


def _plain(answer: str) -> str:
    return answer.replace(",", "").strip().rstrip(".")
