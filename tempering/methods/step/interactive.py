"""Interactive KD: the teacher learns from what its student would make of a lesson, then gives the lesson."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, check_policy, check_weights, only_block
from tempering.methods.step._exams import HoldoutLoader
from tempering.methods.step._rehearsal import VirtualStep, split_step
from tempering.objectives import cross_entropy, kl, log_softmax, tempered
from tempering.rows import Rows, total
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.static import Static
from tempering.utils.search_space import Weight


class Interactive(StepMethod):
    """An exam step, by which the teacher learns, and then the course step: soft * KD's divergence + hard * CE.

    The exam rehearses the course on a part of the batch: one plain step of ``course_lr`` from the student's weights.
    The other part examines the weights so found by their cross entropy, and the teacher steps down the gradient of that
    in its own weights. Of the rehearsal nothing stays; the course proper is the engine's own step on the whole batch,
    or with samples ``held`` out on those that are not, with the new teacher. The paper says that both steps alternate;
    how is not known, and this is MetaDistil's way (arXiv:2106.04570), as the defaults of ``teacher_lr`` and ``clip``
    are its.

    The teacher's part of the course's gradient is linear in its softened probabilities p. So with v the exam's gradient
    in the rehearsed weights, dz the rate at which the student's logits move along v, and J = dz / T_s, it is exactly

        d exam / d teacher = course_lr * soft * d/d teacher  mean over rows of T_s T_t  sum over classes of p J

    without a graph of a graph. Temperatures are held still in it. The teacher stays in eval mode: no dropout, and its
    statistics do not move. It ends trained in place, and its weights and its optimizer (Adam) lie in the checkpoints.
    One process, one batch a step.

    Args:
        soft, hard: weights of the course's terms.
        temperature: any policy; None is Static(4.0).
        supervised: weight of the teacher's own cross entropy with the labels of the rehearsed part. 0: feedback alone.
            The feedback is multiplied by course_lr, so that a small weight here is a large one.
        teacher_lr: of the teacher's Adam.
        course_lr: of the rehearsed step; the student's own learning rate is the natural choice.
        exam_share: of the batch's samples, the last ones, that examine; a batch of one sample holds no exam.
        held: training samples that are held out for exams alone: the student never learns them, and every batch is
            widened by as many of them as make ``exam_share`` of it. 0 examines by a part of the batch, which is learned
            as well.
        every: steps from exam to exam.
        clip: largest norm of the teacher's gradient.
        derivative: "exact" takes dz in forward mode; "difference" from two more forward passes, as fast attention
            kernels without a forward mode need it.
        layers: names, or beginnings of names, of the teacher's parameters that learn; () for all.

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
        soft: Annotated[float, Weight()] = 0.9,
        hard: float = 0.1,
        temperature: Policy | None = None,
        supervised: Annotated[float, Weight()] = 0.0,
        teacher_lr: float = 1e-5,
        course_lr: float = 0.05,
        exam_share: float = 0.5,
        held: int = 0,
        every: int = 1,
        clip: float = 1.0,
        derivative: Literal["exact", "difference"] = "exact",
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_weights("Interactive", soft=soft, hard=hard, supervised=supervised)
        for name, value in {"teacher_lr": teacher_lr, "course_lr": course_lr, "clip": clip}.items():
            if not 0.0 < value < float("inf"):
                raise ValueError(f"Interactive needs {name} > 0 and finite; got {value!r}.")
        if not 0.0 < exam_share < 1.0:
            raise ValueError(f"Interactive needs exam_share in (0, 1), the share of a batch; got {exam_share!r}.")
        if held < 0:
            raise ValueError(f"Interactive needs held >= 0, samples held out for exams; got {held!r}.")
        if every < 1:
            raise ValueError(f"Interactive needs every >= 1, steps from exam to exam; got {every!r}.")
        if derivative not in ("exact", "difference"):
            raise ValueError(f"Interactive needs derivative 'exact' or 'difference'; got {derivative!r}.")
        self.soft, self.hard, self.supervised = soft, hard, supervised
        self.temperature = check_policy("Interactive", Static(4.0) if temperature is None else temperature)
        self.teacher_lr, self.course_lr, self.clip = teacher_lr, course_lr, clip
        self.exam_share, self.held, self.every = exam_share, held, every
        self.derivative, self.layers = derivative, tuple(layers)
        self.steps = 0
        self._met: tuple[nn.Module, torch.optim.Optimizer, list[nn.Parameter]] | None = None

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Take the teacher's module on, with a fresh optimizer.

        Raises:
            ValueError: for a teacher without parameters of the names in ``layers``, or in half precision.
        """
        named = {} if teacher is None else dict(teacher.named_parameters())
        learning = {n: p for n, p in named.items() if not self.layers or n.startswith(self.layers)}
        if teacher is None or not learning:
            raise ValueError(
                f"Interactive finds nothing in the teacher that could learn: layers={self.layers!r} of parameters "
                f"{', '.join(list(named)[:5]) or 'none'}. Give a live model, and names that it has."
            )
        if half := [n for n, p in learning.items() if p.dtype in (torch.float16, torch.bfloat16)]:
            raise ValueError(
                f"Interactive trains the teacher, whose {half[0]} is {named[half[0]].dtype}: small steps are lost. "
                "Give teachers.Live(model) without precision=; in recipes, --teacher-precision fp32."
            )
        parameters = list(learning.values())
        self._met, self.steps = (teacher, torch.optim.Adam(parameters, lr=self.teacher_lr), parameters), 0

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """The training batches, widened by the held-out samples where there are some."""
        return HoldoutLoader(batches, held=self.held, share=self.exam_share) if self.held else batches

    def step(self, step: Step) -> Mapping[str, Tensor]:
        parts = split_step(step, self.exam_share)
        if parts is not None and self.steps % self.every == 0:
            self._exam(*parts)
        self.steps += 1
        lesson = step if parts is None or not self.held else parts[0]
        rows = only_block(lesson.forward())
        step.rows = lesson.rows
        return self._course(rows, self.temperature(rows, step.progress))

    def _course(self, rows: Rows, T: Temperatures) -> dict[str, Tensor]:
        return {"soft": self.soft * kl(rows, T), "hard": self.hard * cross_entropy(rows)}

    def _exam(self, course: Step, exam: Step) -> None:
        if self._met is None:
            raise RuntimeError(
                "Interactive has met no teacher: call method.bind_teacher(teacher.model) before the first step."
            )
        told, T = self.feedback(VirtualStep(course.student), course, exam)
        _, optimizer, parameters = self._met
        with _learning(parameters):
            loss = self.teacher_loss(course, told, T)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def feedback(self, rehearsal: VirtualStep, course: Step, exam: Step) -> tuple[Float[Tensor, "N C"], Temperatures]:
        """How fast the logits of the course's rows move along the exam's gradient, (N, C), and the temperatures."""
        rows = rehearsal.rows(course, rehearsal.weights)
        with torch.no_grad():
            taught = course.student_rows(course.teacher(course.teacher_inputs, course.ids)).student
        rows = rows.replace(teacher=taught.detach())
        T = self.temperature(rows.replace(student=rows.student.detach()), course.progress).detached()
        down = rehearsal.slope(total(self._course(rows, T), rows), rehearsal.weights)
        ahead = {n: (w - self.course_lr * down[n]).detach().requires_grad_() for n, w in rehearsal.weights.items()}
        tested = rehearsal.rows(exam, ahead)
        along = rehearsal.slope(total({"exam": cross_entropy(tested)}, tested), ahead)
        return rehearsal.along(course, along, exact=self.derivative == "exact"), T

    def teacher_loss(self, course: Step, told: Float[Tensor, "N C"], T: Temperatures) -> Float[Tensor, ""]:
        """What the teacher steps down, (): its gradient is that of the exam, and of the supervised term."""
        if course.teacher_with_grad is None:
            raise ValueError("Interactive needs a teacher with a gradient: teachers.Live(model).")
        taught = course.student_rows(course.teacher_with_grad(course.teacher_inputs, course.ids))
        p = log_softmax(tempered(taught.student, T.teacher)).exp()
        pull = self.course_lr * self.soft * T.scale.unsqueeze(-1) / T.student
        terms = {"feedback": (pull * p * told).sum(-1)}
        if self.supervised:
            terms["supervised"] = self.supervised * cross_entropy(taught)
        return total(terms, taught)

    def get_extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps}
        if self._met is not None:
            teacher, optimizer, _ = self._met
            state |= {"teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        if "teacher" in state:
            if self._met is None:
                raise RuntimeError(
                    "Interactive has met no teacher to load: call method.bind_teacher(teacher.model) first."
                )
            self._met[0].load_state_dict(state["teacher"])
            self._met[1].load_state_dict(state["optimizer"])


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these require grad for a moment; to all others the teacher is frozen."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
