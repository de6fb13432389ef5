"""All invariants, in the order in which they are listed."""

from tempering.conformance.checks import calls, features, lists, numerics, reductions, training, values
from tempering.conformance.checks.base import INVARIANTS as INVARIANTS
from tempering.conformance.checks.values import fits as fits

__all__ = ["INVARIANTS", "calls", "features", "fits", "lists", "numerics", "reductions", "training", "values"]
