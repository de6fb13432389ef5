"""Knowledge distillation for PyTorch, with the temperature under control.

Names and subpackages are imported on first access: ``import tempering`` is cheap, and reports and ``--help`` never load
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tempering._version import __version__ as __version__

if TYPE_CHECKING:
    from tempering import audits as audits
    from tempering import data as data
    from tempering import export as export
    from tempering import kernels as kernels
    from tempering import methods as methods
    from tempering import models as models
    from tempering import objectives as objectives
    from tempering import rollouts as rollouts
    from tempering import tasks as tasks
    from tempering import teachers as teachers
    from tempering import temperature as temperature
    from tempering.export.load import load_student as load_student
    from tempering.rows import Rows as Rows
    from tempering.rows import total as total
    from tempering.training.config import Run as Run
    from tempering.training.config import TrainConfig as TrainConfig
    from tempering.training.detector import distill_detector as distill_detector
    from tempering.training.distill import distill as distill
    from tempering.training.experiment import Experiment as Experiment
    from tempering.training.experiment import TeacherRecipe as TeacherRecipe
    from tempering.utils.hooks import FeatureExtractor as FeatureExtractor


_EXPORTS = {
    "Rows": "tempering.rows",
    "total": "tempering.rows",
    "distill": "tempering.training.distill",
    "distill_detector": "tempering.training.detector",
    "Run": "tempering.training.config",
    "TrainConfig": "tempering.training.config",
    "Experiment": "tempering.training.experiment",
    "TeacherRecipe": "tempering.training.experiment",
    "FeatureExtractor": "tempering.utils.hooks",
    "load_student": "tempering.export.load",
}
_SUBPACKAGES = (
    "audits",
    "data",
    "export",
    "kernels",
    "methods",
    "models",
    "objectives",
    "rollouts",
    "tasks",
    "teachers",
    "temperature",
)

__all__ = [*_EXPORTS, *_SUBPACKAGES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"tempering.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tempering' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
