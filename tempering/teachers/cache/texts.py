"""Find the texts of a batch by their tokens, whatever their padding, order and number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tempering.rows import IGNORE_INDEX, TEACHER_OUTPUTS
from tempering.utils.tensors import on_host

Inputs = Callable[[Any], tuple[Any, Any, Any]]  # a batch -> (student's inputs, teacher's inputs, ids), as tasks do
NO_CONTENT = {
    "attention_mask",
    "position_ids",
    "use_cache",
    TEACHER_OUTPUTS,
}  # inputs that do not belong to the text itself
BATCH_FIELDS = {"labels", "generated", "learn", "ids", "replaced", "privacy_score"}  # of batches; rarely model inputs


class Text(NamedTuple):
    """A text of a batch: its key, its row, and the columns of its tokens in order, those of the target if it has one.

    The key is a hash of the tokens and of whatever else the teacher reads, without padding.
    """

    key: int
    row: int
    columns: Int[Tensor, " tokens"]


def output_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return (B, L) of a model's outputs: the shape of its labels if it is an encoder-decoder, else of its input."""
    B, L = inputs["labels" if "labels" in inputs else "input_ids"].shape
    return B, L


def texts_of(inputs: Mapping[str, Any]) -> list[Text]:
    """Return the texts of a teacher's inputs; a packed row has several.

    Args:
        inputs: of ``LanguageModeling`` or ``Seq2Seq``, as the teacher receives them.
    """
    padded = isinstance(inputs.get("attention_mask"), Tensor)
    needed = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and not (padded and n == "position_ids")}
    given = {n: on_host(x).detach().cpu() for n, x in needed.items()}
    tokens, labels = given["input_ids"], given.get("labels")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    is_packed = mask is None and positions is not None and labels is None
    is_token = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.expand_as(tokens) != 0
    content = {n: given[n] for n in sorted(given) if n not in NO_CONTENT and given[n].ndim}
    texts = []
    for row in range(len(tokens)):
        real = is_token[row].nonzero().flatten()
        starts = (positions[row] == 0).nonzero().flatten().tolist()[1:] if is_packed else []  # pyright: ignore
        for columns in real.tensor_split(starts):
            parts = {n: x[row, columns] if x.shape[:2] == tokens.shape else x[row] for n, x in content.items()}
            if labels is not None:
                columns = (labels[row] != IGNORE_INDEX).nonzero().flatten()
                parts["labels"] = labels[row, columns]
            texts.append(Text(_hash(parts), row, columns))
    return texts


def learned_positions(inputs: Inputs, batch: Any, teacher_inputs: Mapping[str, Any]) -> Bool[Tensor, "B L"]:
    """Return the positions whose outputs are read: those of the task's ``learned`` if ``inputs`` is its method."""
    learned = getattr(getattr(inputs, "__self__", None), "learned", None)
    if learned is None:
        return torch.ones(output_shape(teacher_inputs), dtype=torch.bool)
    return learned(batch).cpu()


def _hash(parts: Mapping[str, Tensor]) -> int:
    """Return a signed 64-bit hash: of a million texts, two have the same one with a probability of 3e-8."""
    digest = hashlib.blake2b(digest_size=8)
    for name, x in parts.items():
        x = x if x.is_floating_point() else x.long()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little", signed=True)
