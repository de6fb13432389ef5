"""All invariants, in the order in which they are listed."""

from tempering.conformance.invariants import calls, lists, numerics, reductions, values
from tempering.conformance.invariants.base import INVARIANTS as INVARIANTS
from tempering.conformance.invariants.values import fits as fits

__all__ = ["INVARIANTS", "calls", "fits", "lists", "numerics", "reductions", "values"]
