"""Every tolerance of the invariants, derived from the dtype in which losses compute.

Inputs are float64 unless an invariant says otherwise, and losses may upcast or downcast them to float32, so values are
compared in float32's precision: ``EPS`` = 2^-23. A value v whose largest terms are of size s may be off by

    rounding(dtype, s) + RELATIVE * |v|

with ``rounding`` 64 units in the last place of s: a sum over tens of classes and rows, in any order. Faults
differ by parts of v, thousands of times more.
"""

from __future__ import annotations

import torch

EPS = torch.finfo(torch.float32).eps
ULPS = 64.0
"""Units in the last place that a sum of terms may be off."""
RELATIVE = 2.0**10 * EPS
"""1.2e-4: of a value that is compared with itself, computed in another way."""
FORMULA = 2.0**13 * EPS
"""1e-3: of a value that is compared with a formula; losses add constants such as 1e-6 or 1e-8 to probabilities."""
SHARE = 0.02
"""How much a row may count more than another. A row that is counted wrongly differs by 1 / rows, at least 0.1 here."""
SLOPE = 0.02
"""Of the slope by central differences, for what Richardson's extrapolation leaves of their truncation."""
BFLOAT16 = 0.01
"""Of a loss of bfloat16 logits, which are exact here: bfloat16's eps, 0.0078, for a result that is rounded to it."""
TRAINED = 0.02
"""Of a probability, after training."""


def rounding(dtype: torch.dtype, scale: float = 1.0) -> float:
    """Rounding of a value of this dtype whose largest terms are of this scale; float32's at best."""
    return ULPS * max(EPS, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0) * max(1.0, scale)
