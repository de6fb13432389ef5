"""Insert canaries, made-up secrets, into a text to measure how much of it a model memorizes.

Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, section 4.1.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

DIGITS = "0123456789"
# each name is in one canary only, so that no secret is learned from another
FIRST, LAST = ("bo", "da", "ka", "lu", "mi", "ne", "pe", "ra", "so", "ti", "vu", "za"), ("bin", "dor", "lan", "mek")
NAMES = tuple(first + last for first in FIRST for last in LAST)


@dataclass(frozen=True, slots=True)
class Canary:
    """One secret, drawn from all texts of its length over ``alphabet``, and the prompt before it.

    Args:
        prompt: text before the secret, such as "\\nthe code of anna is ".
        secret: the text that was drawn.
        repeats: number of times it is in the data; 0 for a control that is not in the data.
        alphabet: the characters from which the secret was drawn.
        end: text after the secret where it is inserted; audits do not score it.

    Raises:
        ValueError: for a secret that is empty or not over its alphabet, or repeats below 0.
    """

    prompt: str
    secret: str
    repeats: int
    alphabet: str = DIGITS
    end: str = "\n"

    def __post_init__(self) -> None:
        if not self.secret or set(self.secret) - set(self.alphabet) or self.repeats < 0:
            raise ValueError(
                f"Canary needs a secret of {self.alphabet!r} and repeats >= 0; got {self.secret!r} and {self.repeats}."
            )

    @property
    def size(self) -> int:
        """Number of possible secrets."""
        return len(self.alphabet) ** len(self.secret)

    def candidate(self, index: int) -> str:
        """Return the possible secret with this index, 0 <= index < ``size``."""
        characters = []
        for _ in self.secret:
            index, digit = divmod(index, len(self.alphabet))
            characters.append(self.alphabet[digit])
        return "".join(reversed(characters))

    @property
    def index(self) -> int:
        """Index of the secret that was drawn."""
        number = 0
        for character in self.secret:
            number = number * len(self.alphabet) + self.alphabet.index(character)
        return number


def canaries(
    repeats: Sequence[int] = (0, 1, 10, 100),
    *,
    each: int = 5,
    digits: int = 3,
    form: str = "\nthe code of {name} is ",
    end: str = ".\n",
    seed: int = 0,
) -> list[Canary]:
    """Draw ``each`` canaries per number of repeats, each with its own name and a uniform secret of ``digits`` digits.

    Args:
        repeats: numbers of times that a canary is inserted; 0 for controls.
        each: canaries per number of repeats.
        digits: length of a secret.
        form: prompt, with {name} in the place of the name.
        end: text after an inserted secret.
        seed: of names and secrets.

    Raises:
        ValueError: for more canaries than there are names, no {name} in the form, or a number below 1.
    """
    total = each * len(repeats)
    if not 0 < total <= len(NAMES) or digits < 1 or "{name}" not in form:
        raise ValueError(
            f"canaries needs 1 to {len(NAMES)} of them, digits >= 1 and a form with {{name}}; got {total}, {digits} "
            f"and {form!r}."
        )
    rng = random.Random(seed)
    names = rng.sample(NAMES, total)
    counts = [count for count in repeats for _ in range(each)]
    return [
        Canary(form.format(name=name), "".join(rng.choices(DIGITS, k=digits)), count, end=end)
        for name, count in zip(names, counts, strict=True)
    ]


def insert_canaries(text: str, secrets: Sequence[Canary], *, seed: int = 0) -> str:
    """Insert every canary ``repeats`` times, each time after a random line drawn with ``seed``.

    Raises:
        ValueError: for a text without a line break.
    """
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    lines = [c.prompt.lstrip("\n") + c.secret + c.end for c in secrets for _ in range(c.repeats)]
    if not ends:
        raise ValueError("canaries are inserted after lines, and the text has no line break.")
    rng = random.Random(seed)
    offsets = sorted(rng.choices(ends, k=len(lines)))
    rng.shuffle(lines)
    parts, last = [], 0
    for offset, line in zip(offsets, lines, strict=True):
        parts += [text[last:offset], line]
        last = offset
    return "".join([*parts, text[last:]])


def canary_spans(text: str, secrets: Sequence[Canary]) -> list[tuple[int, int]]:
    """Return (start, end) of every inserted secret in the text, in order: the output of a perfect detector."""
    spans = []
    for canary in secrets:
        start = text.find(canary.prompt + canary.secret)
        while start >= 0:
            begin = start + len(canary.prompt)
            bisect.insort(spans, (begin, begin + len(canary.secret)))
            start = text.find(canary.prompt + canary.secret, begin)
    return spans
