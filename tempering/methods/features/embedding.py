"""Distillation of embeddings: squared error and cosine after a projection, and the matrix of similarities."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tempering.methods.features.base import Projected, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class EmbeddingKD(Projected):
    """Embedding distillation: mse * mean over columns of (P s - t)^2 + cosine * (1 - cos(P s, t)) + similarity * mean
    over the samples of (cos(s, s') - cos(t, t'))^2, for the embeddings s and t of student and teacher.

    P is the identity, or a learned linear map to the teacher's size, shared by all names; it is part of the method, and
    not of the student that is saved. The similarities need no projection.

    Args:
        mse, cosine, similarity: weights of the terms. ``similarity`` compares samples with each other, so a step with
            it is not split; without it every row stands alone.
        hard: weight of the task's own loss.
        projection: whether to learn P; None: where the sizes differ.
        names: keys of ``rows.features``; () for all.

    Raises:
        ValueError: for sizes that differ without a projection, or between names.

    Reference: Reimers & Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    EMNLP 2020, arXiv:2004.09813, equation 1, for ``mse``. ``similarity`` is Tung & Mori's idea with cosines.
    """

    paper = "arXiv:2004.09813"
    wants = "vectors"
    weighs = ("mse", "cosine", "similarity")

    def __init__(
        self,
        *,
        mse: TermWeight = 1.0,
        cosine: NonNegative = 0.0,
        similarity: NonNegative = 0.0,
        hard: NonNegative = 0.0,
        projection: bool | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(feature=mse, hard=hard, names=names)
        self.mse, self.cosine, self.similarity, self.projection = mse, cosine, similarity, projection
        # terms of weight 0 are left out
        self.weighs = tuple(n for n in type(self).weighs if getattr(self, n))  # pyright: ignore[reportAttributeAccessIssue]
        self.relational = similarity > 0  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the terms are 0 for a student equal to the teacher: not with a projection."""
        return self.projection is not True and not any(isinstance(m, nn.Linear) for m in self.projectors)

    def build(self, pairs: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
        sizes = sorted({(s.shape[1], t.shape[1]) for s, t in pairs})
        differ = any(s != t for s, t in sizes)
        if not (self.mse or self.cosine):
            return [nn.Identity()]
        if self.projection is False and differ:
            raise ValueError(
                f"EmbeddingKD(projection=False) needs embeddings of one size; got (student, teacher) {sizes}. Leave "
                "projection=None, end the student in nn.Linear, or use EmbeddingKD(mse=0.0, similarity=1.0)."
            )
        if not (differ if self.projection is None else self.projection):
            return [nn.Identity()]
        if len(sizes) > 1:
            raise ValueError(
                f"EmbeddingKD has one projection for all names, and their (student, teacher) sizes are {sizes}. Use a "
                "Sum of one EmbeddingKD per name."
            )
        return [nn.Linear(*sizes[0])]

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> dict[str, Tensor]:
        project, terms = self.projectors[0], dict[str, Tensor]()

        def add(name: str, value: Tensor) -> None:
            terms[name] = terms[name] + value if name in terms else value

        for s, t in pairs:
            if self.mse:
                add("mse", per_row(F.mse_loss(project(s), t, reduction="none")))
            if self.cosine:
                add("cosine", 1.0 - F.cosine_similarity(project(s), t))
            if self.similarity:
                u, v = F.normalize(s), F.normalize(t)
                add("similarity", (u @ u.T - v @ v.T).square().mean(1))
        return terms
