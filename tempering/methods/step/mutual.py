"""Deep mutual learning: two students in one step, each the teacher of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, fx, nn

from tempering.methods.base import Step, StepMethod, check_policy, only_block, zero_masked_rows
from tempering.objectives import cross_entropy, kl
from tempering.rows import Rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, TermWeight
from tempering.utils.tensors import map_tensors


class Mutual(StepMethod):
    """Deep mutual learning: soft * KL(peer || student) + hard * cross entropy, and the same of the peer, whose teacher
    is the student.

    The peer is the network given as the run's teacher, trained or not, and it is trained as the student is: both losses
    are added, and one step of the optimizer updates both. Each is constant in the other's loss. The step may be split
    into micro-batches and over processes. Checkpoints contain the peer, ``method.peer``; the report has its scores. In
    the paper the second network learns from the first one's outputs after its step, here from those before.

    The peer runs in training mode within the step and in float32 outside of autocast; modules that shall stay in eval
    mode in training, such as frozen normalization, do not.

    Args:
        soft, hard: weights of the terms, of both networks.
        temperature: a temperature policy, or a number for Static; None: Static(1.0), as published. It is computed for
            the student's rows, and again for the peer's with both sides exchanged.

    Raises:
        ValueError: for a run without a live teacher, or one whose weights are a fused copy or in half precision.

    Reference: Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384.
    """

    paper = "arXiv:1706.00384"
    needs_labels = True
    needs_live = True
    trains_teacher = True
    teacher_is_student = True

    def __init__(self, *, soft: TermWeight = 1.0, hard: NonNegative = 1.0, temperature: PolicyLike = None) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        self.temperature = check_policy("Mutual", temperature, default=1.0)
        self.peer: nn.Module | None = None

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Take the teacher's module as the peer, whose weights the optimizer trains."""
        parameters = [] if teacher is None else list(teacher.parameters())
        if teacher is None or not parameters:
            raise ValueError("Mutual needs a second network: give the model itself as teacher, teachers.Live(model).")
        if isinstance(teacher, fx.GraphModule) or any(p.element_size() < 4 for p in parameters):
            raise ValueError(
                "Mutual trains the teacher, which is a fused or a half-precision copy. Give teachers.Live(model) "
                "without precision= and fuse_conv_bn=; in recipes, --teacher-precision fp32 --no-fuse-bn."
            )
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        self.peer = teacher

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the policies; the peer is in training mode within a step only."""
        super().train(mode)
        if self.peer is not None:
            self.peer.eval()
        return self

    def step(self, step: Step) -> Mapping[str, Tensor]:
        peer = self.peer
        if peer is None:
            raise RuntimeError("Mutual has no peer: call method.bind_teacher(teacher.model) before the first step.")
        rows = step.rows = only_block(step.make_rows(step.student(step.student_inputs), None, step.batch))
        dtype = next(p.dtype for p in peer.parameters())
        inputs = map_tensors(step.teacher_inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)
        peer.train()
        try:
            other = step.student_rows(peer(inputs))
        finally:
            peer.eval()
        rows = step.rows = rows.replace(teacher=other.student.detach())
        other = other.replace(teacher=rows.student.detach())
        return {
            **self._terms(rows, step.progress),
            **{f"peer_{n}": x for n, x in self._terms(other, step.progress).items()},
        }

    def _terms(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rows = zero_masked_rows(rows)
        with torch.autocast(rows.student.device.type, enabled=False):
            terms = {"soft": self.soft * kl(rows, self.temperature(rows, progress))}
            return terms | ({"hard": self.hard * cross_entropy(rows)} if self.hard else {})
