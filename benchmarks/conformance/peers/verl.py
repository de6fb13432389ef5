"""verl: its top-k distillation loss, and its estimators of a KL divergence from one sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from peers import Library, bare, stand_in
from tempering.conformance import Promises

LIBRARY = Library("verl", "0.9.1")


def register(clamp: float | None, chunked: bool) -> None:
    @LIBRARY.loss(
        "trainer.distillation.fsdp.losses.compute_forward_kl_topk, "
        f"log_prob_min_clamp={clamp}{' (its default)' if clamp else ''}, use_chunked_topk={chunked}",
        kind="top_k",
        promises=Promises(definition="kl", reduction="none", tail="truncated"),
        documented="Forward KL on the teacher's top-k log-probabilities, per token; neither side is renormalized"
        + ("; log-probabilities are clamped for stability." if clamp else "."),
        unsaid=("confident rows",) if clamp else (),
    )
    def make() -> Any:
        bare("verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp")
        stand_in("verl.utils", __path__=[])
        one = {"get_ulysses_sequence_parallel_world_size": lambda: 1, "slice_input_tensor": lambda x, dim: x}
        stand_in("verl.utils.ulysses", **one)
        stand_in("verl.workers", __path__=[])
        stand_in("verl.workers.config", DistillationConfig=object, DistillationLossConfig=object)
        from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk

        held = SimpleNamespace(
            distillation_loss=SimpleNamespace(
                log_prob_min_clamp=clamp, use_chunked_topk=chunked, chunked_topk_chunk_size=2
            )
        )

        def loss(student: Any, values: Any, indices: Any) -> Any:
            lists = [torch.nested.nested_tensor([x], layout=torch.jagged) for x in (values, indices)]
            return compute_forward_kl_topk(student[None], *lists, held, "thd")["distillation_losses"][0]

        return loss


register(-10.0, False)
register(None, False)
register(None, True)
