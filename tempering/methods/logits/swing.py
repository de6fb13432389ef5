"""Swing Distillation: higher temperatures, noise and no labels for private rows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.objectives import kl
from tempering.rows import Rows, upcast_to_float32, without_labels
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.private import Private, privacy
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight

Noise = Literal["normal", "laplace", "gumbel"]
MASK = 2**32 - 1


class Swing(Method):
    """Swing Distillation: soft * T_s T_t KL(teacher + noise || student) + hard * cross entropy, with noise on private
    rows only.

    Private rows also have higher temperatures, no factor T_s T_t, and no label. Without ``Rows.privacy_score``, or
    where it is 0, this equals KD at the policy's temperatures bit for bit.

    Args:
        soft: weight of the divergence.
        hard: weight of the cross entropy with the labels at temperature 1.
        noise: standard deviation of the noise added to the teacher's tempered logits, times the row's privacy score; 0:
            no noise. Private rows then need ``ids`` and ``positions``, which ``LanguageModeling`` provides if batches
            have "ids".
        distribution: distribution of the noise, with mean 0 and variance 1 before scaling.
        hide: ignore the labels of rows with a privacy score above this, since a label reveals the secret; 1: none.
        redact: exclude rows with a privacy score above ``hide``, without noise: the simple baseline for Swing.
        seed: seed of the noise.
        warmup: fraction of the run over which ``soft`` rises linearly from 0; default: none.
        temperature: a temperature policy; None: temperature.Private(Static(4.0)).

    The noise of a row is a function of the seed, its sample and its position: it is equal in every epoch, for any split
    of the batch and after resuming, so that repeated epochs do not average it out. A secret that occurs in several
    texts gets different noise in each. The noise has mean 0 on logits, but not on probabilities, so targets are biased
    toward uniform ones. There is no guarantee of differential privacy: no gradient is clipped and no budget tracked.

    The source states that soft targets of private tokens get noise; its distribution and size, and the treatment of
    labels, are not known to us and are arguments here.

    Reference: Li et al., "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework", 2022,
    arXiv:2212.08349.
    """

    paper = "arXiv:2212.08349"

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        noise: NonNegative = 1.0,
        distribution: Noise = "normal",
        hide: float = 0.5,
        redact: bool = False,
        seed: int = 0,
        warmup: RunFraction = 0.0,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= hide <= 1.0:
            raise ValueError(f"Swing needs hide in [0, 1], a privacy score, 1 to hide nothing; got {hide!r}.")
        if distribution not in ("normal", "laplace", "gumbel"):
            raise ValueError(f"Swing needs distribution 'normal', 'laplace' or 'gumbel'; got {distribution!r}.")
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy("Swing", Private() if temperature is None else temperature, allow_number=False)
        self.distribution: Noise = distribution
        self.noise, self.hide, self.redact, self.seed = noise, hide, redact, seed

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        scores = privacy(rows)
        if scores is None:
            return self._terms(rows, T, progress)
        hidden = scores > self.hide
        if rows.target is not None:
            rows = rows.replace(target=without_labels(rows.target, hidden))
        if rows.task_loss is not None:
            rows = rows.replace(task_loss=torch.where(hidden, torch.zeros_like(rows.task_loss), rows.task_loss))
        if self.noise and not self.redact:
            rows = self._add_noise(rows, scores, T.teacher.detach().expand(len(rows), 1))
        terms = self._terms(rows, T, progress)
        if not self.redact:
            return terms
        return {name: torch.where(hidden, torch.zeros_like(term), term) for name, term in terms.items()}

    def _terms(self, rows: Rows, T: Temperatures, progress: float) -> dict[str, Tensor]:
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * kl(rows, T)}
        return self.with_hard(terms, rows)

    @torch.no_grad()
    def _add_noise(self, rows: Rows, scores: Float[Tensor, " N"], T: Float[Tensor, "N 1"]) -> Rows:
        """Add noise to the teacher's logits, with standard deviation ``noise * scores`` after tempering."""
        indices = scores.nonzero().squeeze(1)
        if not len(indices):
            return rows
        if rows.ids is None or rows.positions is None:
            raise ValueError(
                f"Swing seeds the noise of a private row by its sample and position, and Rows(name={rows.name!r}) has "
                'no ids or no positions. Give batches "ids", as data.Tokens does, or set noise=0.'
            )
        teacher = upcast_to_float32(rows.teacher)
        unit_noise = draws(self.distribution, self.seed, rows.ids[indices], rows.positions[indices], teacher.shape[1])
        scaled = self.noise * scores[indices].unsqueeze(1) * T[indices] * unit_noise.to(teacher.dtype)
        return rows.replace(teacher=teacher.index_add(0, indices, scaled.to(teacher.dtype)))


def draws(
    distribution: Noise, seed: int, ids: Int[Tensor, " K"], positions: Int[Tensor, " K"], classes: int
) -> Float[Tensor, "K C"]:
    """Return random numbers of mean 0 and variance 1, (K, C) float64, determined by seed, id, position and class.

    They come from a hash of the four instead of a generator, so the numbers of a row do not depend on other rows. The
    hash has 32 bits: sufficient for noise, not for cryptography.
    """
    key = _hash32(
        ids.long() & MASK ^ _hash32((ids.long() >> 32 & MASK) ^ _hash32(torch.full((), seed & MASK, device=ids.device)))
    )
    key = _hash32(key ^ (positions.long() & MASK)).unsqueeze(1)
    column = torch.arange(classes, device=ids.device) * 0x9E3779B9 & MASK
    u = (_hash32(_hash32(key ^ column) ^ key).double() + 0.5) / 2**32  # in the open interval (0, 1)
    if distribution == "normal":
        return torch.special.ndtri(u)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if distribution == "laplace":
        return (0.5 - u).sign() * torch.log1p(-2 * (u - 0.5).abs()) / math.sqrt(2)
    return (-torch.log(-torch.log(u)) - 0.5772156649015329) * math.sqrt(6) / math.pi


def _hash32(x: Tensor) -> Tensor:
    """Hash 32 bits (Wellons, "lowbias32"); int64 multiplication wraps, and its low 32 bits are correct."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)
