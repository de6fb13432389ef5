"""Check that two tokenizers have the same vocabulary."""

from __future__ import annotations

import warnings
from typing import Any

PROBE = "Two  rows,\n\tone naïve token: 3.14 — 水 🙂 <b>"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def shared_vocabulary(student: Any, teacher: Any, *, probe: str = PROBE) -> int:
    """Check that every id is the same token in both tokenizers and return the number of tokens.

    Takes transformers tokenizers, or objects with ``get_vocab()`` and ``encode(text)``. Warns if the ids of bos, eos or
    pad differ: such a teacher ends its texts with a token that the student does not know as an end.

    Args:
        student, teacher: the tokenizers.
        probe: a text that both have to tokenize equally.

    Raises:
        ValueError: naming the first id, or the first token of the probe, that differs.
    """
    student_vocab, teacher_vocab = (
        {int(i): token for token, i in side.get_vocab().items()} for side in (student, teacher)
    )
    for i in sorted(student_vocab.keys() | teacher_vocab.keys()):
        if student_vocab.get(i) != teacher_vocab.get(i):
            tokens = " and ".join(
                f"{vocabulary[i]!r} for the {side}" if i in vocabulary else f"nothing for the {side}"
                for side, vocabulary in (("student", student_vocab), ("teacher", teacher_vocab))
            )
            raise ValueError(
                f"the tokenizers differ: id {i} is {tokens} ({len(student_vocab)} and {len(teacher_vocab)} tokens). "
                "Rows compare token by token: take a student of the teacher's family, or one with its tokenizer."
            )
    encoded = [_ids(side, probe) for side in (student, teacher)]
    if encoded[0] != encoded[1]:
        first = next((i for i, (a, b) in enumerate(zip(*encoded, strict=False)) if a != b), min(map(len, encoded)))
        raise ValueError(
            f"the tokenizers have one vocabulary and encode {probe!r} differently: from token {first} on the student's "
            f"are {encoded[0][first : first + 4]} and the teacher's {encoded[1][first : first + 4]}. Other merges, or "
            "another normalizer?"
        )
    for name in SPECIAL:
        a, b = getattr(student, name, None), getattr(teacher, name, None)
        if a != b:
            warnings.warn(
                f"{name} is {a} for the student and {b} for the teacher. A base and an instruct model? Build the data "
                "with the token with which the student shall end its texts.",
                stacklevel=2,
            )
    return max(student_vocab) + 1


def _ids(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))
