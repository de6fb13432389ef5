"""Interactive KD: train the teacher on the student's loss after a virtual step, then train the student."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, check_policy, only_block
from tempering.methods.step._holdout import HoldoutLoader
from tempering.methods.step._virtual_step import VirtualStep, split_step
from tempering.objectives import cross_entropy, kl, log_softmax, tempered
from tempering.rows import Rows, total
from tempering.temperature.base import PolicyLike, Temperatures
from tempering.utils.search_space import NonNegative, TermWeight


class Interactive(StepMethod):
    """Interactive KD: an exam step that trains the teacher, then a course step of the student with soft * KL divergence
    + hard * cross entropy.

    The exam takes a virtual step of the course on one part of the batch: one SGD step with learning rate ``virtual_lr``
    from the student's weights. The cross entropy at the new weights on the other part is the exam loss, and the teacher
    takes an optimizer step on the gradient of the exam loss with respect to its weights. The virtual step is then
    discarded; the course is the trainer's step on the whole batch, or with ``holdout`` samples on the others, with the
    new teacher. In the paper both steps alternate; the details are not known, so this follows MetaDistil
    (arXiv:2106.04570), including the defaults of ``teacher_lr`` and ``clip``.

    The teacher's part of the course's gradient is linear in its softened probabilities p. So with v the exam's gradient
    at the virtual weights, dz the derivative of the student's logits along v, and J = dz / T_s, exactly

        d exam / d teacher = virtual_lr * soft * d/d teacher  mean over rows of T_s T_t  sum over classes of p J

    without differentiating through the virtual step. Temperatures are constant in it. The teacher stays in eval mode,
    without dropout and with fixed statistics. It is trained in place, and checkpoints contain its weights and its
    optimizer (Adam). Requires one process and one batch per step.

    Args:
        soft, hard: weights of the course's terms.
        temperature: a temperature policy, or a number for Static; None: Static(4.0).
        supervised: weight of the teacher's own cross entropy on the course part of the batch; 0: feedback only. The
            feedback is multiplied by virtual_lr, so even a small weight dominates it.
        teacher_lr: learning rate of the teacher's Adam.
        virtual_lr: learning rate of the virtual step, usually the student's learning rate.
        exam_fraction: fraction of the batch's samples, the last ones, used for the exam; a batch of one has none.
        holdout: number of training samples held out for exams: the student is not trained on them, and every batch is
            extended by as many as make up ``exam_fraction``. 0: the exam uses a part of the batch, which the student
            is also trained on.
        every: number of steps between exams.
        clip: maximum norm of the teacher's gradient.
        derivative: "exact" computes dz in forward mode; "difference" by two more forward passes, for attention kernels
            without forward mode.
        layers: names, or prefixes of names, of the teacher's parameters to train; () for all.

    All defaults are our choice: the paper's values are not known.

    Reference: Liu et al., "Learning to Teach with Student Feedback", 2021, arXiv:2109.04641.
    """

    paper = "arXiv:2109.04641"
    needs_labels = True
    needs_double_backward = True
    needs_live = True
    trains_teacher = True

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        temperature: PolicyLike = None,
        supervised: TermWeight = 0.0,
        teacher_lr: float = 1e-5,
        virtual_lr: float = 0.05,
        exam_fraction: float = 0.5,
        holdout: int = 0,
        every: int = 1,
        clip: float = 1.0,
        derivative: Literal["exact", "difference"] = "exact",
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value in {"teacher_lr": teacher_lr, "virtual_lr": virtual_lr, "clip": clip}.items():
            if not 0.0 < value < float("inf"):
                raise ValueError(f"Interactive needs {name} > 0 and finite; got {value!r}.")
        if not 0.0 < exam_fraction < 1.0:
            raise ValueError(f"Interactive needs exam_fraction in (0, 1), the share of a batch; got {exam_fraction!r}.")
        if holdout < 0:
            raise ValueError(f"Interactive needs holdout >= 0, samples held out for exams; got {holdout!r}.")
        if every < 1:
            raise ValueError(f"Interactive needs every >= 1, steps from exam to exam; got {every!r}.")
        if derivative not in ("exact", "difference"):
            raise ValueError(f"Interactive needs derivative 'exact' or 'difference'; got {derivative!r}.")
        self.soft, self.hard, self.supervised = soft, hard, supervised
        self.temperature = check_policy("Interactive", temperature, default=4.0)
        self.teacher_lr, self.virtual_lr, self.clip = teacher_lr, virtual_lr, clip
        self.exam_fraction, self.holdout, self.every = exam_fraction, holdout, every
        self.derivative, self.layers = derivative, tuple(layers)
        self.steps = 0
        self._teacher: tuple[nn.Module, torch.optim.Optimizer, list[nn.Parameter]] | None = None

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Set the teacher's module, and create its optimizer.

        Raises:
            ValueError: for a teacher without parameters of the names in ``layers``, or in half precision.
        """
        named = {} if teacher is None else dict(teacher.named_parameters())
        trained = {n: p for n, p in named.items() if not self.layers or n.startswith(self.layers)}
        if teacher is None or not trained:
            raise ValueError(
                f"Interactive finds no parameters of the teacher to train: layers={self.layers!r} of parameters "
                f"{', '.join(list(named)[:5]) or 'none'}. Give a live model, and names of its parameters."
            )
        if half := [n for n, p in trained.items() if p.dtype in (torch.float16, torch.bfloat16)]:
            raise ValueError(
                f"Interactive trains the teacher, whose {half[0]} is {named[half[0]].dtype}: small updates are lost. "
                "Give teachers.Live(model) without precision=; in recipes, --teacher-precision fp32."
            )
        parameters = list(trained.values())
        self._teacher, self.steps = (teacher, torch.optim.Adam(parameters, lr=self.teacher_lr), parameters), 0

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """Return the training batches, extended by held-out samples if ``holdout`` > 0."""
        return HoldoutLoader(batches, holdout=self.holdout, fraction=self.exam_fraction) if self.holdout else batches

    def step(self, step: Step) -> Mapping[str, Tensor]:
        parts = split_step(step, self.exam_fraction)
        if parts is not None and self.steps % self.every == 0:
            self._exam(*parts)
        self.steps += 1
        lesson = step if parts is None or not self.holdout else parts[0]
        rows = only_block(lesson.forward())
        step.rows = lesson.rows
        return self._course(rows, self.temperature(rows, step.progress))

    def _course(self, rows: Rows, T: Temperatures) -> dict[str, Tensor]:
        return {"soft": self.soft * kl(rows, T), "hard": self.hard * cross_entropy(rows)}

    def _exam(self, course: Step, exam: Step) -> None:
        if self._teacher is None:
            raise RuntimeError(
                "Interactive has no teacher: call method.bind_teacher(teacher.model) before the first step."
            )
        derivative, T = self.feedback(VirtualStep(course.student), course, exam)
        _, optimizer, parameters = self._teacher
        with _trainable(parameters):
            loss = self.teacher_loss(course, derivative, T)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def feedback(self, virtual: VirtualStep, course: Step, exam: Step) -> tuple[Float[Tensor, "N C"], Temperatures]:
        """Return the derivative of the course's logits along the exam's gradient, (N, C), and the temperatures."""
        rows = virtual.rows(course, virtual.weights)
        with torch.no_grad():
            teacher_logits = course.student_rows(course.teacher(course.teacher_inputs, course.ids)).student
        rows = rows.replace(teacher=teacher_logits.detach())
        T = self.temperature(rows.replace(student=rows.student.detach()), course.progress).detached()
        gradient = virtual.gradient(total(self._course(rows, T), rows), virtual.weights)
        weights = {n: (w - self.virtual_lr * gradient[n]).detach().requires_grad_() for n, w in virtual.weights.items()}
        exam_rows = virtual.rows(exam, weights)
        direction = virtual.gradient(total({"exam": cross_entropy(exam_rows)}, exam_rows), weights)
        return virtual.along(course, direction, exact=self.derivative == "exact"), T

    def teacher_loss(self, course: Step, derivative: Float[Tensor, "N C"], T: Temperatures) -> Float[Tensor, ""]:
        """Return the teacher's loss, (): its gradient is that of the exam and of the supervised term."""
        if course.teacher_with_grad is None:
            raise ValueError("Interactive needs a teacher with a gradient: teachers.Live(model).")
        rows = course.student_rows(course.teacher_with_grad(course.teacher_inputs, course.ids))
        p = log_softmax(tempered(rows.student, T.teacher)).exp()
        factor = self.virtual_lr * self.soft * T.scale.unsqueeze(-1) / T.student
        terms = {"feedback": (factor * p * derivative).sum(-1)}
        if self.supervised:
            terms["supervised"] = self.supervised * cross_entropy(rows)
        return total(terms, rows)

    def get_extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps}
        if self._teacher is not None:
            teacher, optimizer, _ = self._teacher
            state |= {"teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        if "teacher" in state:
            if self._teacher is None:
                raise RuntimeError("Interactive has no teacher to load: call method.bind_teacher(teacher.model) first.")
            self._teacher[0].load_state_dict(state["teacher"])
            self._teacher[1].load_state_dict(state["optimizer"])


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Generator[None, None, None]:
    """Context manager in which these parameters require grad; outside it the teacher is frozen."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
