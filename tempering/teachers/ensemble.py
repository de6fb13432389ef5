"""Ensemble: the weighted mean of several teachers, such as R2KD's network and its pruned copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.combined import CombinedTeacher, Teachers, dense_logits
from tempering.teachers.live import Live
from tempering.utils.tensors import copy_model

Mean = Literal["logits", "probabilities", "log_probabilities"]


class Ensemble(CombinedTeacher):
    """Weighted mean of several teachers' outputs, (..., C) logits, or (N, C, H, W) of pixels.

    ``Ensemble([a, b], weights=[0.9, 0.6])`` weighs by validation scores, such as those of
    ``tasks.validation_weights``. A teacher of weight 0 does not run, and one that has all the weight answers alone: its
    outputs are returned as they are, to the bit. Features are those of the first that runs.

    Args:
        teachers: modules (wrapped in ``Live``) or teachers of the same classes; name -> teacher, or a sequence.
        weights: one >= 0 per teacher, divided by their sum; None: equal ones. "confidence" weighs every row by the
            inverse of each teacher's entropy in nats at temperature 1, so the surest teacher of a row counts most.
        mean: what is averaged. "logits"; "probabilities" at temperature 1, and the result is their logarithm;
            "log_probabilities", which differ from "logits" by a constant per row, so that only losses of raw logits
            see a difference.

    Raises:
        ValueError: for another number of weights, weights < 0 or all 0, or an unknown mean. For a task of labels, one
            logit or numbers: for weights or a mean by the softmax over classes. While running: for outputs that are no
            logits of one shape, naming the teachers.

    Reference: Hinton et al., 2015, arXiv:1503.02531, for both means of probabilities; Kwon et al., "Adaptive Knowledge
    Distillation Based on Entropy", ICASSP 2020, for weights by entropy.
    """

    def __init__(
        self,
        teachers: Teachers,
        *,
        weights: Sequence[float] | Literal["confidence"] | None = None,
        mean: Mean = "logits",
    ) -> None:
        super().__init__(teachers)
        if mean not in get_args(Mean):
            raise ValueError(f"Ensemble needs mean {', '.join(map(repr, get_args(Mean)))}; got {mean!r}.")
        count, given = len(self.parts), weights
        if weights is None:
            weights = [1.0] * count
        if isinstance(weights, str):
            if weights != "confidence":
                raise ValueError(f"Ensemble needs weights=[...], one per teacher, or 'confidence'; got {weights!r}.")
            self.weights = None
        else:
            try:
                values = [float(w) for w in weights]
            except (TypeError, ValueError):  # names, a mapping, a single number
                values = []
            valid = all(math.isfinite(w) and w >= 0 for w in values) and sum(values) > 0
            if len(values) != count or not valid:
                raise ValueError(
                    f"Ensemble needs weights=[...], a number >= 0 for each of the {count} teachers in their order, and "
                    f"one > 0; got {given!r}."
                )
            self.weights = {name: w / sum(values) for name, w in zip(self.parts, values, strict=True)}
        self.mean = mean
        self.identity = key_digest(
            {
                "ensemble": [part.identity for part in self.parts.values()],
                "weights": "confidence" if self.weights is None else list(self.weights.values()),
                "mean": mean,
            }
        )

    def check_predicts(self, predicts: str) -> None:
        super().check_predicts(predicts)
        softmax = self.mean != "logits" or self.weights is None
        if softmax and len(self.active) > 1 and predicts not in ("classes", "pixels"):
            what = "weights='confidence'" if self.mean == "logits" else f"mean={self.mean!r}"
            raise ValueError(
                f"Ensemble with {what} takes the softmax over classes, and the task predicts {predicts}. Use "
                "mean='logits' and fixed weights."
            )

    def alone(self, name: str) -> Teacher:
        """Return the ensemble in which the teacher ``name`` has all the weight."""
        other = copy.copy(self)
        other.weights = {part: float(part == name) for part in self.parts}
        return other

    @property
    def model(self) -> nn.Module | None:
        return self.parts[self.active[0]].model

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts if self.weights is None or self.weights[name] > 0)

    def _answer(self, inputs: Any, ids: Tensor | None, *, grad: bool) -> Any:
        names = self.active
        if len(names) == 1:
            return self._query(names[0], inputs, ids, grad=grad)
        logits = {name: dense_logits(self._query(name, inputs, ids, grad=grad)) for name in names}
        first = logits[names[0]]
        for name, z in logits.items():
            if not isinstance(z, Tensor) or not z.is_floating_point() or z.shape != getattr(first, "shape", None):
                raise ValueError(
                    f"Ensemble averages logits of one shape; {self._said(names[0], first)} and "
                    f"{self._said(name, z)}. All need the same classes in the same order, and the logits of all of "
                    "them: not the likeliest tokens only, as of a remote or top-k teacher."
                )
        dim = 1 if first.ndim == 4 else -1  # of the classes
        if self.mean != "logits":
            logits = {name: z.log_softmax(dim) for name, z in logits.items()}
        weights: dict[str, Any] = self.weights or _by_confidence(logits, dim)
        if self.mean == "probabilities":
            logs = [z + (w.log() if isinstance(w, Tensor) else math.log(w)) for z, w in _paired(logits, weights)]
            return torch.logsumexp(torch.stack(logs), 0)
        terms = [w * z for z, w in _paired(logits, weights)]
        return sum(terms[1:], terms[0])


def _paired(logits: dict[str, Tensor], weights: dict[str, Any]) -> list[tuple[Tensor, Any]]:
    return [(z, weights[name]) for name, z in logits.items()]


def _by_confidence(logits: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Return weights in (0, 1] of size 1 at ``dim``, inverse to the entropies: one row's add up to 1."""
    entropy = torch.stack([torch.special.entr(z.softmax(dim)).sum(dim, keepdim=True) for z in logits.values()])
    inverse = 1.0 / entropy.clamp_min(torch.finfo(entropy.dtype).eps)
    return dict(zip(logits, inverse / inverse.sum(0), strict=True))


def prune(model: nn.Module, *, amount: float = 0.1) -> nn.Module:
    """Return a copy with the smallest |w| of every convolution and linear layer set to 0, a share ``amount`` of each.

    Biases are kept and the copy is not fine-tuned, as in R2KD.

    Raises:
        ValueError: for an amount outside [0, 1), or a model without such layers.
    """
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"prune needs amount in [0, 1), the share of weights set to 0; got {amount!r}.")
    out = copy_model(model)
    layers = [m for m in out.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    if not layers:
        raise ValueError(f"prune found no convolution or linear layer in {type(model).__name__}.")
    for layer in layers:
        weights = layer.weight.detach().flatten()  # a copy in channels-last format, so it is copied back
        smallest = weights.abs().topk(round(amount * len(weights)), largest=False).indices
        layer.weight.data.copy_(weights.index_fill(0, smallest, 0.0).view_as(layer.weight))
    return out


def with_pruned(
    model: nn.Module, *, amount: float, wrap: Callable[[nn.Module], Teacher] = Live, share: float = 0.7
) -> Ensemble:
    """Return R2KD's teacher: ``share`` times the model and 1 - share times its pruned copy, each wrapped by ``wrap``.

    Reference: Kim et al., IEEE TKDE 2024, arXiv:2311.13934.
    """
    return Ensemble([wrap(model), wrap(prune(model, amount=amount))], weights=[share, 1.0 - share])
