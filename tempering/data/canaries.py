"""Canaries: made-up secrets that are planted in a text, so that what a model learned by heart can be measured.

Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, section 4.1.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

DIGITS = "0123456789"
# each name stands in one canary, so that no secret is learned from another
FIRST, LAST = ("bo", "da", "ka", "lu", "mi", "ne", "pe", "ra", "so", "ti", "vu", "za"), ("bin", "dor", "lan", "mek")
NAMES = tuple(first + last for first in FIRST for last in LAST)


@dataclass(frozen=True, slots=True)
class Canary:
    """One secret: ``prompt`` is known, and ``secret`` one of all texts of its length over ``alphabet``.

    Args:
        prompt: what comes before the secret, such as "\\nthe code of anna is ".
        secret: what was drawn.
        repeats: how often it is in the data; 0 for one that is nowhere, to compare with.
        alphabet: what each character of the secret was drawn from.
        end: what follows the secret where it is planted; no audit asks after it.

    Raises:
        ValueError: for a secret that is empty or not of its alphabet, or repeats below 0.
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
        """How many secrets there might have been."""
        return len(self.alphabet) ** len(self.secret)

    def candidate(self, index: int) -> str:
        """The secret of that number, from 0 to ``size``."""
        out = []
        for _ in self.secret:
            index, digit = divmod(index, len(self.alphabet))
            out.append(self.alphabet[digit])
        return "".join(reversed(out))

    @property
    def index(self) -> int:
        """The number of the secret that was drawn."""
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
    """``each`` secrets of that many digits for every number of repeats, drawn uniformly, each of another name.

    Raises:
        ValueError: for more canaries than there are names, no {name} in the form, or a number below 1.
    """
    wanted = each * len(repeats)
    if not 0 < wanted <= len(NAMES) or digits < 1 or "{name}" not in form:
        raise ValueError(
            f"canaries needs 1 to {len(NAMES)} of them, digits >= 1 and a form with {{name}}; got {wanted}, {digits} "
            f"and {form!r}."
        )
    draw = random.Random(seed)
    names = draw.sample(NAMES, wanted)
    counts = [count for count in repeats for _ in range(each)]
    return [
        Canary(form.format(name=name), "".join(draw.choices(DIGITS, k=digits)), count, end=end)
        for name, count in zip(names, counts, strict=True)
    ]


def insert_canaries(text: str, secrets: Sequence[Canary], *, seed: int = 0) -> str:
    """The text with every canary in it as often as it says, behind a line drawn with ``seed``.

    Raises:
        ValueError: for a text without a line end.
    """
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    lines = [c.prompt.lstrip("\n") + c.secret + c.end for c in secrets for _ in range(c.repeats)]
    if not ends:
        raise ValueError("canaries are planted behind lines, and the text has no line end.")
    draw = random.Random(seed)
    places = sorted(draw.choices(ends, k=len(lines)))
    draw.shuffle(lines)
    out, last = [], 0
    for place, line in zip(places, lines, strict=True):
        out += [text[last:place], line]
        last = place
    return "".join([*out, text[last:]])


def canary_spans(text: str, secrets: Sequence[Canary]) -> list[tuple[int, int]]:
    """(start, end) of every planted secret in the text, in order: what a perfect detector would find."""
    found = []
    for canary in secrets:
        start = text.find(canary.prompt + canary.secret)
        while start >= 0:
            begin = start + len(canary.prompt)
            bisect.insort(found, (begin, begin + len(canary.secret)))
            start = text.find(canary.prompt + canary.secret, begin)
    return found
