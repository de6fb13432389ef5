"""Convert losses with other signatures for ``check``, in one line each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tempering.conformance.promises import Promises, takes
from tempering.methods.base import Method
from tempering.rows import IGNORE_INDEX, Rows, total


def with_promises(loss: Callable[..., Any], promises: Promises, signature_of: Any = None) -> Callable[..., Any]:
    """Attach promises to a function; ``signature_of`` is the function whose arguments it has."""
    loss.promises = promises  # pyright: ignore[reportFunctionMemberAccess]
    if signature_of is not None:
        loss.signature_of = signature_of  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def of_log_probs(
    loss: Callable[..., Any], temperature: float = 1.0, *, teacher: str = "log_probs"
) -> Callable[[Tensor, Tensor], Any]:
    """A loss of log-probabilities: loss(student's log-probabilities, teacher's); the teacher's may be "probs"."""

    def adapted(student: Tensor, teacher_logits: Tensor) -> Any:
        q, p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher_logits))
        return loss(q, p.exp() if teacher == "probs" else p)

    return adapted


def of_hidden_states(loss: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """A fused loss: loss(student's hidden (N, H), its head (V, H), teacher's hidden (N, H), its head (V, H), ...).

    The heads are random orthogonal matrices, so that any logits are given by hidden states.
    """

    def adapted(student: Tensor, teacher: Tensor, **kw: Any) -> Any:
        head = _orthogonal(student.shape[-1], student.dtype)
        return loss(student @ head, head, teacher @ head, head.clone(), **fixed, **kw)

    adapted.signature_of = loss  # pyright: ignore[reportFunctionMemberAccess]
    return adapted


def _orthogonal(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return q.to(dtype)


class GivenLogits(nn.Module):
    """A model that returns the logits it was made with, for trainers that run the models themselves."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(vocab_size=logits.shape[-1], is_encoder_decoder=False)

    def forward(self, *args: Any, **kw: Any) -> Any:
        return SimpleNamespace(logits=self.logits, loss=None)


def of_models(compute: Callable[[nn.Module, nn.Module, dict[str, Tensor]], Any]) -> Callable[..., Any]:
    """A trainer's compute_loss: compute(student, teacher, {"input_ids", "attention_mask", "labels"}), kind "tokens"."""

    def adapted(student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        ids = labels.clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return compute(GivenLogits(student), GivenLogits(teacher), inputs)

    return adapted


def of_method(method: Method, *, soft: bool = True) -> Callable[..., Any]:
    """A method of this library; without its term on labels if ``soft``."""

    def adapted(student: Tensor, teacher: Tensor, labels: Tensor, normalizer: float | None = None) -> Tensor:
        rows = Rows(student, teacher.detach(), labels, weight=(labels != IGNORE_INDEX).to(torch.float32))
        method.setup(rows)
        method.to(torch.float64 if student.dtype == torch.float64 else torch.float32)
        terms = method(rows)
        if soft:
            terms = {name: term for name, term in terms.items() if name.rpartition(".")[2] != "hard"}
        return total(terms, rows, normalizer=normalizer)

    adapted.__name__ = type(method).__name__
    return adapted


def of_sequences(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of (N, C) rows, called with all rows of (B, T, V) logits."""
    labels = takes(loss, "labels", "target", "targets")

    def adapted(student: Tensor, teacher: Tensor, labels_: Tensor | None = None, **kw: Any) -> Any:
        if labels is not None and labels_ is not None:
            kw[labels] = labels_.flatten()
        return loss(student.flatten(0, -2), teacher.flatten(0, -2), **kw)

    return adapted
