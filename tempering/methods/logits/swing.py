"""Swing Distillation: what is private is taught hot, with noise, and without its label."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.methods.base import Method, check_policy, check_run_fraction, check_weights, linear_warmup
from tempering.objectives import cross_entropy, kl
from tempering.rows import IGNORE_INDEX, Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.private import Private, privacy
from tempering.utils.search_space import Fraction, Weight

Noise = Literal["normal", "laplace", "gumbel"]
MASK = 2**32 - 1


class Swing(Method):
    """soft * T_s T_t KL(teacher + noise || student) + hard * cross entropy, where private rows alone have noise.

    Private rows are hot besides, are not scaled by T_s T_t, and have no label. Without ``Rows.privacy_score``, or where
    it is 0, this is KD at the policy's temperatures to the last bit.

    Args:
        soft: weight of the divergence.
        hard: weight of the cross entropy with the labels at temperature 1.
        temperature: any policy; None is temperature.Private(Static(4.0)).
        noise: standard deviation of what is added to the teacher's tempered logits, times the row's privacy; 0 for
            none. Private rows then need ``ids`` and ``positions``, which ``LanguageModeling`` gives where batches have
            "ids".
        distribution: of the noise, mean 0 and variance 1 before that.
        hide: rows more private than this have no label, since a label tells what a hot teacher hides; 1 hides none.
        redact: leave rows more private than ``hide`` out altogether. There is no swing then: it is the plain
            alternative that a swing is to be compared with.
        seed: of the noise.
        warmup: share of the run over which ``soft`` rises linearly from 0; 0 for none.

    The noise of a row follows from the seed, its sample and its place: the same in every epoch, however the batch is
    split and wherever a run goes on, so that going over the data again does not average it away. Where one secret is in
    many texts, it has another noise in each. Its mean is 0 on logits; on probabilities it is not, so targets are biased
    towards flat ones. This gives no guarantee of differential privacy: nothing is clipped and nothing accounted for.

    The source says that soft targets of private tokens get noise; its distribution and size, and what becomes of
    labels, are not known to us and are arguments here.

    Reference: Li et al., "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework", 2022,
    arXiv:2212.08349.
    """

    paper = "arXiv:2212.08349"

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight()] = 0.9,
        hard: float = 0.1,
        temperature: Policy | None = None,
        noise: float = 1.0,
        distribution: Noise = "normal",
        hide: float = 0.5,
        redact: bool = False,
        seed: int = 0,
        warmup: Annotated[float, Fraction()] = 0.0,
    ) -> None:
        super().__init__()
        check_weights("Swing", soft=soft, hard=hard, noise=noise)
        check_run_fraction("Swing", warmup=warmup)
        if not 0.0 <= hide <= 1.0:
            raise ValueError(f"Swing needs hide in [0, 1], a privacy, 1 to hide nothing; got {hide!r}.")
        if distribution not in ("normal", "laplace", "gumbel"):
            raise ValueError(f"Swing needs distribution 'normal', 'laplace' or 'gumbel'; got {distribution!r}.")
        self.soft, self.hard, self.warmup = soft, hard, warmup
        self.temperature = check_policy("Swing", Private() if temperature is None else temperature)
        self.distribution: Noise = distribution
        self.noise, self.hide, self.redact, self.seed = noise, hide, redact, seed

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T = self.temperature(rows, progress)
        private = privacy(rows)
        if private is None:
            return self._terms(rows, T, progress)
        hidden = private > self.hide
        if rows.target is not None:
            rows = rows.replace(target=rows.target.masked_fill(hidden, IGNORE_INDEX))
        if rows.task_loss is not None:
            rows = rows.replace(task_loss=torch.where(hidden, torch.zeros_like(rows.task_loss), rows.task_loss))
        if self.noise and not self.redact:
            rows = self._noised(rows, private, T.teacher.detach().expand(len(rows), 1))
        terms = self._terms(rows, T, progress)
        if not self.redact:
            return terms
        return {name: torch.where(hidden, torch.zeros_like(term), term) for name, term in terms.items()}

    def _terms(self, rows: Rows, T: Temperatures, progress: float) -> dict[str, Tensor]:
        terms = {"soft": self.soft * linear_warmup(progress, self.warmup) * kl(rows, T)}
        if self.hard:
            terms["hard"] = self.hard * cross_entropy(rows)
        return terms

    @torch.no_grad()
    def _noised(self, rows: Rows, private: Float[Tensor, " N"], T: Float[Tensor, "N 1"]) -> Rows:
        """The rows with noise on the teacher's logits, such that it is ``noise * private`` large when tempered."""
        at = private.nonzero().squeeze(1)
        if not len(at):
            return rows
        if rows.ids is None or rows.positions is None:
            raise ValueError(
                f"Swing makes the noise of a private row from its sample and place, and Rows(name={rows.name!r}) has "
                'no ids or no places. Give batches "ids", as data.Tokens does, or set noise=0.'
            )
        teacher = upcast_to_float32(rows.teacher)
        drawn = draws(self.distribution, self.seed, rows.ids[at], rows.positions[at], teacher.shape[1])
        added = self.noise * private[at].unsqueeze(1) * T[at] * drawn.to(teacher.dtype)
        return rows.replace(teacher=teacher.index_add(0, at, added.to(teacher.dtype)))


def draws(
    distribution: Noise, seed: int, ids: Int[Tensor, " K"], places: Int[Tensor, " K"], classes: int
) -> Float[Tensor, "K C"]:
    """Random numbers of mean 0 and variance 1, (K, C) float64, the same for the same seed, id, place and class.

    A hash of the four takes a generator's place, so no row's numbers depend on which others are there. It has 32 bits:
    enough for noise, not for a cipher.
    """
    key = _mixed(
        ids.long() & MASK ^ _mixed((ids.long() >> 32 & MASK) ^ _mixed(torch.tensor(seed & MASK, device=ids.device)))
    )
    key = _mixed(key ^ (places.long() & MASK)).unsqueeze(1)
    column = torch.arange(classes, device=ids.device) * 0x9E3779B9 & MASK
    u = (_mixed(_mixed(key ^ column) ^ key).double() + 0.5) / 2**32  # in (0, 1), never an end
    if distribution == "normal":
        return torch.special.ndtri(u)
    if distribution == "laplace":
        return (0.5 - u).sign() * torch.log1p(-2 * (u - 0.5).abs()) / math.sqrt(2)
    return (-torch.log(-torch.log(u)) - 0.5772156649015329) * math.sqrt(6) / math.pi


def _mixed(x: Tensor) -> Tensor:
    """32 bits, each a function of all of x's (Wellons, "lowbias32"); int64 wraps, and its low 32 bits are right."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)
