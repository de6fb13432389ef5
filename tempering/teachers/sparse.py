"""Teachers of which few tokens a position are kept: the likeliest with a bucket for the rest, or unbiased samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.buckets import Sparse
from tempering.rows import widened
from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.recording import Recordable, device_of
from tempering.teachers.shards import Shards, Tensors, given, joined, key_of, record_shards, room, split

if TYPE_CHECKING:
    from tempering.teachers.drawn import CachedDrawn

KIND = "likeliest tokens"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
NEVER = -1e4  # the log-probability of a token that is kept for its label's sake: exp() of it is exactly 0


def top(
    logits: Float[Tensor, "*N V"], k: int, *, besides: Int[Tensor, "*N"] | None = None, temperature: float = 1.0
) -> Sparse:
    """The k likeliest tokens, and all others in one bucket; ``besides`` is kept as well, so K is then k + 1.

    The bucket is summed over the others themselves, so it is never negative and not lost to rounding. The divergence
    to it is "with ghost token": without the bucket the kept tokens would be scaled up, and their teacher is worse than
    none up to k = 25.

    Raises:
        ValueError: for k outside [1, V).

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870, for the bucket.
    """
    width = k + (besides is not None)
    if k < 1 or width > logits.shape[-1]:
        raise ValueError(f"top needs 1 <= k <= {logits.shape[-1] - (besides is not None)}; got k={k}.")
    # not log_softmax, which sums up 19,000 numbers a lane of AVX2 in turn: 2e-5 off where V is 152,000
    z = widened(logits) / temperature
    z = z - z.amax(-1, keepdim=True)
    logp = z - z.logsumexp(-1, keepdim=True)
    ids = logp.topk(width, -1).indices
    if besides is not None:
        absent = (ids[..., :k] != besides[..., None]).all(-1)
        ids[..., -1] = torch.where(absent, besides, ids[..., -1])
    others = logp.scatter(-1, ids, -torch.inf)
    none = torch.isneginf(others.amax(-1))
    rest = torch.logsumexp(others.masked_fill(none[..., None], 0.0), -1).masked_fill(none, -torch.inf)
    return Sparse(ids, logp.gather(-1, ids), rest)


def drawn(
    logits: Float[Tensor, "*N V"],
    samples: int,
    *,
    besides: Int[Tensor, "*N"] | None = None,
    generator: torch.Generator | None = None,
) -> Sparse:
    """``samples`` tokens drawn with replacement, each as likely as it was drawn often: in the mean the teacher itself.

    The gradient of ``kl`` to it is that of ``kl`` to the teacher in expectation, since that is linear in the teacher's
    probabilities; its value is not, nor is anything at another temperature than 1, and reverse divergences are
    infinite. There is no rest. ``besides`` is kept as well, with probability 0 where it was not drawn.

    Raises:
        ValueError: for samples < 1.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870.
    """
    if samples < 1:
        raise ValueError(f"drawn needs samples >= 1; got {samples}.")
    p = torch.softmax(widened(logits), -1)
    ids = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
    return counted(ids.view(*logits.shape[:-1], samples), besides=besides, dtype=p.dtype)


def counted(
    ids: Int[Tensor, "*N S"], *, besides: Int[Tensor, "*N"] | None = None, dtype: torch.dtype = torch.float32
) -> Sparse:
    """Drawn tokens with their shares, the commonest first; K = S, or S + 1 with ``besides``."""
    samples = ids.shape[-1]
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    group = first.long().cumsum(-1) - 1
    counts = torch.zeros_like(ids, dtype=dtype).scatter_add_(-1, group, torch.ones_like(ids, dtype=dtype))
    unique = torch.zeros_like(ids).scatter_(-1, group, ids)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    unique, logp = unique.gather(-1, order), (counts / samples).log()
    if besides is not None:
        known = ((unique == besides[..., None]) & (counts > 0)).any(-1, keepdim=True)
        extra = torch.full_like(logp[..., :1], NEVER).masked_fill(known, -torch.inf)
        unique, logp = torch.cat((unique, besides[..., None]), -1), torch.cat((logp, extra), -1)
    return Sparse(unique, logp, torch.full_like(logp[..., 0], -torch.inf))


class Kept(Teacher):
    """A teacher of which few tokens a position are kept: answers ``Sparse`` (B, L, K) to batches of a Generation task.

    The next token of the text is kept with them, so that a hard term has its label.

    Args:
        teacher: the one that is asked, such as Live(model).
        top: how many of the likeliest tokens, beside the bucket of the rest.
        samples: in its place, how many draws; for forward divergences at Static(1.0), see ``drawn``.
        seed: of the draws, which are those of a sample of the data set wherever it stands; without ids, of the batch.

    Raises:
        ValueError: unless exactly one of ``top`` and ``samples`` is given.
    """

    def __init__(self, teacher: Teacher, *, top: int | None = None, samples: int | None = None, seed: int = 0) -> None:
        if (top is None) == (samples is None) or (top or samples or 0) < 1:
            raise ValueError(f"Kept needs one of top and samples, at least 1; got top={top} and samples={samples}.")
        self.teacher, self.top, self.samples, self.seed = teacher, top, samples, seed
        how = {"top": top} if top is not None else {"samples": samples, "seed": seed}
        self.identity = key_digest({"teacher": teacher.identity, **how})

    @property
    def model(self) -> nn.Module | None:
        return self.teacher.model

    def to(self, device: torch.device | str) -> Self:
        self.teacher.to(device)
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Sparse:
        said = self.teacher({name: x for name, x in inputs.items() if name != "taught"}, ids)
        logits, label = getattr(said, "logits", said), following(inputs)
        if self.top is not None:
            return top(logits, self.top, besides=label)
        assert self.samples is not None
        parts = []
        for row, z in enumerate(logits.cpu()):
            number = row if ids is None else int(ids[row])
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            parts.append(drawn(z, self.samples, besides=label[row].cpu(), generator=generator))
        stacked = (torch.stack([getattr(part, name) for part in parts]) for name in ("ids", "logp", "rest"))
        return Sparse(*stacked).to(logits.device)


def following(inputs: Mapping[str, Any]) -> Int[Tensor, "B L"]:
    """The token of the text that each position answers for; of an encoder-decoder that is its label."""
    if "labels" in inputs:
        return inputs["labels"].clamp_min(0)
    tokens = inputs["input_ids"]
    return torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)


class CachedSparse(Teacher):
    """Looks the kept tokens up by sample id: ``Sparse`` (B, L, K), float32, on the ids' device.

    Those of fp16 are divided by their sum again, so a position is a distribution and no loss over it negative. Files
    are mapped, and many processes may read them.

    Args:
        path: the folder that ``record_sparse`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, BrokenCache, ValueError: as ``Shards`` does.
    """

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        self.shards = Shards(path, kind=KIND, batches=batches, teacher=teacher, checksum=checksum)
        self.path, self.identity, self.length = self.shards.path, self.shards.identity, self.shards.length

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Sparse:
        parts = [self._held(file, row) for file, row in self.shards.at(ids)]
        parts = parts or [[x[:0] for x in self._held(*self.shards.at(torch.tensor([0]))[0])]]
        tokens, logp, rest = (torch.cat(side) for side in zip(*parts, strict=True))
        if logp.dtype == torch.float16:
            logp, rest = logp.float(), rest.float()
            whole = torch.cat((logp, rest[..., None]), -1).logsumexp(-1)
            logp, rest = logp - whole[..., None], rest - whole
        found = Sparse(tokens, logp, rest)
        return found if ids is None else found.to(ids.device)

    def _held(self, file: Any, row: int) -> list[Tensor]:
        tokens, logp, rest = (file.get_slice(name)[row : row + 1] for name in ("ids", "logp", "rest"))
        return [joined(tokens), logp, rest]

    def to(self, device: torch.device | str) -> Self:
        return self

    def objection(self, batches: Any) -> str | None:
        return self.shards.objection(batches)


def record_sparse(
    teacher: Teacher,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Callable[[Any], tuple[Any, Any, Any]],
    precision: str = "fp32",
    quiet: bool = False,
) -> CachedSparse | CachedDrawn:
    """Ask the teacher once about every text, and open the result; goes on where a recording was cut short.

    Of several processes that call this one records, and the others wait. Ids lie in whole bytes, two below 2^16 tokens
    and three below 2^24; with log-probabilities of fp32 a token of the text takes 6 K + 4 bytes, or 7 K + 4, and with
    those of fp16 4 K + 2, or 5 K + 2. Samples go to ``record_drawn``, in about 37 bytes.

    Args:
        teacher: one that answers ``Sparse``: what is kept of another, ``Kept(Live(model), top=16)``, or ``Served``.
        batches: texts of one length, ``data.tokens.Tokens``.
        path: the folder to write.
        inputs: how a batch becomes the models' inputs: ``Generation().inputs``. The model must take them: ``.meet``.
        precision: "fp32" rounds nothing; "fp16" rounds log-probabilities by 2^-11 of themselves at most: the KL from
            what was said to what is read stays below 1e-6, and the total variation below 3e-4, measured for K of 16
            and 64 at 300 to 50,000 tokens.
        quiet: no progress bar.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a teacher that answers NaN, or
            another precision.
        TypeError: for a teacher that answers no ``Sparse``.
    """
    if isinstance(teacher, Kept) and teacher.samples is not None:
        from tempering.teachers.drawn import record_drawn

        return record_drawn(teacher, batches, path, inputs=inputs, quiet=quiet)
    if precision not in PRECISIONS:
        raise ValueError(f"record_sparse needs precision {' or '.join(map(repr, PRECISIONS))}; got {precision!r}.")
    path, asked = Path(path), _Asked(teacher, batches, inputs, PRECISIONS[precision])
    key = key_of(KIND, batches, teacher, precision=precision)
    kept = 1 + (getattr(teacher, "top", None) or 64)
    record_shards(path, key, asked, teacher, size=room(8 * kept * key["length"]), quiet=quiet)
    return CachedSparse(path, batches=batches, teacher=teacher)


class _Asked:
    """A shard of kept tokens: ids of texts in, {"ids": (B, L, K, bytes), "logp": (B, L, K), "rest": (B, L)} out."""

    def __init__(
        self, kept: Teacher, batches: Recordable, inputs: Callable[[Any], tuple[Any, Any, Any]], dtype: torch.dtype
    ) -> None:
        self.kept, self.batches, self.inputs, self.dtype = kept, batches, inputs, dtype

    def __call__(self, ids: Tensor) -> Tensors:
        parts = [self._asked(part) for part in ids.split(self.batches.batch_size)]
        tokens, logp, rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logp", "rest"))
        return {"ids": split(tokens), "logp": self._narrowed(logp), "rest": self._narrowed(rest)}

    def _asked(self, ids: Tensor) -> Sparse:
        asked, _ = given(self.batches, ids, self.inputs, device_of(self.kept))
        found = self.kept(asked, ids)
        if not isinstance(found, Sparse):
            raise TypeError(
                f"only Sparse answers can be recorded so; {type(self.kept).__name__} answers {type(found).__name__}. "
                "Say what is kept of it: Kept(teacher, top=16)."
            )
        if torch.isnan(found.logp).any():
            raise ValueError("the teacher gives NaN: nothing can be learned from it. Is its checkpoint whole?")
        return found.to("cpu")

    def _narrowed(self, logp: Tensor) -> Tensor:
        """In the precision that is stored; what is unlikelier than it can say stays a token that is held."""
        return torch.where(torch.isneginf(logp), logp, logp.clamp_min(torch.finfo(self.dtype).min)).to(self.dtype)
