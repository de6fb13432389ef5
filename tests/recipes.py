"""Bundled recipes called from Python, with the flags of the command line as keywords."""

from __future__ import annotations

from typing import Any

from tempering.experiments.recipe import load, with_flags
from tempering.training.config import Run
from tempering.training.experiment import Experiment
from tests.paths import ROOT

RECIPES = ROOT / "tempering" / "recipes"


def describe(name: str, flags: dict[str, Any]) -> Experiment:
    """The Experiment of a bundled recipe."""
    return with_flags(load(RECIPES / f"{name}.py"), flags)


def run(name: str, flags: dict[str, Any]) -> Run:
    """The finished run of a bundled recipe."""
    return describe(name, flags).run()
