"""Liger Kernel: fused linear losses that are plain torch, and Triton kernels under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import torch

from peers import Library, of_generalized_jsd
from tempering.conformance import Promises

LIBRARY = Library("liger-kernel", "0.8.5")


def head_of(student: Any) -> Any:
    return torch.eye(student.shape[-1], dtype=student.dtype)


def register(beta: float, definition: str) -> None:
    @LIBRARY.loss(
        f"chunked_loss.LigerFusedLinearJSDLoss, weight_hard_loss=0, weight_soft_loss=1, beta={beta:g}",
        kind="logits",
        promises=of_generalized_jsd(definition),
        documented="Generalized JSD from hidden states and heads, a mean over tokens that are not ignored; where the "
        "teacher's vocabulary is padded, the student's logits are padded to match.",
    )
    def make() -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def loss(student: Any, teacher: Any, labels: Any, temperature: float = 1.0, chunk_size: int = 1024) -> Any:
            fused = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                beta=beta,
                temperature=temperature,
                compiled=False,
                chunk_size=chunk_size,
            )
            return fused(student, head_of(student), teacher, head_of(teacher), labels)

        return loss


for beta, definition in {0.0: "kl", 0.5: "jsd", 0.1: "jsd(0.1)", 1.0: "reverse_kl"}.items():
    register(beta, definition)


def cosine_distance(student: Any, teacher: Any, temperature: float) -> Any:
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


@LIBRARY.loss(
    "chunked_loss.LigerFusedLinearCosineSimilarityLoss, weight_hard_loss=0, weight_soft_loss=1, beta=1",
    kind="logits",
    promises=Promises(
        definition=cosine_distance,
        divergence=True,
        identifies_teacher=False,
        reduction="mean",
        ignored_rows=True,
        padded_vocabulary=True,
    ),
    unsaid=("constant added to the logits", "temperature squared", "zero at agreement"),
)
def cosine() -> Any:
    """Cosine distance of the logits, a mean over tokens not ignored; of rows of zeros nothing is said."""
    from liger_kernel.chunked_loss.cosine_similarity_loss import LigerFusedLinearCosineSimilarityLoss

    loss = LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    return lambda student, teacher, labels: loss(student, head_of(student), teacher, head_of(teacher), labels)


def interpreted(name: str) -> Any:
    os.environ["TRITON_INTERPRET"] = "1"
    import liger_kernel.transformers as kernels

    return getattr(kernels, name)


@LIBRARY.loss(
    "transformers.LigerJSD, beta=0.5 (interpreted)",
    kind="logits",
    promises=Promises(definition="jsd", reduction="mean", ignored_rows=True),
)
def jsd() -> Any:
    """Generalized JSD of log-probabilities, a mean over tokens whose label is not ignored."""
    loss = interpreted("LigerJSD")(beta=0.5)
    return lambda student, teacher, labels: loss(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), labels
    ).to(student.dtype)
