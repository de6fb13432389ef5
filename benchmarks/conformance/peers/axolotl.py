"""Axolotl: losses of its plugin for distillation from stored top-k log-probabilities."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from peers import Library, file_of
from tempering.conformance import Promises

LIBRARY = Library("axolotl", "0.19.0", needs=("liger-kernel==0.8.5",))


def lists(student: Any, values: Any, indices: Any, labels: Any = None) -> Any:
    """One sequence with a renormalized list, as its data set holds it; the entries of ignored rows are masked."""
    mask = torch.ones_like(indices, dtype=torch.bool)[None]
    if labels is not None:
        mask &= (labels != -100)[None, :, None]
    return student[None], indices[None], values.log_softmax(-1)[None], mask


def register(name: str, chunked: bool) -> None:
    @LIBRARY.loss(
        f"integrations.kd.topk_logprob.forward_kl.{name}",
        kind="top_k",
        promises=Promises(definition="kl", reduction="mean", ignored_rows=True),
        documented="Top-k forward KL; the teacher's log-probabilities should be re-normalized; a mask of valid tokens; "
        "without a number of items it is an average over valid tokens.",
    )
    def make() -> Any:
        module = file_of("axolotl", "integrations/kd/topk_logprob/forward_kl.py")
        loss = module.ChunkedTopKKDLoss(num_output_chunks=2) if chunked else module.loss
        return lambda student, values, indices, labels: loss(*lists(student, values, indices, labels))


register("loss", False)
register("ChunkedTopKKDLoss", True)


def fused(beta: float, definition: str, normalize: bool) -> None:
    @LIBRARY.loss(
        f"integrations.kd.kernels.liger.LigerFusedLinearKLTopKLogprobLoss, weight_hard_loss=0, weight_soft_loss=1, "
        f"beta={beta:g}, normalize_topk={normalize}",
        kind="top_k",
        promises=Promises(
            definition=definition,
            temperature_squared=True,
            reduction="sum",
            tail="renormalized" if definition == "kl" else None,
            identifies_teacher=False,
        ),
        documented="KL (beta 0), reverse KL (1) or JSD between the teacher's top-k list and the student's, summed over "
        "a packed sequence and scaled by T^2; the list holds log-probabilities at T.",
    )
    def make() -> Any:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.kd"):
            sys.modules.setdefault(name, ModuleType(name))
        sys.modules["axolotl.integrations.kd.utils"] = file_of("axolotl", "integrations/kd/utils.py")
        made = file_of("axolotl", "integrations/kd/kernels/liger.py").LigerFusedLinearKLTopKLogprobLoss

        def loss(student: Any, values: Any, indices: Any, temperature: float = 1.0) -> Any:
            fused = made(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                temperature=temperature,
                beta=beta,
                compiled=False,
                compute_ce_loss=False,
                normalize_topk=normalize,
            )
            _, ids, logs, mask = lists(student, values / temperature, indices)
            if not normalize:
                logs = values[None]
            head = torch.eye(student.shape[-1], dtype=student.dtype)
            labels = torch.zeros(1, len(student), dtype=torch.long)
            return fused(head, student[None], ids, logs, mask, labels)

        return loss


fused(0.0, "kl", True)
fused(0.5, "jsd", True)
fused(1.0, "reverse_kl", True)
