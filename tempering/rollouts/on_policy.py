"""On-policy distillation: batches of which the student writes a share itself."""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, Self

from torch import nn

from tempering.rollouts.sampling import GenerationStats, Sampling, asked_for, generate


class OnPolicy:
    """The batches of a loader, a ``share`` of them with completions that the student writes at that moment.

    The coin is tossed for each batch. ``share`` 0 is supervised distillation, 1 is on-policy, between them lie ImitKD
    and GKD; any method makes the loss, and its hard term finds no labels on what a student wrote. The ids that were
    drawn are those that are learned, never decoded and tokenized again. What is written depends on the student's
    weights, the run's epoch and the batch's number, so a resumed run goes on to the same texts. Packed batches are not
    taken. Teachers that look their answers up have none for these texts.

    An encoder-decoder answers to a batch's sources, for ``Seq2Seq``; how it goes on from its cache
    ``rollouts.decoding.decoder_strategy`` says.

    Args:
        student: the model that is trained, of transformers.
        batches: any loader of a Generation task's batches; what comes before the first learned token is the prompt.
        share: of batches, in [0, 1]: GKD's lambda.
        length: how many tokens are written at most.
        eos: the token that ends a text; None for none.
        pad: of the batches.
        sampling: of the student; None draws from its own distribution.
        prompt: how many tokens of a text are its prompt at least, of a causal model.
        vocabulary: how many tokens there are, as in ``LanguageModeling``.
        seed: of the coin and the draws.

    Raises:
        ValueError: for a share outside [0, 1], or length or prompt below 1.

    Reference: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv:2306.13649, algorithm 1.
    """

    def __init__(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        share: float = 0.5,
        length: int = 128,
        eos: int | None = None,
        pad: int = 0,
        sampling: Sampling | None = None,
        prompt: int = 1,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= share <= 1.0 or length < 1 or prompt < 1 or isinstance(batches, Iterator):
            raise ValueError(
                f"{type(self).__name__} needs share in [0, 1], length and prompt >= 1, and batches that can be walked "
                f"again; got {share}, {length}, {prompt} and {type(batches).__name__}."
            )
        self.student, self.batches, self.share = student, batches, share
        self.length, self.eos, self.pad = length, eos, pad
        self.sampling, self.prompt, self.vocabulary, self.seed = sampling, prompt, vocabulary, seed
        self.number, self.stats, self.rank = 0, GenerationStats(), 0

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def set_epoch(self, number: int) -> None:
        """Say which epoch it is; its counts begin anew."""
        self.number, self.stats = number, GenerationStats()
        for part in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(0)

    def iterate(self, start: int) -> Iterator[Any]:
        """The epoch's batches from batch ``start`` on; nothing is written for those before."""
        own: Any = getattr(self.batches, "iterate", None)
        rest = own(start) if own is not None else itertools.islice(iter(self.batches), start, None)
        for index, batch in enumerate(rest, start):
            seed = self._seed(index)
            yield self.generate(batch, seed) if random.Random(seed).random() < self.share else batch

    def generate(self, batch: Any, seed: int) -> dict[str, Any]:
        """The batch with the student's own completions."""
        return self._generate(batch, seed, None, {})

    def report(self) -> dict[str, float]:
        """What was written since the epoch began: see ``GenerationStats.report``."""
        return self.stats.report()

    def shard(self, rank: int, world: int) -> Self:
        """This rank's share of every batch, written with draws of its own; the coin falls the same for all ranks.

        Raises:
            ValueError: for batches that cannot be shared out.
        """
        if not hasattr(self.batches, "shard"):
            raise ValueError(
                f"{type(self.batches).__name__} cannot be shared out over {world} processes. Use data.Tokens or "
                "data.Pairs, or give it shard(rank, world)."
            )
        out = copy.copy(self)
        out.batches, out.rank, out.stats = self.batches.shard(rank, world), rank, GenerationStats()  # pyright: ignore
        return out

    def _generate(
        self, batch: Any, seed: int, teacher: nn.Module | None, verification: dict[str, Any]
    ) -> dict[str, Any]:
        if "position_ids" in batch:
            raise ValueError(
                f"{type(self).__name__} takes padded texts, and this batch is packed. See data.text.collate."
            )
        prompts, source = asked_for(self.student, batch, self.prompt)
        out, pace = generate(
            self.student,
            teacher,
            prompts,
            length=self.length,
            eos=self.eos,
            pad=self.pad,
            sampling=self.sampling,
            vocabulary=self.vocabulary,
            seed=seed + self.rank,
            source=source,
            **verification,
        )
        self.stats.add(pace)
        return out

    def _seed(self, index: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{self.number}/{index}".encode()).digest()
        return int.from_bytes(digest[:6], "little")
