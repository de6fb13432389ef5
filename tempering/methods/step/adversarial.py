"""Adversarial training without a teacher, for robust teachers and as the baseline of robust students."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from tempering.methods.base import Step, StepMethod
from tempering.methods.step._attack import PerturbationBall, check_attack
from tempering.objectives import cross_entropy, divergence, log_softmax
from tempering.utils.search_space import NonNegative, TermWeight
from tempering.utils.tensors import eval_mode


class _Adversarial(StepMethod):
    """Base class of adversarial training: PGD in an l-infinity ball within ``bounds``, with the model in eval mode."""

    needs_labels = True
    needs_teacher = False
    needs_double_backward = True  # derivatives within the step, not second ones
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
            raise ValueError(f"{type(self).__name__} needs one floating point tensor of inputs (N, ...); got {got}.")
        with eval_mode(step.student):
            with torch.no_grad():
                clean = step.student_rows(step.student(x))
            if len(clean) != len(x):
                raise ValueError(
                    f"{type(self).__name__} needs a row for each input; got {len(clean)} rows of {len(x)} inputs."
                )
            ball = PerturbationBall(type(self).__name__, x, clean, eps=self.eps, bounds=self.bounds)
            attacked = self.attacked(ball, step, log_softmax(clean.student)).to(x.dtype)
        return self.terms(step, attacked)

    @abstractmethod
    def attacked(self, ball: PerturbationBall, step: Step, clean: Tensor) -> Tensor:
        """Return the adversarial inputs; ``clean`` are the log-probabilities of the clean inputs."""

    @abstractmethod
    def terms(self, step: Step, attacked: Tensor) -> Mapping[str, Tensor]:
        """Fill ``step.rows`` and return the terms of these rows."""

    @classmethod
    def example(cls) -> Self:
        return cls(bounds=None)  # pyright: ignore[reportCallIssue]


class PGDAT(_Adversarial):
    """PGD adversarial training: hard * cross entropy on inputs perturbed by PGD; the clean inputs are not used.

    Inputs are pixels, normalized inside the model (``models.Normalized``). A step costs ``attack_steps`` + 1 steps of
    standard training.

    Args:
        hard: weight of the cross entropy.
        eps: radius of the l-infinity ball, in units of the inputs.
        attack_steps: number of PGD steps, from a random start.
        step_size: of PGD; None: 2 eps / attack_steps. Madry et al. use 7 steps of 2/255.
        bounds: range of the inputs, clean and perturbed; None: unbounded.

    The model is attacked in eval mode, as in TRADES; Madry et al. attack it in training mode, in which every step of
    the attack updates the statistics of batch norm.

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv:1706.06083.
    """

    paper = "arXiv:1706.06083"

    def __init__(
        self,
        *,
        hard: NonNegative = 1.0,
        eps: float = 8 / 255,
        attack_steps: int = 7,
        step_size: float | None = None,
        bounds: Sequence[float] | None = (0.0, 1.0),
    ) -> None:
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
    """TRADES: hard * cross entropy on clean inputs + robust * KL(prediction on clean inputs || prediction on perturbed
    inputs).

    Inputs are pixels, normalized inside the model (``models.Normalized``). Both predictions carry a gradient. Only the
    first term needs labels. A step costs ``attack_steps`` + 2 steps of standard training.

    Args:
        hard: weight of the cross entropy.
        robust: weight of the divergence; the paper's 1 / lambda, 6 in its tables.
        eps: radius of the l-infinity ball, in units of the inputs.
        attack_steps: number of PGD steps on the divergence, from a random point near the input, where the gradient is
            not 0 as it is at the input.
        step_size: of PGD; None: 2 eps / attack_steps. The released code uses 10 steps of 0.007 at eps 0.031.
        bounds: range of the inputs, clean and perturbed; None: unbounded.

    Reference: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
    arXiv:1901.08573, equation 5.
    """

    paper = "arXiv:1901.08573"

    def __init__(
        self,
        *,
        hard: NonNegative = 1.0,
        robust: TermWeight = 6.0,
        eps: float = 8 / 255,
        attack_steps: int = 10,
        step_size: float | None = None,
        bounds: Sequence[float] | None = (0.0, 1.0),
    ) -> None:
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
        robust = divergence(log_softmax(rows.student), log_softmax(worst))
        return {"hard": self.hard * cross_entropy(rows), "robust": self.robust * robust}
