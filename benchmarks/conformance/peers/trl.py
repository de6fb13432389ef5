"""TRL: losses of its distillation trainers, without the trainers' loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from peers import Library
from tempering.conformance import Promises

LIBRARY = Library("trl", "1.16.0")


def promises(definition: str, **more: Any) -> Promises:
    return Promises(definition=definition, temperature_squared=False, **more)


def static(beta: float, trainer: str, module: str) -> Any:
    def make() -> Any:
        import importlib

        loss = getattr(importlib.import_module(f"trl.experimental.{module}"), trainer).generalized_jsd_loss
        return lambda student, teacher, labels, temperature=1.0, num_items_in_batch=None: loss(
            student, teacher, labels, beta=beta, temperature=temperature, num_items_in_batch=num_items_in_batch
        )

    return make


FOR_BETA = {0.0: "kl", 0.5: "jsd", 0.9: "jsd(0.9)", 1.0: "reverse_kl"}
TRAINERS = {"GKDTrainer": "gkd", "GOLDTrainer": "gold", "IWOPDTrainer": "iw_opd.iw_opd_trainer"}
for trainer, module in TRAINERS.items():
    for beta, definition in FOR_BETA.items():
        if trainer != "GKDTrainer" and beta == 0.9:
            continue
        LIBRARY.loss(
            f"{trainer}.generalized_jsd_loss, beta={beta:g}",
            kind="tokens",
            promises=promises(definition, reduction="mean", ignored_rows=True),
            documented="Generalized JSD of 2306.13649 at a softmax temperature; positions labeled -100 are ignored; "
            "the default reduction is a mean over the rest.",
        )(static(beta, trainer, module))


@LIBRARY.loss(
    "IWOPDTrainer.generalized_jsd_loss, beta=0, top_k of all classes but one",
    kind="tokens",
    promises=promises("kl", reduction="mean", ignored_rows=True),
    unsaid=("temperature", "confident rows", "gradient"),
)
def bucket() -> Any:
    """The teacher's top k with one bucket for the remaining mass; with k of all classes but one it is the whole
    divergence. Nothing is said of tails below 1e-7, which T = 0.05 makes."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    return lambda student, teacher, labels, temperature=1.0: IWOPDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=0.0, temperature=temperature, top_k=student.shape[-1] - 1
    )


def chunked(beta: float) -> Any:
    def make() -> Any:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def loss(
            student: Any, teacher: Any, mask: Any, temperature: float = 1.0, num_items_in_batch: Any = None
        ) -> Any:
            eye = torch.eye(student.shape[-1], dtype=student.dtype)
            more = {"temperature": temperature, "num_items_in_batch": num_items_in_batch}
            return _chunked_divergence_loss(student, teacher, eye, eye.clone(), mask, beta, **more)[0]

        return loss

    return make


for beta, definition in FOR_BETA.items():
    if beta != 0.9:
        LIBRARY.loss(
            f"trainer.distillation_trainer._chunked_divergence_loss, beta={beta:g}",
            kind="tokens",
            promises=promises(definition, reduction="mean", ignored_rows=True, low_precision=True),
            documented="Generalized JSD from hidden states and heads in tiles; projections are accumulated in float32; "
            "a mean over positions that the mask keeps.",
        )(chunked(beta))


def by_topk(module: str, alpha: float, **arguments: Any) -> Any:
    def make() -> Any:
        import importlib

        loss_utils = importlib.import_module(f"trl.experimental.{module}.loss_utils")
        if not arguments:
            return lambda student, teacher: loss_utils.compute_full_logit_self_distillation_loss(
                student, teacher, distillation_alpha=alpha
            )
        return lambda student, teacher: loss_utils.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=min(3, student.shape[-1]), distillation_alpha=alpha, **arguments
        )

    return make


for alpha, definition in {0.0: "kl", 0.5: "jsd", 1.0: "reverse_kl"}.items():
    LIBRARY.loss(
        f"experimental.sdft.loss_utils.compute_full_logit_self_distillation_loss, alpha={alpha:g}",
        kind="logits",
        promises=promises(definition, reduction="none", sequences=True),
        documented="The divergence over the whole vocabulary, per token.",
    )(by_topk("sdft", alpha))
for tail in (True, False):
    LIBRARY.loss(
        f"experimental.sdpo.loss_utils.compute_topk_self_distillation_loss, k=3, alpha=0.5, add_tail={tail}",
        kind="logits",
        promises=Promises(reduction="none", sequences=True, divergence=True, identifies_teacher=False),
        documented="The divergence on the student's top k, renormalized or with a bucket for the tail; which classes "
        "those are changes where logits are equal.",
        unsaid=("slope", "order of the classes"),
    )(by_topk("sdpo", 0.5, distillation_add_tail=tail))


@LIBRARY.loss(
    "experimental.async_distillation._jsd_loss_chunk, beta=0, add_tail_bucket=True",
    kind="top_k",
    promises=Promises(definition="kl", tail="bucket", reduction="sum"),
)
def asynchronous() -> Any:
    """Forward KL on the teacher's top k and one bucket for the rest, so that both are distributions; summed."""
    return _asynchronous(True)


@LIBRARY.loss(
    "experimental.async_distillation._jsd_loss_chunk, beta=0, add_tail_bucket=False",
    kind="top_k",
    promises=Promises(definition="kl", tail="renormalized", reduction="sum", identifies_teacher=False),
)
def asynchronous_renormalized() -> Any:
    """Forward KL on the teacher's top k, both sides renormalized; summed."""
    return _asynchronous(False)


def _asynchronous(tail: bool) -> Any:
    from trl.experimental.async_distillation.async_distillation_trainer import _jsd_loss_chunk

    # its caller has the teacher's log-probabilities made at the same temperature by the server: 1 here
    def loss(student: Any, values: Any, indices: Any) -> Any:
        eye = torch.eye(student.shape[-1])
        mask = torch.ones_like(indices, dtype=torch.bool)
        more = (0.0, 1.0, tail, None, 0)
        return _jsd_loss_chunk(student, eye, None, 1.0, None, indices, values.float(), mask, *more)[0]

    return loss


@LIBRARY.loss(
    "experimental.gold.ULDLoss (one vocabulary, every token matched)",
    kind="logits",
    promises=Promises(definition="jsd", divergence=True),
)
def hybrid() -> Any:
    """Tokens that both vocabularies have are compared by generalized JSD of their probabilities."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    def loss(student: Any, teacher: Any) -> Any:
        c = student.shape[-1]
        held = SimpleNamespace(
            _teacher_matched_ids=set(range(c)),
            mapping_tensor=torch.arange(c),
            hybrid_matched_weight=1.0,
            hybrid_unmatched_weight=0.0,
            beta=0.5,
        )
        held._compute_jsd_loss_for_matched_tokens = lambda s, t: ULDLoss._compute_jsd_loss_for_matched_tokens(
            held, s, t
        )
        return ULDLoss._compute_hybrid_uld_loss(held, student.softmax(-1), teacher.softmax(-1))

    return loss
