"""Tasks: map model outputs to rows and score students. Exports the generated-text classes of ``rollouts`` too."""

from typing import Any

import lazy_loader

_getattr, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_ROLLOUTS = ("GenerationScorer", "OnPolicy", "Sampling", "SequenceLevel", "Speculative")
__all__ += _ROLLOUTS


def __getattr__(name: str) -> Any:
    if name in _ROLLOUTS:
        from tempering import rollouts

        return getattr(rollouts, name)
    return _getattr(name)
