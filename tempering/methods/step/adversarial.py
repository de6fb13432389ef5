"""Adversarial training without a teacher: how a robust teacher is made, and the control of a student of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import torch
from torch import Tensor

from tempering.methods.base import Step, StepMethod, check_weights
from tempering.methods.step._attack import PerturbationBall, check_attack, eval_mode
from tempering.objectives import cross_entropy, divergence, log_softmax
from tempering.utils.search_space import Weight


class _Adversarial(StepMethod):
    """What both share: an l-infinity ball, PGD in it, inputs in ``bounds``; the model is attacked in eval mode."""

    needs_labels = True
    needs_teacher = False
    needs_double_backward = True  # not twice, but within the step
    zero_when_equal = False

    def __init__(
        self, *, eps: float, attack_steps: int, step_size: float | None, bounds: Sequence[float] | None
    ) -> None:
        super().__init__()
        check_attack(type(self).__name__, eps=eps, steps=attack_steps, size=step_size, bounds=bounds)
        self.eps, self.attack_steps, self.step_size = eps, attack_steps, step_size
        self.bounds = None if bounds is None else tuple(bounds)

    def step(self, step: Step) -> Mapping[str, Tensor]:
        x = step.student_inputs
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__} attacks one floating point tensor of inputs (N, ...); got {got}.")
        with eval_mode(step.student):
            with torch.no_grad():
                still = step.student_rows(step.student(x))
            if len(still) != len(x):
                raise ValueError(
                    f"{type(self).__name__} needs a row for each input; got {len(still)} rows of {len(x)} inputs."
                )
            ball = PerturbationBall(type(self).__name__, x, still, eps=self.eps, bounds=self.bounds)
            attacked = self.attacked(ball, step, log_softmax(still.student)).to(x.dtype)
        return self.terms(step, attacked)

    @abstractmethod
    def attacked(self, ball: PerturbationBall, step: Step, clean: Tensor) -> Tensor:
        """The inputs to train on; ``clean`` are the log-probabilities of the inputs as they came."""

    @abstractmethod
    def terms(self, step: Step, attacked: Tensor) -> Mapping[str, Tensor]:
        """The terms of ``step.rows``, which this fills."""

    @classmethod
    def example(cls) -> Self:
        return cls(bounds=None)  # pyright: ignore[reportCallIssue]


class PGDAT(_Adversarial):
    """hard * cross entropy on inputs that PGD made worst for the model as it is; the inputs as they came are not seen.

    Inputs are pixels, normalized inside the model (``models.Normalized``). It costs ``attack_steps`` + 1 steps of plain
    training.

    Args:
        hard: weight of the cross entropy.
        eps: radius of the l-infinity ball, in units of the inputs.
        attack_steps: of PGD, from a random start.
        step_size: of each; None is 2 eps / attack_steps. Madry et al. take 7 of 2/255.
        bounds: the range that inputs keep to, and come in; None for inputs that have none.

    The model is attacked in eval mode, as TRADES does; Madry et al. leave it in training mode, where every step of the
    attack moves the statistics of batch norm.

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv:1706.06083.
    """

    paper = "arXiv:1706.06083"

    def __init__(
        self,
        *,
        hard: float = 1.0,
        eps: float = 8 / 255,
        attack_steps: int = 7,
        step_size: float | None = None,
        bounds: Sequence[float] | None = (0.0, 1.0),
    ) -> None:
        check_weights("PGDAT", hard=hard)
        super().__init__(eps=eps, attack_steps=attack_steps, step_size=step_size, bounds=bounds)
        self.hard = hard

    def attacked(self, ball: PerturbationBall, step: Step, clean: Tensor) -> Tensor:
        def losses(x: Tensor) -> Tensor:
            return cross_entropy(step.student_rows(step.student(x)))

        return ball.worst(losses, steps=self.attack_steps, size=self.step_size)

    def terms(self, step: Step, attacked: Tensor) -> Mapping[str, Tensor]:
        step.rows = rows = step.student_rows(step.student(attacked))
        return {"hard": self.hard * cross_entropy(rows)}


class TRADES(_Adversarial):
    """hard * cross entropy on the inputs as they came + robust * KL(answer there || answer on the worst inputs nearby).

    Inputs are pixels, normalized inside the model (``models.Normalized``). Both answers carry a gradient. It needs
    labels for the first term alone, and costs ``attack_steps`` + 2 steps of plain training.

    Args:
        hard: weight of the cross entropy.
        robust: weight of the divergence; the paper's 1 / lambda, 6 in its tables.
        eps: radius of the l-infinity ball, in units of the inputs.
        attack_steps: of PGD on the divergence, from a point nearby, since at the input itself it has no slope.
        step_size: of each; None is 2 eps / attack_steps. The released code takes 10 of 0.007 at 0.031.
        bounds: the range that inputs keep to, and come in; None for inputs that have none.

    Reference: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
    arXiv:1901.08573, equation 5.
    """

    paper = "arXiv:1901.08573"

    def __init__(
        self,
        *,
        hard: float = 1.0,
        robust: Annotated[float, Weight()] = 6.0,
        eps: float = 8 / 255,
        attack_steps: int = 10,
        step_size: float | None = None,
        bounds: Sequence[float] | None = (0.0, 1.0),
    ) -> None:
        check_weights("TRADES", hard=hard, robust=robust)
        super().__init__(eps=eps, attack_steps=attack_steps, step_size=step_size, bounds=bounds)
        self.hard, self.robust = hard, robust

    def attacked(self, ball: PerturbationBall, step: Step, clean: Tensor) -> Tensor:
        def losses(x: Tensor) -> Tensor:
            return divergence(clean, log_softmax(step.student_rows(step.student(x)).student))

        def nearby(x: Tensor) -> Tensor:
            return 0.001 * torch.randn_like(x)

        return ball.worst(losses, steps=self.attack_steps, size=self.step_size, draw=nearby)

    def terms(self, step: Step, attacked: Tensor) -> Mapping[str, Tensor]:
        step.rows = rows = step.student_rows(step.student(step.student_inputs))
        worst = step.student_rows(step.student(attacked)).student
        moved = divergence(log_softmax(rows.student), log_softmax(worst))
        return {"hard": self.hard * cross_entropy(rows), "robust": self.robust * moved}
