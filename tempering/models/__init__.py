"""The nets that this field's tables are made of, by the field's names, and classifiers of other libraries.

A family is one file with a dict ``NETS``, name -> (classes, channels) -> module; nothing else is edited. Stages are the
modules ``stem``, ``stage1``, ``stage2``, ..., and what the head sees is ``pool``: names for ``Taps``.
"""

import importlib
import pkgutil
from collections.abc import Callable

from torch import nn

from tempering.models.factory import build, load, parted
from tempering.models.normalized import Normalised

MODELS: dict[str, Callable[[int, int], nn.Module]] = {}
for _info in pkgutil.iter_modules(__path__):
    MODELS |= getattr(importlib.import_module(f"{__name__}.{_info.name}"), "NETS", {})


def stages(net: nn.Module) -> list[str]:
    """Names of the net's stages, shallow to deep; [] for a net that is not of the zoo."""
    return getattr(net, "stages", [])


__all__ = ["MODELS", "Normalised", "build", "load", "parted", "stages"]
