"""Collate columns of texts, such as a query and its candidates, to batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Sees = Literal["texts", "first", "pairs"]


class TextColumns:
    """Collate function of a DataLoader, for ``tasks.Embeddings``, ``tasks.Similarity`` and ``tasks.Ranking``.

    A sample is a tuple of texts, or (texts, label): of Similarity two texts and their similarity; of Ranking a query
    and its candidates, with the position of the relevant one from 0, -1 if unknown; of Embeddings one text or
    more, such as a source and its translation. A third part of a sample is the teacher's stored output, such as a
    cross-encoder's score of each candidate, for torch.nn.Identity() as the teacher. In a batch all first texts
    come first; then, text by text, the others. Lists of unequal length are padded by empty texts, with a "mask".

    Args:
        tokenizer: of the student, of transformers or called as these.
        teacher_tokenizer: of the teacher, if it has another one, or sees other texts.
        teacher_sees: "texts": those that the student sees; "first": the first of each sample, as of translated pairs;
            "pairs": the first with each other, as a cross-encoder.
        candidates: "batch" counts labels from the first document of the batch, for ``Ranking(candidates="batch")``.
        length: maximal number of tokens; None: as the tokenizer has it.

    Raises:
        ValueError: for another option.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        teacher_tokenizer: Any = None,
        teacher_sees: Sees = "texts",
        candidates: Literal["given", "batch"] = "given",
        length: int | None = None,
    ) -> None:
        if teacher_sees not in get_args(Sees) or candidates not in ("given", "batch"):
            raise ValueError(
                "TextColumns needs teacher_sees 'texts', 'first' or 'pairs', and candidates 'given' or 'batch'; got "
                f"{teacher_sees!r} and {candidates!r}."
            )
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer
        self.teacher_sees, self.candidates, self.length = teacher_sees, candidates, length

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return the batch: "student", "teacher" if it differs, "labels" or None, and "mask" of unequal lists.

        Raises:
            ValueError: for samples that are none of texts, or without a common form.
        """
        parts: list[Sequence[Any]] = [s if isinstance(s[0], (tuple, list)) else (s,) for s in samples]
        sizes = sorted({len(part) for part in parts})
        if len(sizes) > 1 or not all(isinstance(text, str) for part in parts for text in part[0]):
            raise ValueError(
                "TextColumns needs samples that are tuples of texts, (texts, label) or (texts, label, scores), all of "
                f"one form; got {samples[0]!r}, of {' and '.join(map(str, sizes))} parts."
            )
        lists = [list(part[0]) for part in parts]
        lengths = [len(texts) for texts in lists]
        longest = max(lengths)
        full = [texts + [""] * (longest - len(texts)) for texts in lists]
        in_batch = self.candidates == "batch"
        firsts = [texts[0] for texts in full]
        others = [text for texts in (lists if in_batch else full) for text in texts[1:]]
        batch: dict[str, Any] = {"student": self._tokens(self.tokenizer, firsts + others)}
        if sizes[0] > 2:
            scores = [list(part[2]) for part in parts]
            batch["teacher"] = torch.tensor([s + [0.0] * (longest - 1 - len(s)) for s in scores])
        elif self.teacher_sees == "first":
            batch["teacher"] = self._tokens(self.teacher_tokenizer or self.tokenizer, firsts)
        elif self.teacher_sees == "pairs":
            repeated = [text for text in firsts for _ in range(longest - 1)]
            batch["teacher"] = self._tokens(
                self.teacher_tokenizer or self.tokenizer, repeated, [text for texts in full for text in texts[1:]]
            )
        elif self.teacher_tokenizer is not None:
            batch["teacher"] = self._tokens(self.teacher_tokenizer, firsts + others)
        batch["labels"] = None if sizes[0] < 2 else torch.tensor([part[1] for part in parts])
        if in_batch and batch["labels"] is not None:
            before = torch.tensor([0, *lengths[:-1]]).cumsum(0) - torch.arange(len(lengths))
            batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] + before, -1)
        elif len(set(lengths)) > 1:
            batch["mask"] = torch.arange(longest - 1) < torch.tensor(lengths).unsqueeze(1) - 1
        return batch

    def _tokens(self, tokenizer: Any, *texts: list[str]) -> dict[str, Tensor]:
        cut = {} if self.length is None else {"max_length": self.length}
        return dict(tokenizer(*texts, padding=True, truncation=True, return_tensors="pt", **cut))
