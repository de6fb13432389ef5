"""Distillation of numbers: squared error to the teacher, the teacher as a bound, or the divergence of Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from tempering.methods.base import Method
from tempering.rows import GAUSSIAN, Rows, upcast_to_float32
from tempering.utils.search_space import NonNegative, TermWeight


class RegressionKD(Method):
    """Regression to the teacher: soft * (v - u)^2, the mean over columns, + hard * the task's own loss.

    In blocks named "gaussian" (of ``tasks.Regression(uncertainty=True)``) the soft term is KL(teacher || student) of
    Gaussians with the mean and log variance (m, l) of each side: (l_s - l_t + (exp(l_t) + (m_t - m_s)^2) / exp(l_s) -
    1) / 2. There is no temperature, and no factor for one.

    With a ``bound`` the soft term is instead the student's own loss where that plus the bound is larger than the
    teacher's loss, else 0 (Chen et al., equation 5): the student learns from the label until it is better than the
    teacher by the bound.

    Args:
        soft: weight of the distance to the teacher, or of the bounded loss.
        hard: weight of the task's own loss.
        bound: margin in units of the loss; None: no bound.

    Reference: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017,
    section 3.3, for boxes; here a row is one number.
    """

    paper = "none: NeurIPS 2017, no preprint"
    non_negative = False  # a bounded Gaussian loss is a log likelihood
    shift_invariant = False
    of_classes = False

    def __init__(self, *, soft: TermWeight = 1.0, hard: NonNegative = 1.0, bound: float | None = None) -> None:
        super().__init__()
        if bound is not None and not bound >= 0:
            raise ValueError(f"RegressionKD needs bound >= 0, or None for no bound; got {bound!r}.")
        self.soft, self.hard, self.bound = soft, hard, bound

    @property
    def zero_when_equal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the soft term is 0 for a student equal to the teacher: not with a bound."""
        return self.bound is None

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return self.with_hard({"soft": self.soft * self._soft(rows)}, rows)

    def _soft(self, rows: Rows) -> Tensor:
        if self.bound is not None:
            if rows.task_loss is None or rows.teacher_loss is None:
                raise ValueError(
                    f"RegressionKD(bound={self.bound}) compares losses of student and teacher, and "
                    f"Rows(name={rows.name!r}) has no task_loss and teacher_loss. Use tasks.Regression()."
                )
            own = upcast_to_float32(rows.task_loss)
            worse = own.detach() + self.bound > upcast_to_float32(rows.teacher_loss)
            return torch.where(worse, own, torch.zeros_like(own))
        student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
        if rows.name != GAUSSIAN:
            return (student - teacher).square().mean(-1)
        (m_s, l_s), (m_t, l_t) = student.unbind(-1), teacher.unbind(-1)
        return (l_s - l_t + (l_t - l_s).exp() + (m_t - m_s).square() * (-l_s).exp() - 1.0) / 2.0
