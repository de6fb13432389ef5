"""Metrics that TRL's SFTTrainer logs, computed from the rows of a distillation step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.integrations.common import Forward
from tempering.rows import is_labeled, upcast_to_float32

CHUNK = 1024  # rows whose log-probabilities are in memory at once


@torch.no_grad()
def record_sft_metrics(trainer: Any, inputs: Any, out: Forward, *, training: bool) -> None:
    """Add entropy, mean_token_accuracy and num_tokens of a batch to an SFTTrainer's metrics, as its own loss does.

    Other trainers have none of them and are left alone.
    """
    metrics = getattr(trainer, "_metrics", None)
    if not isinstance(metrics, dict) or not hasattr(trainer, "_total_train_tokens"):
        return
    mode, reduce = "train" if training else "eval", trainer.accelerator.reduce
    rows = trainer.task.scored_rows(out.student, None, inputs)[0]
    kept = is_labeled(rows.target).nonzero().flatten()
    parts = [(z, y) for i in kept.split(CHUNK) for z, y in [(upcast_to_float32(rows.student[i]), rows.target[i])]]
    entropy = torch.stack([_entropy(z) for z, _ in parts]).sum() if parts else rows.student.new_zeros(())
    hits = sum((z.argmax(-1) == y).sum() for z, y in parts)
    mask = inputs.get("attention_mask")
    tokens = kept.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
    sums = reduce(
        torch.stack([entropy.float(), torch.as_tensor(hits).to(entropy).float(), kept.new_tensor(len(kept)).float()])
    )
    entropy_sum, hit_sum, count = sums.tolist()
    if count:  # generated tokens have no labels
        metrics[mode]["entropy"].append(entropy_sum / count)
        metrics[mode]["mean_token_accuracy"].append(hit_sum / count)
    if training:
        trainer._total_train_tokens += int(reduce(tokens))
    metrics[mode]["num_tokens"] = [trainer._total_train_tokens]
    if getattr(trainer, "aux_loss_enabled", False) and isinstance(out.student.get("aux_loss"), Tensor):
        metrics[mode]["aux_loss"].append(float(reduce(out.student["aux_loss"].detach(), reduction="mean")))


def _entropy(logits: Tensor) -> Tensor:
    """Return the sum of the rows' entropies in nats, ()."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum()
