"""Texts as token ids: prompts with completions, chats, padded batches and packed ones. Ids are never decoded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempering.rows import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text: its token ids, which of them are to be learned, and how private each is (0 to 1; None: none is).

    Raises:
        ValueError: for lists of two lengths.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    privacy_score: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.learn):
            raise ValueError(
                f"TextExample needs a flag for every id; got {len(self.ids)} ids and {len(self.learn)} flags."
            )
        if self.privacy_score is not None and len(self.ids) != len(self.privacy_score):
            raise ValueError(
                f"TextExample needs a privacy for every id; got {len(self.ids)} ids and {len(self.privacy_score)}. "
                "data.private.scores makes them of the same tokens."
            )

    def __len__(self) -> int:
        return len(self.ids)


def make_prompt_example(
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    eos: int | None = None,
    length: int | None = None,
    privacy_score: tuple[Sequence[float], Sequence[float]] | None = None,
) -> TextExample:
    """A prompt that is read and a completion that is learned, with one end-of-sequence.

    ``prompt`` and ``completion`` are token ids, each tokenized by itself: where they meet no token is merged, as in
    generation.

    Args:
        eos: appended where the completion does not end with it yet; None for none.
        length: at most so many tokens. The prompt is cut at its front, the completion at its end, which then has no
            eos: it did not end there.
        private: how private each token is, of the prompt and of the completion; an appended eos is not.

    Raises:
        ValueError: where nothing of the completion is left.
    """
    read, learned = list(prompt), list(completion)
    if eos is not None and learned[-1:] != [eos]:
        learned.append(eos)
    if length is not None:
        learned = learned[:length]
        read = read[len(read) - max(0, min(len(read), length - len(learned))) :]
    if not learned:
        raise ValueError(f"the completion has no token to learn (length={length}, eos={eos}).")
    flags = (False,) * len(read) + (True,) * len(learned)
    if privacy_score is None:
        return TextExample((*read, *learned), flags)
    if [*map(len, privacy_score)] != [len(prompt), len(completion)]:
        raise ValueError(
            f"make_prompt_example needs a privacy for each of {len(prompt)} and {len(completion)} ids; got "
            f"{len(privacy_score[0])} and {len(privacy_score[1])}."
        )
    scores = [*privacy_score[0][len(prompt) - len(read) :], *privacy_score[1], 0.0][: len(flags)]
    return TextExample((*read, *learned), flags, tuple(scores))


def chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, length: int | None = None) -> TextExample:
    """A chat of which the assistant's turns are learned, each with what the template ends a turn with.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: {"role": ..., "content": ...}; at least one of the assistant.
        length: at most so many tokens, from the front.

    Raises:
        ValueError: for a chat without the assistant, or a template that rewrites earlier turns as a chat goes on.
    """

    def tokens(n: int, *, asked: bool = False) -> list[int]:
        found = tokenizer.apply_chat_template(list(messages[:n]), add_generation_prompt=asked, tokenize=True)
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    whole = tokens(len(messages))
    learn = [False] * len(whole)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns:
        before, after = tokens(i, asked=True) if i else [], tokens(i + 1)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise ValueError(
                f"the chat template does not keep what it wrote before turn {i} as the chat goes on, so its tokens "
                "cannot be told apart. Give each answer as a chat of its own, or a template that only appends."
            )
        learn[len(before) : len(after)] = [True] * (len(after) - len(before))
    if not turns or not any(learn[:length]):
        raise ValueError(f"the chat has no assistant's token to learn: roles {[m['role'] for m in messages]}.")
    return TextExample(tuple(whole[:length]), tuple(learn[:length]))


def windows(
    ids: Sequence[int], length: int, *, stride: int | None = None, privacy_score: Sequence[float] | None = None
) -> list[TextExample]:
    """A long text in pieces of ``length`` tokens, every token of which is learned; a shorter rest is left out.

    Neighbors share one token where ``stride`` is None (length - 1), so each token but the first is predicted once.
    ``privacy_score`` says how private each of the ids is.
    """
    step = length - 1 if stride is None else stride
    if length < 2 or step < 1:
        raise ValueError(f"windows needs length >= 2 and stride >= 1; got {length} and {step}.")
    starts = range(0, len(ids) - length + 1, step)
    if privacy_score is not None and len(privacy_score) != len(ids):
        raise ValueError(f"windows needs a privacy for every id; got {len(ids)} ids and {len(privacy_score)}.")
    scores = [None if privacy_score is None else tuple(privacy_score[i : i + length]) for i in starts]
    return [TextExample(tuple(ids[i : i + length]), (True,) * length, p) for i, p in zip(starts, scores, strict=True)]


def collate(
    examples: Sequence[TextExample],
    *,
    pad: int = 0,
    side: str = "right",
    length: int | None = None,
    multiple: int = 1,
    ids: Iterable[int] | None = None,
) -> dict[str, Tensor]:
    """A batch of padded texts: input_ids, attention_mask and labels (-100 where nothing is learned), each (B, L).

    And "privacy_score" (B, L), where some text says how private its tokens are; other tokens are not.

    ``DataLoader(examples, collate_fn=partial(collate, pad=tokenizer.pad_token_id))`` takes it as it is. ``pad`` may be
    the end-of-sequence: padding is told by the mask, not by its id.

    Args:
        side: "right" or "left", where the padding goes.
        length: of the batch; None is that of the longest text.
        multiple: the length is rounded up to one of it.
        ids: sample ids, for teachers that look their answers up.
    """
    if side not in ("left", "right") or not examples:
        raise ValueError(f"collate needs examples, and side 'left' or 'right'; got {len(examples)} and {side!r}.")
    longest = max(map(len, examples))
    if length is not None and longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into length={length}. Cut it before.")
    length = -(-(length or longest) // multiple) * multiple
    batch = {
        "input_ids": torch.full((len(examples), length), pad),
        "attention_mask": torch.zeros(len(examples), length, dtype=torch.long),
        "labels": torch.full((len(examples), length), IGNORE_INDEX),
    }
    if any(example.privacy_score is not None for example in examples):
        batch["privacy_score"] = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        part = slice(0, len(example)) if side == "right" else slice(length - len(example), length)
        batch["input_ids"][row, part] = torch.tensor(example.ids, dtype=torch.long)
        batch["attention_mask"][row, part] = 1
        batch["labels"][row, part] = _labels(example)
        if example.privacy_score is not None:
            batch["privacy_score"][row, part] = torch.tensor(example.privacy_score)
    return batch if ids is None else batch | {"ids": torch.tensor(list(ids))}


def pack(examples: Iterable[TextExample], length: int, *, pad: int = 0) -> list[dict[str, Tensor]]:
    """The texts in as few rows of ``length`` as first-fit finds: batches of one row, of which ``torch.cat`` makes more.

    Each has input_ids, labels and position_ids (1, length), which start again at 0 with every text, and no
    attention_mask: so models of transformers keep the texts apart, and the loss is that of the padded texts. And
    "privacy_score", where one of its texts says how private its tokens are.

    Raises:
        ValueError: for a text longer than ``length``.
    """
    bins: list[list[TextExample]] = []
    for example in examples:
        if len(example) > length:
            raise ValueError(f"a text of {len(example)} tokens does not fit into length={length}. Cut it before.")
        room = next((found for found in bins if sum(map(len, found)) + len(example) <= length), None)
        bins.append([example]) if room is None else room.append(example)
    return [_packed(found, length, pad) for found in bins]


def _packed(examples: list[TextExample], length: int, pad: int) -> dict[str, Tensor]:
    rest = length - sum(map(len, examples))
    filler = [TextExample((pad,) * rest, (False,) * rest)] if rest else []
    parts = [*examples, *filler]
    scores = [p for part in parts for p in part.privacy_score or (0.0,) * len(part)]
    marked = any(part.privacy_score is not None for part in parts)
    return {
        "input_ids": torch.tensor([[i for part in parts for i in part.ids]]),
        "labels": torch.cat([_labels(part) for part in parts])[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        **({"privacy_score": torch.tensor([scores])} if marked else {}),
    }


def _labels(example: TextExample) -> Tensor:
    return torch.tensor(example.ids, dtype=torch.long).masked_fill(
        ~torch.tensor(example.learn, dtype=torch.bool), IGNORE_INDEX
    )
