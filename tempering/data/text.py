"""Make examples of token ids from prompts, completions, chats and long texts, and collate or pack them into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tempering.rows import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class TextExample:
    """One tokenized text.

    Attributes:
        ids: token ids.
        learn: whether each token is a training target.
        privacy_score: how private each token is, in [0, 1]; None: no token is private.
        teacher_prompt: what the teacher sees in place of the tokens before the learned ones, as
            ``with_privileged_context`` sets it; None: the same.

    Raises:
        ValueError: for fields of different lengths.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    privacy_score: tuple[float, ...] | None = None
    teacher_prompt: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.learn):
            raise ValueError(
                f"TextExample needs a learn flag for every id; got {len(self.ids)} ids and {len(self.learn)} flags."
            )
        if self.privacy_score is not None and len(self.ids) != len(self.privacy_score):
            raise ValueError(
                f"TextExample needs a privacy score for every id; got {len(self.ids)} ids and "
                f"{len(self.privacy_score)}. data.privacy.scores computes them from the same tokens."
            )

    def __len__(self) -> int:
        return len(self.ids)


def eos_ids(eos: int | Iterable[int] | None) -> tuple[int, ...]:
    """Return the end-of-text ids as a tuple: of one id, of several (as in Llama 3's and Qwen's configs), or of None."""
    if eos is None:
        return ()
    return tuple(int(i) for i in eos) if isinstance(eos, Iterable) else (int(eos),)


def append_eos(ids: Sequence[int], eos: int | Iterable[int] | None) -> list[int]:
    """Return the ids with the first end-of-text id appended, unless they end with one of them or there is none."""
    ends = eos_ids(eos)
    return [*ids] if not ends or {*ends}.intersection(ids[-1:]) else [*ids, ends[0]]


def make_prompt_example(
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    eos: int | Iterable[int] | None = None,
    length: int | None = None,
    privacy_score: tuple[Sequence[float], Sequence[float]] | None = None,
) -> TextExample:
    """Return an example of a prompt, which is not learned, and a completion, which is learned.

    Tokenize ``prompt`` and ``completion`` separately, so that no token spans both, as in generation.

    Args:
        prompt, completion: token ids.
        eos: end-of-sequence id, or several: the first is appended to a completion that ends with none of them; None:
            append nothing.
        length: maximal number of tokens. The prompt is truncated on the left, the completion on the right; a truncated
            completion has no eos.
        privacy_score: how private each token is, of the prompt and of the completion; an appended eos scores 0.

    Raises:
        ValueError: if the completion has no tokens, or for privacy scores of another length.
    """
    context, learned = list(prompt), append_eos(completion, eos)
    if length is not None:
        learned = learned[:length]
        context = context[len(context) - max(0, min(len(context), length - len(learned))) :]
    if not learned:
        raise ValueError(f"the completion has no token to learn (length={length}, eos={eos}).")
    flags = (False,) * len(context) + (True,) * len(learned)
    if privacy_score is None:
        return TextExample((*context, *learned), flags)
    if [*map(len, privacy_score)] != [len(prompt), len(completion)]:
        raise ValueError(
            f"make_prompt_example needs a privacy score for each of {len(prompt)} and {len(completion)} ids; got "
            f"{len(privacy_score[0])} and {len(privacy_score[1])}."
        )
    scores = [*privacy_score[0][len(prompt) - len(context) :], *privacy_score[1], 0.0][: len(flags)]
    return TextExample((*context, *learned), flags, tuple(scores))


def with_privileged_context(example: TextExample, teacher_example: TextExample) -> TextExample:
    """Return the student's example with the prompt of the teacher's, such as one with a hint, for
    ``tasks.PrivilegedContext``.

    Make both by ``make_prompt_example`` or ``chat``, with equal completions.

    Raises:
        ValueError: for texts that differ from the first learned token on, or have learned tokens in several places, or
            in none, or a teacher's text without a prompt.
    """
    begins = []
    for side, text in (("student", example), ("teacher", teacher_example)):
        starts = [i for i, flag in enumerate(text.learn) if flag and not (i and text.learn[i - 1])]
        if len(starts) != 1:
            raise ValueError(
                f"with_privileged_context needs learned tokens in one place, such as the last answer of a chat; the "
                f"{side}'s text has {len(starts)}."
            )
        begins.append(starts[0])
    pairs = zip((example, teacher_example), begins, strict=True)
    rest = [(*zip(text.ids[b:], text.learn[b:], strict=True),) for text, b in pairs]
    if rest[0] != rest[1] or not begins[1]:
        n = next((i for i, (a, b) in enumerate(zip(*rest, strict=False)) if a != b), min(map(len, rest)))
        what = "has no prompt" if rest[0] == rest[1] else f"differs from the student's in token {n} of the completion"
        raise ValueError(
            f"with_privileged_context needs a teacher's text with a prompt and the student's completion; it {what}. "
            "Truncated, or another chat template? Tokenize prompt and completion separately."
        )
    return replace(example, teacher_prompt=teacher_example.ids[: begins[1]])


def chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    length: int | None = None,
    tools: Sequence[Any] | None = None,
    **template: Any,
) -> TextExample:
    """Return an example of a chat, of which the assistant's turns and their end-of-turn tokens are learned.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: {"role": ..., "content": ...}, with tool calls where there are; at least one of the assistant.
        length: maximal number of tokens; the chat is truncated on the right.
        tools: functions or JSON schemas, as in ``apply_chat_template``.
        template: further arguments of the chat template, such as ``enable_thinking=False`` or ``chat_template=...``.

    Raises:
        ValueError: for a chat without assistant turns, a template that rewrites earlier turns in a longer chat, or one
            whose generation prompt has tokens that its finished turns do not have.
    """
    options = template | ({} if tools is None else {"tools": list(tools)})

    def tokenize(n: int, *, generation_prompt: bool = False) -> list[int]:
        output = tokenizer.apply_chat_template(
            list(messages[:n]), add_generation_prompt=generation_prompt, tokenize=True, **options
        )
        return list(output["input_ids"] if isinstance(output, Mapping) else output)

    ids = tokenize(len(messages))
    learn = [False] * len(ids)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns:
        before, after = tokenize(i, generation_prompt=True) if i else [], tokenize(i + 1)
        if ids[: len(after)] == after and after[: len(before)] != before:
            _check_generation_prompt(tokenizer, i, tokenize(i), before, after)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                f"the chat template changes the tokens before turn {i} when later turns are added, so the assistant's "
                "tokens cannot be located. Use one chat per assistant turn, or a template that only appends."
            )
        learn[len(before) : len(after)] = [True] * (len(after) - len(before))
    if not turns or not any(learn[:length]):
        raise ValueError(f"the chat has no assistant token to learn: roles {[m['role'] for m in messages]}.")
    return TextExample(tuple(ids[:length]), tuple(learn[:length]))


def _check_generation_prompt(tokenizer: Any, turn: int, start: list[int], before: list[int], after: list[int]) -> None:
    """Raise if only the generation prompt of this turn differs from its finished form, not the chat before it.

    Args:
        start, before, after: the chat before the turn, the same with the generation prompt, and with the turn.
    """
    if before[: len(start)] != start or after[: len(start)] != start:
        return
    shared = next(i for i, (a, b) in enumerate(zip([*before, None], [*after, None], strict=False)) if a != b)
    extra = tokenizer.decode(before[shared:]) if hasattr(tokenizer, "decode") else before[shared:]
    raise ValueError(
        f"the chat template's generation prompt for turn {turn} ends with {extra!r}, which the finished turn does not "
        "have: a model would be trained on other texts than it continues. Give the template arguments with which both "
        "agree, such as chat(..., enable_thinking=True), or put these tokens at the start of the turn's content."
    )


def windows(
    ids: Sequence[int], length: int, *, stride: int | None = None, privacy_score: Sequence[float] | None = None
) -> list[TextExample]:
    """Split a long text into examples of ``length`` tokens, all learned; a shorter remainder is dropped.

    Args:
        ids: token ids.
        length: tokens per example.
        stride: distance between the starts of examples; None: length - 1, so that neighbors share one token and each
            token but the first is predicted once.
        privacy_score: how private each token is, in [0, 1].

    Raises:
        ValueError: for a length below 2, a stride below 1, or another number of scores than of ids.
    """
    step = length - 1 if stride is None else stride
    if length < 2 or step < 1:
        raise ValueError(f"windows needs length >= 2 and stride >= 1; got {length} and {step}.")
    starts = range(0, len(ids) - length + 1, step)
    if privacy_score is not None and len(privacy_score) != len(ids):
        raise ValueError(f"windows needs a privacy score for every id; got {len(ids)} ids and {len(privacy_score)}.")
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
    """Collate examples into a padded batch: input_ids, attention_mask and labels (-100: not learned), each (B, L).

    If an example has a privacy score, the batch also has "privacy_score" (B, L), 0 for all other tokens; if all have a
    teacher's prompt, "teacher_prompt" and "teacher_prompt_mask" (B, P), padded on the right. Use it as
    ``DataLoader(examples, collate_fn=partial(collate, pad=tokenizer.pad_token_id))``.

    Args:
        examples: to collate.
        pad: padding id. It may be the end-of-sequence id: padding is identified by the mask, not by its id.
        side: padding side, "right" or "left".
        length: of the batch; None: the length of the longest example.
        multiple: round the length up to a multiple of this.
        ids: sample ids, for cached teachers.

    Raises:
        ValueError: for no examples, another side, or an example longer than ``length``.
    """
    if side not in ("left", "right") or not examples:
        raise ValueError(f"collate needs examples, and side 'left' or 'right'; got {len(examples)} and {side!r}.")
    longest = max(map(len, examples))
    if length is not None and longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into length={length}. Truncate it first.")
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
    if all(example.teacher_prompt is not None for example in examples):
        prompts = [torch.tensor(example.teacher_prompt) for example in examples]
        batch["teacher_prompt"] = pad_sequence(prompts, batch_first=True, padding_value=pad)
        ones = [torch.ones_like(prompt) for prompt in prompts]
        batch["teacher_prompt_mask"] = pad_sequence(ones, batch_first=True)
    return batch if ids is None else batch | {"ids": torch.tensor(list(ids))}


def sources_right(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoder's inputs with padding on the left moved to the right, where learned positions need it.

    Args:
        inputs: tensors (B, S), among them attention_mask; those of the decoder, "decoder_...", stay as they are.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(inputs)
    first = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    index = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    return {
        name: x.gather(1, index)
        if isinstance(x, Tensor) and x.shape == mask.shape and not name.startswith("decoder_")
        else x
        for name, x in inputs.items()
    }


def pack(examples: Iterable[TextExample], length: int, *, pad: int = 0) -> list[dict[str, Tensor]]:
    """Pack examples into rows of ``length`` tokens by first fit; return batches of one row, to join with ``torch.cat``.

    A row has input_ids, labels and position_ids (1, length). Positions restart at 0 with every example and there is no
    attention_mask, so that models of transformers do not attend across examples, and the loss equals that of padded
    examples. If an example has a privacy score, its row also has "privacy_score".

    Raises:
        ValueError: for an example longer than ``length``.
    """
    bins: list[list[TextExample]] = []
    for example in examples:
        if len(example) > length:
            raise ValueError(f"a text of {len(example)} tokens does not fit into length={length}. Truncate it first.")
        free = next((part for part in bins if sum(map(len, part)) + len(example) <= length), None)
        bins.append([example]) if free is None else free.append(example)
    return [_pack_row(part, length, pad) for part in bins]


def _pack_row(examples: list[TextExample], length: int, pad: int) -> dict[str, Tensor]:
    free = length - sum(map(len, examples))
    padding = [TextExample((pad,) * free, (False,) * free)] if free else []
    parts = [*examples, *padding]
    scores = [p for part in parts for p in part.privacy_score or (0.0,) * len(part)]
    has_scores = any(part.privacy_score is not None for part in parts)
    return {
        "input_ids": torch.tensor([[i for part in parts for i in part.ids]]),
        "labels": torch.cat([_labels(part) for part in parts])[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        **({"privacy_score": torch.tensor([scores])} if has_scores else {}),
    }


def _labels(example: TextExample) -> Tensor:
    return torch.tensor(example.ids, dtype=torch.long).masked_fill(
        ~torch.tensor(example.learn, dtype=torch.bool), IGNORE_INDEX
    )
