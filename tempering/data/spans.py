"""One text cut by two tokenizers: which of its tokens cover the same bytes on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tempering.data.text import TextExample, collate, make_prompt_example

NOWHERE = -1  # the group of a token that has no partner


class Pieces:
    """A tokenizer that knows the bytes of its tokens.

    Args:
        encode: text -> token ids, without a beginning or an end of text.
        table: id -> the bytes of that token; b"" for one that stands for no text, as special ones do.
        eos, bos: the end that is learned after a completion, and the beginning before a prompt; None for none.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        table: Mapping[int, bytes],
        *,
        eos: int | None = None,
        bos: int | None = None,
    ) -> None:
        self.encode, self.table, self.eos, self.bos = encode, table, eos, bos

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """That of a tokenizer of transformers: byte-level (GPT-2, Llama 3, Qwen) or SentencePiece (Llama 2, Gemma).

        Raises:
            ValueError: for a vocabulary of another kind, of which the bytes cannot be told.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        special, letters = set(tokenizer.all_special_ids), _letters()
        level = all(letter in vocabulary for letter in letters)
        if not level and not any(token.startswith("\u2581") for token in vocabulary):
            raise ValueError(
                f"{type(tokenizer).__name__} has neither bytes nor SentencePiece's pieces, so the bytes of its tokens "
                "are not known. Give them: data.spans.Pieces(encode, {id: bytes})."
            )

        def of(token: str, number: int) -> bytes:
            if number in special:
                return b""
            if not level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            if number in added:
                return added[number].encode()
            if level:
                return bytes(letters[letter] for letter in token)
            return token.replace("\u2581", " ").encode()

        table = {int(number): of(token, int(number)) for token, number in vocabulary.items()}
        begins = list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id]
        bos = tokenizer.bos_token_id if begins else None
        return cls(
            lambda text: tokenizer.encode(text, add_special_tokens=False), table, eos=tokenizer.eos_token_id, bos=bos
        )

    def cut(self, text: str) -> tuple[list[int], list[int]]:
        """The token ids of a text, and how many of its bytes each covers.

        The space that SentencePiece puts before a text counts for nothing.

        Raises:
            ValueError: where the tokens' bytes are not the text's, with the first place that differs.
        """
        ids, want = list(self.encode(text)), text.encode()
        parts = [self.table.get(i, b"") for i in ids]
        sizes, found = [len(part) for part in parts], b"".join(parts)
        if found == b" " + want:
            first = next(i for i, size in enumerate(sizes) if size)
            sizes[first], found = sizes[first] - 1, want
        if found != want:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, want, strict=False)) if a != b), min(len(found), len(want))
            )
            raise ValueError(
                f"the tokens do not spell the text: from byte {at} on it has {want[at : at + 12]!r}, and they have "
                f"{found[at : at + 12]!r}. A tokenizer that normalizes (lower case, NFKC) or has an unknown token "
                "cannot be aligned; clean the text first."
            )
        return ids, sizes


def align_groups(ours: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    """The group of every token on both sides, from 0 on: a group closes wherever both end at the same byte.

    Args:
        ours, theirs: the bytes that each token covers, over one text from its first byte on; either may be cut short.

    Returns:
        -1 for a token that covers nothing (a beginning of text on one side alone moves nothing), and for what is left
        over behind the last byte at which both end.
    """
    sizes = [np.asarray(side, dtype=np.int64) for side in (ours, theirs)]
    ends = [np.cumsum(side) for side in sizes]
    shared = np.intersect1d(ends[0][sizes[0] > 0], ends[1][sizes[1] > 0])
    out: list[list[int]] = []
    for size, end in zip(sizes, ends, strict=True):
        group = np.searchsorted(shared, end)
        group[(size == 0) | (group == len(shared))] = NOWHERE
        out.append(group.tolist())
    return out[0], out[1]


@dataclass(frozen=True, slots=True)
class AlignedExample:
    """One text as both sides read it, and the group of each token; -1 for a token in none."""

    student: TextExample
    teacher: TextExample
    groups: tuple[tuple[int, ...], tuple[int, ...]]


def make_aligned_example(
    student: Pieces, teacher: Pieces, prompt: str, completion: str, *, length: int | None = None
) -> AlignedExample:
    """A prompt that is read and a completion that is learned, cut by both tokenizers.

    The two ends of text are a group of their own. A group with a text's very first token is none: nothing predicts it.

    Args:
        length: at most so many tokens on each side, as in ``data.text.make_prompt_example``; what one side lost is left
            over.

    Raises:
        ValueError: as ``Pieces.cut`` and ``make_prompt_example`` do.
    """
    examples, sizes, whole = [], [], []
    for side in (student, teacher):
        read, (learned, size) = side.cut(prompt)[0], side.cut(completion)
        begin = [] if side.bos is None else [side.bos]
        examples.append(make_prompt_example([*begin, *read], learned, eos=side.eos, length=length))
        count = sum(examples[-1].learn)
        sizes.append([*size, 0][:count])
        whole.append(count > len(size))
    groups = align_groups(*sizes)
    if all(whole):  # both end, and say so
        groups[0][-1] = groups[1][-1] = max(groups[0]) + 1
    first = {group[0] for group, example in zip(groups, examples, strict=True) if example.learn[0]}
    kept = sorted({g for g in groups[0] if g >= 0} - first)
    name = {g: i for i, g in enumerate(kept)}
    named = [
        (NOWHERE,) * (len(example) - len(side)) + tuple(name.get(g, NOWHERE) for g in side)
        for side, example in zip(groups, examples, strict=True)
    ]
    return AlignedExample(examples[0], examples[1], (named[0], named[1]))


def collate_spans(
    texts: Sequence[AlignedExample],
    *,
    pad: tuple[int, int] = (0, 0),
    side: str = "right",
    ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A batch for ``tasks.CrossTokenizer``: "student" and "teacher", as ``data.text.collate`` makes them, and "groups".

    ``DataLoader(texts, collate_fn=partial(collate_spans, pad=(a, b)))`` takes it as it is.

    Args:
        pad: the padding's id for the student and for the teacher.
    """
    out: dict[str, Any] = {} if ids is None else {"ids": torch.tensor(list(ids))}
    for who, name in enumerate(("student", "teacher")):
        examples = [getattr(text, name) for text in texts]
        batch = collate(examples, pad=pad[who], side=side)
        batch["groups"] = _placed([text.groups[who] for text in texts], batch["attention_mask"])
        out[name] = batch
    return out


def shared_tokens(student: Pieces, teacher: Pieces) -> tuple[list[int], list[int]]:
    """The ids, on both sides, of the tokens that are the same bytes, and of the two ends of text.

    Of several tokens with the same bytes the last one counts: SentencePiece has its single bytes before its letters.
    """
    ours, theirs = ({piece: i for i, piece in sorted(side.table.items()) if piece} for side in (student, teacher))
    pairs = [(i, theirs[piece]) for piece, i in sorted(ours.items()) if piece in theirs]
    if student.eos is not None and teacher.eos is not None:
        pairs.append((student.eos, teacher.eos))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _placed(groups: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """The groups where their tokens stand, -1 on padding."""
    out = torch.full(mask.shape, NOWHERE)
    for row, found in enumerate(groups):
        out[row, mask[row] != 0] = torch.tensor(found, dtype=torch.long)
    return out


def _letters() -> dict[str, int]:
    """The letter that byte-level vocabularies write each byte as: itself where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}
