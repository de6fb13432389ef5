"""The conformance harness: planted faults are found and named, right losses pass, and ours are held to all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis")

from tempering.conformance import Promises, Status, check

KL = Promises(definition="kl", temperature_squared=True, reduction="mean", ignored_rows=True, low_precision=True)


def log_probs(x: Tensor, temperature: float) -> Tensor:
    return (
        torch.log_softmax(x.float() if x.dtype == torch.bfloat16 else x, -1)
        if temperature == 1
        else log_probs((x.float() if x.dtype == torch.bfloat16 else x) / temperature, 1.0)
    )


def per_row(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = log_probs(student, temperature), log_probs(teacher.detach(), temperature)
    return (p.exp() * (p - q)).sum(-1)


def mean_over(values: Tensor, labels: Tensor) -> Tensor:
    valid = labels != -100
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def right(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    valid = (labels != -100).unsqueeze(-1)
    student, teacher = torch.where(valid, student, 0.0), torch.where(valid, teacher, 0.0)
    return mean_over(per_row(student, teacher, temperature), labels) * temperature**2


# planted faults


def mean_over_padded_rows(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return right(student, teacher, labels, temperature) * (labels != -100).sum() / labels.numel()


def shifted_by_one(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return right(student[:, :-1], teacher[:, 1:], labels[:, 1:], temperature)


class _Unscaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: float, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return loss * value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.gradient, None, None


def no_square_in_the_gradient(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return _Unscaled.apply(right(student, teacher, labels, temperature) / temperature**2, temperature**2, 1.0)


def square_in_the_value_alone(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    loss = right(student, teacher, labels, temperature) / temperature**2
    return loss + (loss * (temperature**2 - 1)).detach()


def clamped(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    valid = (labels != -100).unsqueeze(-1)
    student, teacher = torch.where(valid, student, 0.0), torch.where(valid, teacher, 0.0)
    q, p = (torch.exp(log_probs(x, temperature)).clamp(min=1e-8) for x in (student, teacher.detach()))
    return mean_over((p * (p.log() - q.log())).sum(-1), labels) * temperature**2


def probabilities(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    valid = (labels != -100).unsqueeze(-1)
    student, teacher = torch.where(valid, student, 0.0), torch.where(valid, teacher, 0.0)
    q, p = log_probs(student, temperature).exp(), log_probs(teacher.detach(), temperature).exp()
    return mean_over(F.kl_div(q, p, reduction="none").sum(-1), labels) * temperature**2


def mean_of_means(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    parts = zip(student, teacher, labels, strict=True)
    return torch.stack([right(s, t, y, temperature) for s, t, y in parts]).mean()


def padded_softmax(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    more = student.shape[-1] - teacher.shape[-1]
    if more > 0:
        teacher = F.pad(teacher, (0, more), value=0.0)
    if more < 0:
        student = F.pad(student, (0, -more), value=0.0)
    return right(student, teacher, labels, temperature)


def attached_teacher(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    valid = (labels != -100).unsqueeze(-1)
    q, p = (log_probs(torch.where(valid, x, 0.0), temperature) for x in (student, teacher))
    return mean_over((p.exp() * (p - q)).sum(-1), labels) * temperature**2


def divided_by_classes(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return right(student, teacher, labels, temperature) / student.shape[-1]


def renormalized(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    q = torch.log_softmax(student.gather(-1, indices), -1)
    p = torch.log_softmax(values, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def bucket(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    q = torch.log_softmax(student, -1)
    listed = q.gather(-1, indices)
    inside = torch.zeros_like(q, dtype=torch.bool).scatter(-1, indices, True)
    if bool(inside.all()):
        return (values.exp() * (values - listed)).sum(-1).mean()
    rest_q = q.masked_fill(inside, -torch.inf).logsumexp(-1)
    rest_p = torch.log1p(-values.exp().sum(-1).clamp(max=1 - 1e-12))
    return ((values.exp() * (values - listed)).sum(-1) + rest_p.exp() * (rest_p - rest_q)).mean()


def masks(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    valid = (labels != -100).unsqueeze(-1)
    student, teacher = torch.where(valid, student, 0.0), torch.where(valid, teacher, 0.0)
    q, p = log_probs(student, temperature), log_probs(teacher.detach(), temperature)
    absent = p == -torch.inf
    return (
        mean_over((p.exp() * torch.where(absent, 0.0, p - q.masked_fill(absent, 0.0))).sum(-1), labels) * temperature**2
    )


FAULTS: dict[str, tuple[Callable[..., Any], str, Promises, str]] = {
    "mean over padded rows": (mean_over_padded_rows, "tokens", KL, "padding"),
    "shift by one": (shifted_by_one, "tokens", KL, "alignment"),
    "T^2 not in the gradient": (no_square_in_the_gradient, "tokens", KL, "slope"),
    "T^2 in the value alone": (square_in_the_value_alone, "tokens", KL, "slope"),
    "log of a clamped probability": (clamped, "tokens", KL, "confident rows"),
    "probabilities for log-probabilities": (probabilities, "tokens", KL, "definition"),
    "mean of means": (mean_of_means, "tokens", KL, "equal weight beside ignored rows"),
    "softmax over padding": (
        padded_softmax,
        "tokens",
        Promises(**{**vars(KL), "padded_vocabulary": True}),
        "padded vocabulary",
    ),
    "renormalized list": (renormalized, "top_k", Promises(definition="kl", tail="bucket"), "tail"),
    "attached teacher": (attached_teacher, "tokens", KL, "no gradient into the teacher"),
    "divided by classes": (divided_by_classes, "tokens", KL, "reduction"),
    "inf minus inf": (
        right,
        "tokens",
        Promises(**{**vars(KL), "masked_classes": True}),
        "classes masked on both sides",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named_by_one_invariant(fault: str) -> None:
    loss, kind, promises, name = FAULTS[fault]
    report = check(loss, kind=kind, promises=promises, measure=False, examples=8)
    assert [r.name for r in report.failures] == [name], report.table()
    assert report[name].tensors and report[name].message


def by_torch(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


RIGHT: dict[str, tuple[Callable[..., Any], str, Promises]] = {
    "right": (right, "tokens", KL),
    "masked": (masks, "tokens", Promises(**{**vars(KL), "masked_classes": True})),
    "torch's kl_div": (by_torch, "logits", Promises(definition="kl", reduction="mean")),
    "bucket": (bucket, "top_k", Promises(definition="kl", tail="bucket", reduction="mean")),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_pass(name: str) -> None:
    loss, kind, promises = RIGHT[name]
    report = check(loss, kind=kind, promises=promises, measure=False)
    assert report.ok, report.table()
    assert sum(r.status is Status.PASS for r in report.results) >= 18
