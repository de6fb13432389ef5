"""Whether two models mean the same by a token id."""

from __future__ import annotations

import warnings
from typing import Any

PROBE = "Two  rows,\n\tone naïve token: 3.14 — 水 🙂 <b>"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def shared_vocabulary(student: Any, teacher: Any, *, probe: str = PROBE) -> int:
    """How many tokens both tokenizers have, after a look that every id means the same to both.

    Of tokenizers of transformers, or anything with ``get_vocab()`` and ``encode(text)``. Other ids of bos, eos and pad
    are a warning: such a teacher ends its texts where the student has never seen an end.

    Args:
        probe: a text that both have to cut into the same tokens.

    Raises:
        ValueError: naming the first id, or the first token of the probe, that differs.
    """
    ours, theirs = ({int(i): token for token, i in side.get_vocab().items()} for side in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            said = " and ".join(
                f"{vocabulary[i]!r} for the {side}" if i in vocabulary else f"nothing for the {side}"
                for side, vocabulary in (("student", ours), ("teacher", theirs))
            )
            raise ValueError(
                f"the tokenizers differ: id {i} is {said} ({len(ours)} and {len(theirs)} tokens). Rows compare token "
                "by token: take a student of the teacher's family, or one with its tokenizer."
            )
    cut = [_ids(side, probe) for side in (student, teacher)]
    if cut[0] != cut[1]:
        at = next((i for i, (a, b) in enumerate(zip(*cut, strict=False)) if a != b), min(map(len, cut)))
        raise ValueError(
            f"the tokenizers have one vocabulary and cut {probe!r} differently: from its token {at} on the student's "
            f"are {cut[0][at : at + 4]} and the teacher's {cut[1][at : at + 4]}. Other merges, or another normalizer?"
        )
    for name in SPECIAL:
        a, b = getattr(student, name, None), getattr(teacher, name, None)
        if a != b:
            warnings.warn(
                f"{name} is {a} for the student and {b} for the teacher. A base and an instruct model? Build the data "
                "with the one that the student is to end with.",
                stacklevel=2,
            )
    return max(ours) + 1


def _ids(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer.encode(text)
    return list(getattr(found, "ids", found))
