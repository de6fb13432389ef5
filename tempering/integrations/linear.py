"""Losses of language models from hidden states, in training: the logits of all tokens are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tempering.integrations.common import Forward
from tempering.kernels.linear import linear_loss
from tempering.methods.base import BlockLoss, Method
from tempering.rows import Rows
from tempering.tasks.base import Task
from tempering.tasks.language_modeling import LanguageModeling
from tempering.teachers.base import Teacher
from tempering.teachers.cache.hidden import head_of
from tempering.teachers.outputs import Head, Hidden

TOLERANCE = 1e-2  # of logits computed by the head, relative to the largest, for half precision


class HiddenForward:
    """Run both models up to their heads and compute the loss by ``kernels.linear_loss``.

    Args:
        student: a language model of transformers.

    Raises:
        TypeError: for a task or a model without a head over tokens.
        ValueError: for a task that compares features.
    """

    def __init__(self, method: Method, task: Task, student: nn.Module) -> None:
        if not isinstance(task, LanguageModeling):
            raise TypeError(
                f"linear=True computes the logits of tokens from hidden states; the task is {type(task).__name__}. Use "
                "tasks.LanguageModeling() or tasks.Seq2Seq(), or linear=False."
            )
        if task.features:
            raise ValueError("linear=True makes rows without features. Use linear=False for feature methods.")
        head_of(student)
        self.method, self.task, self.student = method, task, student
        self.checked: set[nn.Module] = set()

    def losses(
        self,
        batch: Any,
        run: Callable[[Any], Any],
        teacher: Teacher | None,
        progress: float,
        normalizer: Mapping[str, Tensor | float],
    ) -> tuple[Forward, list[BlockLoss]]:
        """Return the outputs, whose logits are those of first tokens only, and the loss of the batch's rows.

        Args:
            run: the student's forward, through any wrappers.
            normalizer: block name -> total weight of its rows in the step; {}: this batch is the step.

        Raises:
            TypeError: for a teacher without hidden states, or logits that its head does not compute.
        """
        inputs, teacher_inputs, ids = self.task.inputs(batch)
        index, shape, fields = self.task.row_fields(batch)
        with _up_to_head(self.student) as captured:
            output = run(inputs)
        hidden, head = self._states(self.student, output, captured, index)
        teacher_hidden, teacher_head = hidden.detach(), head
        if teacher is not None and teacher.parts:
            raise TypeError(
                f"linear=True needs the hidden states of one teacher; {type(teacher).__name__} combines the logits of "
                f"{len(teacher.parts)}. Use linear=False."
            )
        if teacher is not None:
            with _up_to_head(teacher.model) as captured:
                teacher_output = teacher(teacher_inputs, ids)
            index, shape = self.task.teacher_index(batch, index, shape)
            if isinstance(teacher_output, Hidden):
                teacher_hidden, teacher_head = teacher_output.rows(index, shape), teacher_output.head
            elif teacher.model is None:
                raise TypeError(
                    "linear=True needs a teacher with hidden states, a live model or teachers.CachedHidden; got "
                    f"{type(teacher).__name__}."
                )
            else:
                teacher_hidden, teacher_head = self._states(teacher.model, teacher_output, captured, index)
        sizes = [len(head.weight), len(teacher_head.weight), self.task.vocabulary or len(head.weight)]
        options = {"progress": progress, "normalizer": normalizer.get("logits"), "classes": min(sizes)}
        loss, terms, path = linear_loss(self.method, hidden, head, teacher_hidden, teacher_head, **fields, **options)
        no_logits = hidden.detach()[:, :1].float()
        rows = Rows(no_logits, no_logits, fields["target"], fields["weight"])
        return Forward(output, None, [rows]), [BlockLoss(rows, loss, terms, path)]

    def _states(self, model: nn.Module, output: Any, captured: list[Tensor], index: Tensor) -> tuple[Tensor, Head]:
        """Return the hidden states of rows, (N, H), and the head, checked once to compute the model's logits."""
        head, states = head_of(model), captured[-1]
        if model not in self.checked:
            with torch.no_grad():
                got, want = head(states[:, :1]), output["logits"].to(torch.float32)
            if got.shape != want.shape or not bool((got - want).abs().max() <= TOLERANCE * want.abs().max()):
                raise TypeError(
                    f"the logits of {type(model).__name__} are not those of its output embeddings alone, so no loss "
                    "can be computed from hidden states. Use linear=False."
                )
            self.checked.add(model)
        return states.flatten(0, 1).index_select(0, index).to(head.weight.dtype), head


@contextmanager
def _up_to_head(model: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the inputs of the model's head, (B, L, H), which computes the logits of the first token only."""
    captured: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0])
        return (args[0][:, :1],)

    hook = None if model is None else _output_layer(model).register_forward_pre_hook(keep)
    try:
        yield captured
    finally:
        if hook is not None:
            hook.remove()


def _output_layer(model: nn.Module) -> nn.Module:
    """Return the head of a language model of transformers, in any wrappers."""
    layers = (m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings"))  # pyright: ignore
    return next(layer for layer in layers if isinstance(layer, nn.Linear))
