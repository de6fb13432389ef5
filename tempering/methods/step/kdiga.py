"""KD with input gradient alignment: match the input gradients of the student's and the teacher's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempering.methods.base import Step, StepMethod, check_policy, linear_warmup
from tempering.methods.features.base import spread_out
from tempering.methods.step._attack import PerturbationBall, check_attack, check_bounds
from tempering.objectives import cross_entropy, kl
from tempering.rows import Rows, class_labels, expand_to_rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight
from tempering.utils.tensors import eval_mode


class KDIGA(StepMethod):
    """KD with input gradient alignment: soft * KL divergence + hard * cross entropy + align * l2 distance of the input
    gradients of the two models' cross entropies.

    A row's gradient is that of its own loss with respect to its own input (of all losses, if batch norm in training
    mode couples rows). It is computed for the models' inputs: normalize inside both models to align gradients in
    pixels. Gradients of the teacher's weights are not computed. A step costs about twice a KD step.

    The student's attention uses torch's math kernel, since fused kernels have no second derivative. Inputs are one
    floating point tensor with one row per input.

    Args:
        soft, hard: weights of the KD terms; the code's alpha and 1 - alpha.
        align: weight of the distance. The code's gamma of 1000 at its batch of 128 is about 0.7 here.
        temperature: a temperature policy for the soft term; None: Static(1.0), as released.
        warmup: fraction of the run over which ``align`` rises linearly from 0; published: none (0). Our addition, since
            a large weight from the first step leads to a constant student, whose input gradient is 0.
        right: use the soft term and the distance only for rows that the teacher classifies correctly, so not for rows
            without a label.
        start: maximum random perturbation of both models' inputs; 8/255 is the code's ``kdiga_rs``.
        attack: strength of a PGD attack on the student; the soft term is computed on the attacked inputs, the others on
            the original ones. 8/255 is the code's ``kdiga_ard``; 0: no attack. It costs ``attack_steps`` + 1 steps
            more.
        attack_steps: number of steps of the attack, each of size 2 attack / attack_steps, from a random start, with the
            student in eval mode.
        bounds: range of the inputs, original and perturbed; None: unbounded. Ignored without ``start`` and ``attack``.
        published: use the released code's scales: the divergence is divided by the number of classes (torch's "mean"),
            and the distance is one norm over the batch of gradients of the mean loss, divided by the number of rows. It
            falls with the batch size to the power 1.5.

    Reference: Shao et al., "How and When Adversarial Robustness Transfers in Knowledge Distillation?", 2021,
    arXiv:2110.12072. The weights, the form of the norm and the variants are those of the first author's code; the
    paper's are not known.
    """

    paper = "arXiv:2110.12072"
    needs_labels = True
    needs_double_backward = True
    needs_live = True

    def __init__(
        self,
        *,
        soft: TermWeight = 0.5,
        hard: NonNegative = 0.5,
        align: TermWeight = 1.0,
        temperature: PolicyLike = None,
        warmup: RunFraction = 0.5,
        right: bool = False,
        start: NonNegative = 0.0,
        attack: float = 0.0,
        attack_steps: int = 10,
        bounds: Sequence[float] | None = (0.0, 1.0),
        published: bool = False,
    ) -> None:
        super().__init__()
        check_attack("KDIGA", eps=attack, steps=attack_steps, size=None, bounds=bounds)
        self.soft, self.hard, self.align = soft, hard, align
        self.right, self.start, self.attack, self.attack_steps = right, start, attack, attack_steps
        self.bounds = None if bounds is None else tuple(bounds)
        self.warmup, self.published = warmup, published
        self.temperature = check_policy("KDIGA", temperature, default=1.0)
        self.relational = published  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, step: Step) -> Mapping[str, Tensor]:
        if step.teacher_with_grad is None:
            raise ValueError("KDIGA needs a teacher with a gradient: teachers.Live(model).")
        x_s, x_t = _leaf(step.student_inputs), _leaf(step.teacher_inputs)
        if x_s.shape != x_t.shape:
            raise ValueError(
                f"KDIGA compares gradients of one input; the student gets {tuple(x_s.shape)} and the teacher "
                f"{tuple(x_t.shape)}. Give both the same view."
            )
        if self.start:
            noise = self.start * (2 * torch.rand_like(upcast_to_float32(x_s)) - 1)
            x_s, x_t = (self._perturb(x, noise) for x in (x_s, x_t))
        teacher_rows = step.student_rows(step.teacher_with_grad(x_t, step.ids))
        teacher_gradient = _input_gradient(teacher_rows, x_t, create_graph=False)
        with sdpa_kernel(SDPBackend.MATH):
            student_rows = step.student_rows(step.student(x_s))
        step.rows = rows = student_rows.replace(teacher=teacher_rows.student.detach())
        if self.start:
            check_bounds("KDIGA", step.student_inputs, rows, self.bounds)
        gap = _input_gradient(rows, x_s, create_graph=True) - teacher_gradient
        soft_rows = self._attacked(step, rows, x_s, x_t) if self.attack else rows
        soft = kl(soft_rows, self.temperature(soft_rows, step.progress))
        if self.right:
            assert rows.target is not None
            right = rows.teacher.argmax(-1) == class_labels(rows.target)
            soft = torch.where(right, soft, 0.0)
            gap = torch.where(right.view(-1, *[1] * (gap.ndim - 1)), gap, 0.0)
        classes = rows.student.shape[1] if self.published else 1
        return {
            "soft": self.soft / classes * soft,
            "hard": self.hard * cross_entropy(rows),
            "align": self.align * linear_warmup(step.progress, self.warmup) * self._distance(gap, rows),
        }

    def _perturb(self, x: Tensor, noise: Tensor) -> Tensor:
        perturbed = x.detach() + noise
        perturbed = perturbed if self.bounds is None else perturbed.clamp(*self.bounds)
        return perturbed.to(x.dtype).requires_grad_()

    def _attacked(self, step: Step, rows: Rows, x_s: Tensor, x_t: Tensor) -> Rows:
        """Return the rows of both models on inputs attacked for the student."""

        def losses(x: Tensor) -> Tensor:
            return cross_entropy(step.student_rows(step.student(x)))

        ball = PerturbationBall("KDIGA", x_s, rows, eps=self.attack, bounds=self.bounds)
        with eval_mode(step.student):
            attacked = ball.worst(losses, steps=self.attack_steps, size=None)
        teacher_inputs = (attacked + (x_t.detach() - x_s.detach())).to(x_t.dtype)
        teacher_rows = step.student_rows(step.teacher(teacher_inputs, step.ids))
        return step.student_rows(step.student(attacked.to(x_s.dtype))).replace(teacher=teacher_rows.student)

    def _distance(self, gap: Tensor, rows: Rows) -> Float[Tensor, " N"]:
        """Return the distance of each row's input gradients, (N,); 0 on rows of weight 0."""
        kept = gap.flatten(1) if rows.weight is None else gap.flatten(1)[rows.weight > 0]
        if not self.published:
            norms = cast("Tensor", torch.linalg.vector_norm(kept, dim=1))  # pyright: ignore[reportUnknownMemberType]
            return spread_out(norms, rows)
        norm = cast("Tensor", torch.linalg.vector_norm(kept))  # pyright: ignore[reportUnknownMemberType]
        return expand_to_rows(norm / max(1, len(kept)) ** 2, rows)


def _leaf(inputs: Any) -> Tensor:
    """Return the inputs as a leaf tensor that requires grad."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
        return inputs.detach().requires_grad_()
    got = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(
        f"KDIGA needs gradients of the inputs, so one floating point tensor (N, ...); got {got}. Tokens have no "
        "gradient; for a mapping of images, wrap the models in a module that takes the images alone."
    )


def _input_gradient(rows: Rows, inputs: Tensor, *, create_graph: bool) -> Tensor:
    """Return the gradient of the sum of the rows' cross entropies with respect to the inputs."""
    if len(rows) != len(inputs):
        raise ValueError(f"KDIGA needs a row for each input; got {len(rows)} rows of {len(inputs)} inputs.")
    loss = cross_entropy(rows)
    if rows.weight is not None:
        loss = torch.where(rows.weight > 0, loss, 0.0)
    # the loss uses the student's graph again
    gradient = torch.autograd.grad(loss.sum(), inputs, create_graph=create_graph, retain_graph=create_graph)[0]
    return upcast_to_float32(gradient)
