"""Random inputs from hypothesis, which shrinks those of a failure to the smallest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import assume, strategies
from torch import Tensor

from tempering.conformance.probe import Probe
from tempering.rows import IGNORE_INDEX

STEP = 0.25  # logits are multiples, so that counterexamples are easy to read and exact in every dtype


class Draw:
    """Inputs of one example of an invariant."""

    def __init__(self, data: Any, probe: Probe) -> None:
        self._data, self._probe = data, probe

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(strategies.integers(low, high))

    def one_of(self, values: tuple[Any, ...]) -> Any:
        return self._data.draw(strategies.sampled_from(values))

    def array(self, *shape: int, low: int = -8, high: int = 8) -> Tensor:
        """Multiples of ``STEP`` from low to high times it, float64."""
        size = math.prod(shape)
        # one draw of bytes is much faster than one per value; smaller bytes are simpler: 0, -1, 1, -2, 2 ...
        values = np.frombuffer(self._data.draw(strategies.binary(min_size=size, max_size=size)), np.uint8).astype(
            np.int64
        )
        values = values % (high - low + 1)
        values = np.where(values % 2 == 1, -(values + 1) // 2, values // 2) if low < 0 else values + low
        return torch.from_numpy(values.reshape(shape).astype(np.float64)) * STEP

    def pair(
        self, min_n: int = 1, max_n: int = 4, *, n: int | None = None, c: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Student and teacher, different in every row: (N, C) logits, (N, ...) features or (N, K) scores.

        No vector of features or scores is constant, since many losses normalize or standardize it.
        """
        if n is None:  # one sample alone has no others to be compared with
            n = self.integer(max(min_n, 1 + self._probe.promises.batch_dependent), max_n)
        if self._probe.kind == "features":
            shape = (n, *self._probe.promises.feature_shape)
        else:
            shape = (n, self.integer(2, 6) if c is None else c)
        student, teacher = self.array(*shape), self.array(*shape)
        if not self._probe.on_rows:
            student, teacher = _uneven(student, student), _uneven(teacher, teacher)
        return _uneven(student, student - teacher), teacher

    def permutation(self, n: int) -> Tensor:
        return torch.tensor(self._data.draw(strategies.permutations(range(n))))

    def labels(self, n: int, classes: int, *, ignored: bool = False) -> Tensor:
        """(n,) labels; with ``ignored`` at least one is -100 and at least one is not."""
        target = torch.tensor([self.integer(0, classes - 1) for _ in range(n)])
        if ignored:
            mask = torch.tensor([self.integer(0, 1) for _ in range(n)], dtype=torch.bool)
            assume(bool(mask.any()) and not bool(mask.all()))
            target[mask] = IGNORE_INDEX
        return target


def _uneven(x: Tensor, watched: Tensor) -> Tensor:
    """``x`` plus 1, 3, 7, 15 ... steps along the last dimension, where ``watched`` is constant along it."""
    constant = watched.amax(-1, keepdim=True) == watched.amin(-1, keepdim=True)
    ramp = (2.0 ** torch.arange(1, x.shape[-1] + 1, dtype=x.dtype) - 1.0).clamp(max=31.0) * STEP
    return torch.where(constant, x + ramp, x)
