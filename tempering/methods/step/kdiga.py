"""Input-gradient alignment: the student's loss is to slope as the teacher's does, at the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempering.methods.base import Step, StepMethod, check_policy, check_run_fraction, check_weights, linear_warmup
from tempering.methods.features.base import spread_out
from tempering.methods.step._attack import PerturbationBall, check_attack, check_bounds, eval_mode
from tempering.objectives import cross_entropy, kl
from tempering.rows import Rows, expand_to_rows, upcast_to_float32
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Weight


class KDIGA(StepMethod):
    """soft * KD's divergence + hard * CE + align * the l2 distance of both models' input gradients of their own CE.

    A row's gradient is that of its own loss in its own input (of all losses, where batch norm in training mode ties
    rows together). It is taken in what the models are given: normalize inside both models to align slopes in pixels.
    Gradients of the teacher's weights are not computed. It costs about twice a KD step.

    Attention of the student runs through torch's math kernel, since fused kernels have no second derivative. Inputs are
    one floating point tensor, with as many rows as the task makes.

    Args:
        soft, hard: weights of KD's terms; the code's alpha and 1 - alpha.
        align: weight of the distance. The code's gamma of 1000 at its batch of 128 is about 0.7 here.
        temperature: of the soft term, any policy; None is Static(1.0), as released.
        warmup: share of the run over which ``align`` rises linearly from 0. Our addition: a constant student has no
            slope, and a large weight from the first step finds it. 0 for none, as published.
        right: take the soft term and the distance only of rows on which the teacher is right; rows without a label are
            then left out.
        start: both models see the inputs moved at random by up to this much; 8/255 is the code's ``kdiga_rs``.
        attack: the soft term is taken where PGD of this strength makes the student worst, and the rest where it was;
            8/255 is the code's ``kdiga_ard``. 0 for none; it costs ``attack_steps`` + 1 steps more.
        attack_steps: of that attack, 2 attack / attack_steps each, from a random start, of the student in eval mode.
        bounds: of inputs that are moved, which have to come in them; None for none. Without ``start`` and ``attack``
            inputs may be anything.
        published: the released code's scales: the divergence is divided by the number of classes (torch's "mean"), and
            the distance is one norm over the batch, of gradients of the mean loss, divided by the number of rows. It
            falls with the batch size to the power 1.5.

    Reference: Shao et al., "How and When Adversarial Robustness Transfers in Knowledge Distillation?", 2021,
    arXiv:2110.12072. The weights, the form of the norm and the variants are the first author's code's; the paper's are
    not known.
    """

    paper = "arXiv:2110.12072"
    needs_labels = True
    needs_double_backward = True
    needs_live = True

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight()] = 0.5,
        hard: float = 0.5,
        align: Annotated[float, Weight()] = 1.0,
        temperature: Policy | None = None,
        warmup: Annotated[float, Fraction()] = 0.5,
        right: bool = False,
        start: float = 0.0,
        attack: float = 0.0,
        attack_steps: int = 10,
        bounds: Sequence[float] | None = (0.0, 1.0),
        published: bool = False,
    ) -> None:
        super().__init__()
        check_weights("KDIGA", soft=soft, hard=hard, align=align, start=start)
        check_run_fraction("KDIGA", warmup=warmup)
        check_attack("KDIGA", eps=attack, steps=attack_steps, size=None, bounds=bounds)
        self.soft, self.hard, self.align = soft, hard, align
        self.right, self.start, self.attack, self.attack_steps = right, start, attack, attack_steps
        self.bounds = None if bounds is None else tuple(bounds)
        self.warmup, self.published = warmup, published
        self.temperature = check_policy("KDIGA", Static(1.0) if temperature is None else temperature)
        self.relational = published  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, step: Step) -> Mapping[str, Tensor]:
        if step.teacher_with_grad is None:
            raise ValueError("KDIGA needs a teacher with a gradient: teachers.Live(model).")
        seen, shown = _leaf(step.student_inputs), _leaf(step.teacher_inputs)
        if seen.shape != shown.shape:
            raise ValueError(
                f"KDIGA compares gradients in one input; the student sees {tuple(seen.shape)} and the teacher "
                f"{tuple(shown.shape)}. Give both the same view."
            )
        if self.start:
            noise = self.start * (2 * torch.rand_like(upcast_to_float32(seen)) - 1)
            seen, shown = (self._moved(x, noise) for x in (seen, shown))
        taught = step.student_rows(step.teacher_with_grad(shown, step.ids))
        toward = _slope(taught, shown, further=False)
        with sdpa_kernel(SDPBackend.MATH):
            said = step.student_rows(step.student(seen))
        step.rows = rows = said.replace(teacher=taught.student.detach())
        if self.start:
            check_bounds("KDIGA", step.student_inputs, rows, self.bounds)
        gap = _slope(rows, seen, further=True) - toward
        softened = self._attacked(step, rows, seen, shown) if self.attack else rows
        soft = kl(softened, self.temperature(softened, step.progress))
        if self.right:
            right = rows.teacher.argmax(-1) == rows.target
            soft = torch.where(right, soft, 0.0)
            gap = torch.where(right.view(-1, *[1] * (gap.ndim - 1)), gap, 0.0)
        classes = rows.student.shape[1] if self.published else 1
        return {
            "soft": self.soft / classes * soft,
            "hard": self.hard * cross_entropy(rows),
            "align": self.align * linear_warmup(step.progress, self.warmup) * self._distance(gap, rows),
        }

    def _moved(self, x: Tensor, noise: Tensor) -> Tensor:
        moved = x.detach() + noise
        moved = moved if self.bounds is None else moved.clamp(*self.bounds)
        return moved.to(x.dtype).requires_grad_()

    def _attacked(self, step: Step, rows: Rows, seen: Tensor, shown: Tensor) -> Rows:
        """What both answer where the student is worst."""

        def losses(x: Tensor) -> Tensor:
            return cross_entropy(step.student_rows(step.student(x)))

        ball = PerturbationBall("KDIGA", seen, rows, eps=self.attack, bounds=self.bounds)
        with eval_mode(step.student):
            moved = ball.worst(losses, steps=self.attack_steps, size=None)
        also = (moved + (shown.detach() - seen.detach())).to(shown.dtype)
        taught = step.student_rows(step.teacher(also, step.ids))
        return step.student_rows(step.student(moved.to(seen.dtype))).replace(teacher=taught.student)

    def _distance(self, gap: Tensor, rows: Rows) -> Float[Tensor, " N"]:
        """How far apart the slopes of each row lie, (N,); 0 on rows of weight 0."""
        kept = gap.flatten(1) if rows.weight is None else gap.flatten(1)[rows.weight > 0]
        if not self.published:
            return spread_out(torch.linalg.vector_norm(kept, dim=1), rows)
        return expand_to_rows(torch.linalg.vector_norm(kept) / max(1, len(kept)) ** 2, rows)


def _leaf(inputs: Any) -> Tensor:
    """The inputs as a leaf to take the gradient in."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
        return inputs.detach().requires_grad_()
    got = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(
        f"KDIGA takes gradients in the inputs, so they are one floating point tensor (N, ...); got {got}. Tokens have "
        "no gradient; a mapping of images goes through a module that takes the images alone."
    )


def _slope(rows: Rows, inputs: Tensor, *, further: bool) -> Tensor:
    """The gradient of the rows' summed cross entropies in the inputs; ``further``: with a graph of its own."""
    if len(rows) != len(inputs):
        raise ValueError(f"KDIGA needs a row for each input; got {len(rows)} rows of {len(inputs)} inputs.")
    loss = cross_entropy(rows)
    if rows.weight is not None:
        loss = torch.where(rows.weight > 0, loss, 0.0)
    # the student's graph is gone through again by its loss
    return upcast_to_float32(torch.autograd.grad(loss.sum(), inputs, create_graph=further, retain_graph=further)[0])
