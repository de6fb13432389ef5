"""Contrastive representation distillation: discriminate a sample's teacher embedding from those of other samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import Projected
from tempering.rows import Rows
from tempering.utils.device import check_memory
from tempering.utils.search_space import NonNegative, TermWeight


class CRD(Projected):
    """Contrastive representation distillation: feature * noise-contrastive estimation over memory banks of all samples'
    embeddings, with the student and with the teacher as anchor.

    Args:
        samples: number of samples in the data set, the length of the memory banks. ``rows.ids`` index them.
        negatives: number drawn per row, uniformly over the samples, as in the released code's default mode.
        contrast: temperature of the dot products of embeddings.
        momentum: of the updates of the memory banks.
        size: dimension of the embeddings.

    The normalizer is estimated from the first block and then fixed, as released.

    Reference: Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, equations 10 and 19.
    """

    paper = "arXiv:1910.10699"
    wants = "vectors"

    def __init__(
        self,
        *,
        samples: int,
        feature: TermWeight = 0.8,
        hard: NonNegative = 1.0,
        negatives: int = 16384,
        contrast: float = 0.07,
        momentum: float = 0.5,
        size: int = 128,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        for name, value in (("samples", samples), ("negatives", negatives), ("size", size)):
            if value < 1:
                raise ValueError(f"CRD needs {name} >= 1; got {value!r}.")
        remedy = "samples is the number of samples in the training set, and size that of an embedding."
        check_memory(f"CRD(samples={samples}, size={size})", 2 * 4 * samples * size, remedy)
        self.samples, self.negatives, self.contrast = samples, negatives, contrast
        self.momentum, self.size = momentum, size
        bound = (3.0 / size) ** 0.5
        for side in ("student", "teacher"):
            self.register_buffer(f"{side}_memory", torch.empty(samples, size).uniform_(-bound, bound))
            self.register_buffer(f"{side}_whole", torch.tensor(-1.0))
        self.student_memory: Tensor
        self.teacher_memory: Tensor

    @classmethod
    def example(cls) -> CRD:
        return cls(samples=64, negatives=8, size=4)

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        if len(pairs) != 1:
            raise ValueError(f"CRD compares one pair of features; got {len(pairs)}. Name it: CRD(names=['pooled']).")
        return [nn.Linear(x.shape[1], self.size) for x in pairs[0]]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        if rows.ids is None:
            raise ValueError("CRD remembers samples by id: yield (input, label, id) batches.")
        ids = rows.ids if rows.weight is None else rows.ids[rows.weight > 0]
        is_cheap = ids.device.type == "cpu" and len(ids) > 0  # elsewhere it would need a synchronization
        if is_cheap and 2 * (found := len(set(map(int, ids)))) < len(ids):
            warnings.warn(
                f"CRD remembers samples by id, and a batch of {len(ids)} has {found} different ids. Are "
                "they numbers of groups, such as classes? Yield the number of the sample in the data set.",
                stacklevel=2,
            )
        if is_cheap and not 0 <= int(ids.min()) <= int(ids.max()) < self.samples:
            raise ValueError(
                f"CRD(samples={self.samples}) remembers the ids 0 to {self.samples - 1}; got {int(ids.min())} to "
                f"{int(ids.max())}. samples= is the length of the whole data set; of a Subset too, since its ids are "
                "those of the data set."
            )
        s, t = (F.normalize(p(x)) for p, x in zip(self.projectors, pairs[0], strict=True))
        negatives = torch.randint(self.samples, (len(ids), self.negatives), device=ids.device)
        indices = torch.cat((ids[:, None], negatives), 1)
        loss = self._nce(s, self.teacher_memory[indices], "student") + self._nce(
            t, self.student_memory[indices], "teacher"
        )
        self._update_memory(ids, s, t)
        return loss

    def _nce(self, anchor: Tensor, candidates: Tensor, side: str) -> Tensor:
        """Return the NCE loss of classifying the first memory vector as positive and the others as noise, (N,)."""
        score = (torch.einsum("nd,nkd->nk", anchor, candidates.to(anchor)) / self.contrast).exp()
        normalizer = getattr(self, f"{side}_whole")
        first = (score.detach().mean() * self.samples).to(normalizer)
        fixed = torch.where(normalizer < 0, first, normalizer)
        normalizer.copy_(fixed)
        p = score / fixed.to(score)
        noise = self.negatives / self.samples
        positive = p[:, 0] / (p[:, 0] + noise + 1e-7)
        negative = noise / (p[:, 1:] + noise + 1e-7)
        return -(positive.log() + negative.log().sum(1))

    @torch.no_grad()
    def _update_memory(self, ids: Tensor, s: Tensor, t: Tensor) -> None:
        """Move the memory entries of these samples toward their new embeddings."""
        for memory, new in ((self.student_memory, s), (self.teacher_memory, t)):
            mixed = self.momentum * memory[ids] + (1.0 - self.momentum) * new.detach().to(memory)
            memory[ids] = F.normalize(mixed)
