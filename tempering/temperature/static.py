"""A constant temperature."""

from __future__ import annotations

from tempering.rows import Rows
from tempering.temperature.base import Policy, Temperatures, constant
from tempering.utils.search_space import Tau


class Static(Policy):
    """One constant temperature for both sides of every row, (1, 1).

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    paper = "arXiv:1503.02531"

    def __init__(self, tau: Tau = 4.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        T = constant(self.tau, rows.student)
        return Temperatures(T, T)
