"""Update adaptive temperature policies after each step; their reward is the decrease of each row's loss."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rows import IGNORE_INDEX, class_labels, is_labeled
from tempering.tasks.base import Task
from tempering.temperature.base import AdaptivePolicy
from tempering.utils.tensors import eval_mode


@contextmanager
def adapting(policies: Sequence[AdaptivePolicy], model: nn.Module, task: Task, batch: Any) -> Generator[None]:
    """Context of the optimizer's step; at its end, the policies are updated by the batch."""
    before = after = None
    if any(policy.needs_reward for policy in policies):
        inputs, _, _ = task.inputs(batch)  # once: an augmentation is drawn at every call
        before = row_losses(model, task, inputs, batch)
        yield
        after = row_losses(model, task, inputs, batch)
    else:
        yield
    with torch.no_grad():
        reward = None if before is None or after is None else before - after
        for policy in policies:
            policy.update(reward if policy.needs_reward else None)


@torch.no_grad()
def row_losses(model: nn.Module, task: Task, inputs: Any, batch: Any) -> Tensor | None:
    """Return the student's cross entropy in eval mode on each row of the last block, (N,); None without labels."""
    with eval_mode(model):
        rows = task.rows(model(inputs), None, batch)[-1]
    if rows.target is None:
        return None
    target = class_labels(rows.target)
    target = target.masked_fill(~is_labeled(target), IGNORE_INDEX)
    return nn.functional.cross_entropy(rows.student.float(), target, reduction="none", ignore_index=IGNORE_INDEX)
