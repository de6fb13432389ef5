"""Contrastive representation distillation: the teacher's vector of this sample, told from those of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import Projected
from tempering.rows import Rows
from tempering.utils.search_space import Weight


class CRD(Projected):
    """feature * noise-contrastive estimation over a memory of all samples' embeddings, both ways.

    Args:
        samples: how many samples the data set has: the memories' length. ``rows.ids`` say which sample a row is.
        negatives: drawn per step, uniformly over the samples, as in the released code's default mode.
        contrast: temperature of the embeddings' dot products.
        momentum: of the memories' entries.
        size: of the embeddings.

    The normalizer is set by the first block and then fixed, as released.

    Reference: Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, equations 10 and 19.
    """

    paper = "arXiv:1910.10699"
    wants = "vectors"

    def __init__(
        self,
        *,
        samples: int,
        feature: Annotated[float, Weight()] = 0.8,
        hard: float = 1.0,
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
        s, t = (F.normalize(p(x)) for p, x in zip(self.projectors, pairs[0], strict=True))
        others = torch.randint(self.samples, (len(ids), self.negatives), device=ids.device)
        chosen = torch.cat((ids[:, None], others), 1)
        loss = self._nce(s, self.teacher_memory[chosen], "student") + self._nce(
            t, self.student_memory[chosen], "teacher"
        )
        self._remember(ids, s, t)
        return loss

    def _nce(self, anchor: Tensor, remembered: Tensor, side: str) -> Tensor:
        """-log of telling the first remembered vector from the drawn ones, (N,)."""
        score = (torch.einsum("nd,nkd->nk", anchor, remembered.to(anchor)) / self.contrast).exp()
        whole = getattr(self, f"{side}_whole")
        if whole < 0:
            whole.fill_(score.detach().mean() * self.samples)
        p = score / whole.to(score)
        noise = self.negatives / self.samples
        found = p[:, 0] / (p[:, 0] + noise + 1e-7)
        refused = noise / (p[:, 1:] + noise + 1e-7)
        return -(found.log() + refused.log().sum(1))

    @torch.no_grad()
    def _remember(self, ids: Tensor, s: Tensor, t: Tensor) -> None:
        for memory, new in ((self.student_memory, s), (self.teacher_memory, t)):
            mixed = self.momentum * memory[ids] + (1.0 - self.momentum) * new.detach().to(memory)
            memory[ids] = F.normalize(mixed)
