"""Align the tokens of two tokenizers: find the groups of tokens that cover the same bytes of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tempering.data.text import TextExample, collate, eos_ids, make_prompt_example

NO_GROUP = -1  # the group of a token without a counterpart


class Pieces:
    """A tokenizer with the bytes of its tokens.

    Args:
        encode: text -> token ids, without special tokens.
        table: id -> bytes of the token; b"" for tokens without text, such as special tokens.
        eos, bos: ids of the end-of-sequence token, learned after a completion (of several, the first is), and of the
            beginning-of-sequence token, put before a prompt; None for none.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        table: Mapping[int, bytes],
        *,
        eos: int | Iterable[int] | None = None,
        bos: int | None = None,
    ) -> None:
        self.encode, self.table, self.eos, self.bos = encode, table, next(iter(eos_ids(eos)), None), bos

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Wrap a tokenizer of transformers: byte-level (GPT-2, Llama 3, Qwen) or SentencePiece (Llama 2, Gemma).

        Raises:
            ValueError: for a vocabulary of another kind, whose bytes are unknown.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        special, letters = set(tokenizer.all_special_ids), _byte_letters()
        byte_level = all(letter in vocabulary for letter in letters)
        if not byte_level and not any(token.startswith("\u2581") for token in vocabulary):
            raise ValueError(
                f"{type(tokenizer).__name__} has neither bytes nor SentencePiece's pieces, so the bytes of its tokens "
                "are not known. Pass them: data.spans.Pieces(encode, {id: bytes})."
            )

        def token_bytes(token: str, number: int) -> bytes:
            if number in special:
                return b""
            if not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            if number in added:
                return added[number].encode()
            if byte_level:
                return bytes(letters[letter] for letter in token)
            return token.replace("\u2581", " ").encode()

        table = {int(number): token_bytes(token, int(number)) for token, number in vocabulary.items()}
        adds_bos = list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token_id if adds_bos else None
        return cls(
            lambda text: tokenizer.encode(text, add_special_tokens=False), table, eos=tokenizer.eos_token_id, bos=bos
        )

    def cut(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and the number of bytes that each covers.

        The space that SentencePiece adds before a text is not counted.

        Raises:
            ValueError: if the bytes of the tokens differ from those of the text, stating the first difference.
        """
        ids, expected = list(self.encode(text)), text.encode()
        parts = [self.table.get(i, b"") for i in ids]
        sizes, actual = [len(part) for part in parts], b"".join(parts)
        if actual == b" " + expected:
            first = next(i for i, size in enumerate(sizes) if size)
            sizes[first], actual = sizes[first] - 1, expected
        if actual != expected:
            differing = (i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b)
            at = next(differing, min(len(actual), len(expected)))
            raise ValueError(
                f"the tokens do not spell the text: from byte {at} on it has {expected[at : at + 12]!r}, and they have "
                f"{actual[at : at + 12]!r}. Tokens of a tokenizer that normalizes (lower case, NFKC) or has an unknown "
                "token cannot be aligned; normalize the text first."
            )
        return ids, sizes


def align_groups(ours: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Assign the tokens of both sides to groups, from 0: a group ends where tokens of both sides end at the same byte.

    Args:
        ours, theirs: number of bytes that each token covers, from the first byte of one text; either may be truncated.

    Returns:
        The group of every token on both sides. -1 for a token of 0 bytes (so a beginning-of-sequence token on one side
        shifts nothing), and for tokens after the last byte at which both end.
    """
    sizes = [np.asarray(side, dtype=np.int64) for side in (ours, theirs)]
    ends = [np.cumsum(side) for side in sizes]
    shared = np.intersect1d(ends[0][sizes[0] > 0], ends[1][sizes[1] > 0])
    groups: list[list[int]] = []
    for size, end in zip(sizes, ends, strict=True):
        group = np.searchsorted(shared, end)
        group[(size == 0) | (group == len(shared))] = NO_GROUP
        groups.append(group.tolist())
    return groups[0], groups[1]


@dataclass(frozen=True, slots=True)
class AlignedExample:
    """One text, tokenized by both tokenizers, and the group of each token on both sides; -1: in no group."""

    student: TextExample
    teacher: TextExample
    groups: tuple[tuple[int, ...], tuple[int, ...]]


def make_aligned_example(
    student: Pieces, teacher: Pieces, prompt: str, completion: str, *, length: int | None = None
) -> AlignedExample:
    """Tokenize a prompt and a completion with both tokenizers, and align them; only the completion is learned.

    The two end-of-sequence tokens form a group. The group of a text's first token is dropped: nothing predicts it.

    Args:
        student, teacher: tokenizers.
        prompt, completion: texts.
        length: maximal number of tokens on each side, as in ``data.text.make_prompt_example``; tokens whose
            counterparts are truncated are in no group.

    Raises:
        ValueError: as in ``Pieces.cut`` and ``make_prompt_example``.
    """
    examples, sizes, has_eos = [], [], []
    for side in (student, teacher):
        context, (learned, size) = side.cut(prompt)[0], side.cut(completion)
        bos = [] if side.bos is None else [side.bos]
        examples.append(make_prompt_example([*bos, *context], learned, eos=side.eos, length=length))
        count = sum(examples[-1].learn)
        sizes.append([*size, 0][:count])
        has_eos.append(count > len(size))
    groups = align_groups(*sizes)
    if all(has_eos):
        groups[0][-1] = groups[1][-1] = max(groups[0]) + 1
    first = {group[0] for group, example in zip(groups, examples, strict=True) if example.learn[0]}
    kept = sorted({g for g in groups[0] if g >= 0} - first)
    index = {g: i for i, g in enumerate(kept)}
    renumbered = [
        (NO_GROUP,) * (len(example) - len(side)) + tuple(index.get(g, NO_GROUP) for g in side)
        for side, example in zip(groups, examples, strict=True)
    ]
    return AlignedExample(examples[0], examples[1], (renumbered[0], renumbered[1]))


def collate_spans(
    texts: Sequence[AlignedExample],
    *,
    pad: tuple[int, int] = (0, 0),
    side: str = "right",
    ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Collate a batch for ``tasks.CrossTokenizer``: "student" and "teacher" as in ``data.text.collate``, with "groups".

    Use it as ``DataLoader(texts, collate_fn=partial(collate_spans, pad=(a, b)))``.

    Args:
        texts: to collate.
        pad: padding ids of the student and of the teacher.
        side: padding side, "right" or "left".
        ids: sample ids, for cached teachers.
    """
    out: dict[str, Any] = {} if ids is None else {"ids": torch.tensor(list(ids))}
    for i, name in enumerate(("student", "teacher")):
        examples = [getattr(text, name) for text in texts]
        batch = collate(examples, pad=pad[i], side=side)
        batch["groups"] = _pad_groups([text.groups[i] for text in texts], batch["attention_mask"])
        out[name] = batch
    return out


def shared_tokens(student: Pieces, teacher: Pieces) -> tuple[list[int], list[int]]:
    """Return the ids, on both sides, of the tokens with equal bytes, and of the end-of-sequence tokens.

    Of several tokens with equal bytes the last one is used: SentencePiece lists single bytes before its letters.
    """
    ours, theirs = ({piece: i for i, piece in sorted(side.table.items()) if piece} for side in (student, teacher))
    pairs = [(i, theirs[piece]) for piece, i in sorted(ours.items()) if piece in theirs]
    if student.eos is not None and teacher.eos is not None:
        pairs.append((student.eos, teacher.eos))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _pad_groups(groups: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """Put the groups at the positions of their tokens, (B, L), and -1 on padding."""
    out = torch.full(mask.shape, NO_GROUP)
    for row, group in enumerate(groups):
        out[row, mask[row] != 0] = torch.tensor(group, dtype=torch.long)
    return out


def _byte_letters() -> dict[str, int]:
    """Return letter -> byte of byte-level vocabularies: printable bytes stand for themselves, others for 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(other)}
