"""Import it before checking conformance: what hypothesis reads anew for every invariant is read once."""

from __future__ import annotations

from typing import Any

import hypothesis.core as core
from hypothesis.internal.conjecture import providers

_digest = core.function_digest
_digests: dict[Any, bytes] = {}


def _digest_of_code(function: Any) -> bytes:
    """The seed of its examples: the same for every call of ``check``, whose inner function it is."""
    code = getattr(function, "__code__", function)
    if code not in _digests:
        _digests[code] = _digest(function)
    return _digests[code]


core.function_digest = _digest_of_code
# numbers in the files of the project, as examples: all files are parsed, and which are there depends on other tests
providers._get_local_constants = lambda: providers._local_constants
