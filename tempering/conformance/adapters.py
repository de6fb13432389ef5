"""Convert losses with other signatures for ``check``, in one line each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor, nn

from tempering.conformance.probe import LABELS
from tempering.conformance.promises import Promises, takes
from tempering.methods.base import Method
from tempering.rows import IGNORE_INDEX, Rows, total

P = ParamSpec("P")
Input = Literal["logits", "log_probs", "probs"]


def with_promises(loss: Callable[..., Any], promises: Promises, signature_of: Any = None) -> Callable[..., Any]:
    """Attach promises to a function; ``signature_of`` is the function whose arguments it has."""
    loss.promises = promises  # pyright: ignore[reportFunctionMemberAccess]
    if signature_of is not None:
        loss.signature_of = signature_of  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def of_log_probs(
    loss: Callable[Concatenate[Tensor, Tensor, P], Any],
    temperature: float = 1.0,
    *,
    student: Input = "log_probs",
    teacher: Input = "log_probs",
) -> Callable[Concatenate[Tensor, Tensor, P], Any]:
    """A loss whose two sides are log-probabilities, probabilities or logits, of logits / T: loss(student, teacher)."""

    def adapted(student_logits: Tensor, teacher_logits: Tensor, *args: P.args, **kw: P.kwargs) -> Any:
        sides = _of_logits(student_logits / temperature, student), _of_logits(teacher_logits / temperature, teacher)
        return loss(*sides, *args, **kw)

    return _named(adapted, loss)


def of_lists(loss: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """Loss of both sides' log-probabilities on the teacher's list: loss(student (N, K), teacher (N, K))."""

    def adapted(student: Tensor, values: Tensor, indices: Tensor) -> Any:
        return loss(torch.log_softmax(student, -1).gather(-1, indices), values)

    return adapted


def of_hidden_states(
    loss: Callable[Concatenate[Tensor, Tensor, Tensor, Tensor, P], Any],
) -> Callable[Concatenate[Tensor, Tensor, P], Any]:
    """A fused loss: loss(student's hidden (N, H), its head (V, H), teacher's hidden (N, H), its head (V, H), ...).

    The heads are random orthogonal matrices, so that any logits are given by hidden states. The gradient that is
    checked reaches the hidden states and their logits.
    """

    def adapted(student: Tensor, teacher: Tensor, *args: P.args, **kw: P.kwargs) -> Any:
        head = _orthogonal(student.shape[-1]).to(student.dtype)
        return loss(student @ head, head, teacher @ head, head.clone(), *args, **kw)

    return _named(adapted, loss)


@functools.lru_cache(maxsize=16)
def _orthogonal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


class Output(dict[str, Any]):
    """A model's output, with its logits as attribute, key or first element."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class GivenLogits(nn.Module):
    """A model that returns the logits it was made with, for trainers that run the models themselves."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.unused = nn.Parameter(torch.zeros((), dtype=logits.dtype))  # trainers look for something to train
        self.config = SimpleNamespace(vocab_size=logits.shape[-1], is_encoder_decoder=False)

    def forward(self, *args: Any, **kw: Any) -> Output:
        return Output(logits=self.logits)


def of_models(compute: Callable[[nn.Module, nn.Module, dict[str, Tensor]], Any]) -> Callable[..., Any]:
    """A loss that runs the models: compute(student, teacher, {"input_ids", "attention_mask", "labels"}), kind "tokens".

    It returns the loss, or a tuple whose first element it is.
    """

    def adapted(student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        ids = labels.clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        result = compute(GivenLogits(student), GivenLogits(teacher), inputs)
        return result[0] if isinstance(result, tuple) else result

    return adapted


def of_trainer(trainer: Any, teacher: str = "teacher_model") -> Callable[..., Any]:
    """A Hugging Face trainer's compute_loss(model, inputs), kind "tokens"; ``teacher`` names its attribute."""

    def compute(student_model: nn.Module, teacher_model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        before = getattr(trainer, teacher, None)
        setattr(trainer, teacher, teacher_model)
        try:
            return trainer.compute_loss(student_model, inputs)
        finally:
            setattr(trainer, teacher, before)

    return of_models(compute)


def _of_logits(logits: Tensor, to: Input) -> Tensor:
    log_probs = torch.log_softmax(logits, -1)
    return {"logits": logits, "log_probs": log_probs, "probs": log_probs.exp()}[to]


def _named(adapted: Any, loss: Callable[..., Any]) -> Any:
    """Give a function the name of the loss that it adapts, and a look at its arguments."""
    adapted.__name__ = getattr(loss, "__name__", type(loss).__name__)
    adapted.signature_of = loss
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
    """A loss of (N, C) rows (and their labels (N,)), called with all rows of (B, T, V) logits."""
    name = takes(loss, *LABELS)

    def adapted(student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
        rest = {name: labels.flatten()} if name else {}
        return loss(student.flatten(0, -2), teacher.flatten(0, -2), **rest)

    return adapted
