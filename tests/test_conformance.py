"""The conformance harness: planted faults are found and named, and right losses pass."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("hypothesis")

import tests.quick_hypothesis  # noqa: F401
from tempering.conformance import Promises, Status, adapters, check, invariants
from tempering.conformance.promises import Kind
from tests.paths import ROOT

STATIONARY_ON_A_LIST = "stationary at agreement on a list"
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


# faults of fused losses, features, scores and estimates


def chunks(student: Tensor, teacher: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """(loss, number of valid rows) of every chunk."""
    sides = (x.flatten(0, labels.ndim - 1).split(size) for x in (student, teacher, labels))
    return [(right(s, t, y), (y != -100).sum()) for s, t, y in zip(*sides, strict=True)]


def chunked(student: Tensor, teacher: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
    found = chunks(student, teacher, labels, chunk_size)
    return sum_of([loss * n for loss, n in found]) / (labels != -100).sum().clamp(min=1)


def mean_of_chunks(student: Tensor, teacher: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
    return torch.stack([loss for loss, _ in chunks(student, teacher, labels, chunk_size)]).mean()


def nan_of_an_ignored_chunk(student: Tensor, teacher: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
    if not bool((labels != -100).any()):
        return 0.0 * student.nan_to_num(0.0).sum()
    found = chunks(student, teacher, labels, chunk_size)
    return sum_of([loss * n**2 / n for loss, n in found]) / (labels != -100).sum()


def sum_of(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def patches(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    error = torch.where(mask.unsqueeze(-1), student - teacher.detach(), 0.0).square().mean(-1)
    return error.sum() / mask.sum().clamp(min=1)


def mean_over_padded_patches(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return patches(student, teacher, mask) * mask.sum() / mask.numel()


def masked_patches_of_the_teacher(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - torch.where(mask.unsqueeze(-1), teacher.detach(), 0.0)).square().mean(-1).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher.detach(), -1).mean()


def normalized_by_zero(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (x / x.norm(dim=-1, keepdim=True) for x in (student, teacher.detach()))
    return (q - p).square().sum(-1).mean()


def not_normalized(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher.detach())


def margins(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student - student.mean(-1, keepdim=True), (teacher - teacher.mean(-1, keepdim=True)).detach())


def one_candidate(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-4) for x in (student, teacher.detach()))
    return F.mse_loss(q, p)


def sampled(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return (values - torch.log_softmax(student, -1).gather(-1, indices)).mean()


def weighted_twice(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return (values.exp() * (values - torch.log_softmax(student, -1).gather(-1, indices))).mean()


def self_normalized(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Unbiased for one draw, biased for two."""
    weight = torch.softmax(values, -1)
    return (weight * (values - torch.log_softmax(student, -1).gather(-1, indices))).sum(-1).mean()


def truncated(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return (values.exp() * (values - torch.log_softmax(student, -1).gather(-1, indices))).sum(-1).mean()


PATCHES = Promises(feature_shape=(3, 4), ignored_rows=True, scale_power=2.0)
VECTORS = Promises(feature_shape=(4,), scale_power=0.0, detached_scale=False)
DRAWN = Promises(definition="kl", sampled=True)
Fault = tuple[Callable[..., Any], Kind, Promises, str]


def similarities(features: Tensor, p: float) -> Tensor:
    return F.normalize(features @ features.T, p=p, dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Tung and Mori 2019, equation 4, but for the factor."""
    return (similarities(student, 2.0) - similarities(teacher.detach(), 2.0)).square().sum()


def divided_by_absolute_sums(student: Tensor, teacher: Tensor) -> Tensor:
    return (similarities(student, 1.0) - similarities(teacher.detach(), 1.0)).square().sum()


class DefaultKLDiv(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return torch.nn.KLDivLoss()(log_probs(student, 1.0), teacher.detach().softmax(-1))


SIMILAR = Promises(definition=similarity_preserving, batch_dependent=True)
FAULTS: dict[str, Fault] = {
    "mean over padded rows": (mean_over_padded_rows, "tokens", KL, "padding"),
    "another norm of features": (divided_by_absolute_sums, "features", SIMILAR, "definition of both sides"),
    "shift by one": (shifted_by_one, "tokens", KL, "alignment"),
    "T^2 not in the gradient": (no_square_in_the_gradient, "tokens", KL, "slope"),
    "T^2 in the value alone": (square_in_the_value_alone, "tokens", KL, "slope"),
    "log of a clamped probability": (clamped, "tokens", KL, "confident rows"),
    "probabilities for log-probabilities": (probabilities, "tokens", KL, "definition"),
    "mean of means": (mean_of_means, "tokens", KL, "equal weight beside ignored rows"),
    "softmax over padding": (padded_softmax, "tokens", replace(KL, padded_vocabulary=True), "padded vocabulary"),
    "renormalized list": (renormalized, "top_k", Promises(definition="kl", tail="bucket"), "tail"),
    "attached teacher": (attached_teacher, "tokens", KL, "no gradient into the teacher"),
    "divided by classes": (divided_by_classes, "tokens", KL, "reduction"),
    "inf minus inf": (right, "tokens", replace(KL, masked_classes=True), "classes masked on both sides"),
    # in other containers, without promises, by other divergences
    "kl_div by its default": (
        lambda s, t: F.kl_div(log_probs(s, 1.0), t.detach().softmax(-1)),
        "logits",
        Promises(),
        "reduction",
    ),
    "the same of a module": (DefaultKLDiv(), "tokens", Promises(), "reduction"),
    "the same with a weight": (lambda s, t: 0.3 * DefaultKLDiv()(s, t), "logits", Promises(), "reduction"),
    "probabilities, nothing declared": (
        lambda s, t: F.kl_div(s.softmax(-1), t.detach().softmax(-1), reduction="batchmean"),
        "logits",
        Promises(),
        "definition",
    ),
    "the teacher in place": (
        lambda s, t: per_row_attached(s, t.detach().sub_(1.0)).mean(),
        "tokens",
        Promises(),
        "inputs untouched",
    ),
    "the student in place": (
        lambda s, t: per_row_attached(s.sub_(1.0), t.detach()).mean(),
        "logits",
        Promises(),
        "inputs untouched",
    ),
    "noise": (
        lambda s, t: per_row_attached(s, t.detach()).mean() * (1 + 0.1 * torch.rand(())),
        "tokens",
        Promises(),
        "deterministic",
    ),
    "T in the student alone": (
        lambda s, t, T=1.0: per_row_attached(s / T, t.detach()).mean(),
        "logits",
        Promises(definition="kl"),
        "temperature",
    ),
    "reverse KL attached": (
        lambda s, t: per_row_attached(t, s).mean(),
        "tokens",
        Promises(),
        "no gradient into the teacher",
    ),
    "batchmean of tokens": (
        lambda s, t: per_row_attached(s, t.detach()).sum() / len(s),
        "tokens",
        Promises(definition="kl", reduction="mean"),
        "reduction",
    ),
    "rows of features moved": (
        lambda s, t: F.mse_loss(s, t.detach().roll(1, 0)),
        "features",
        Promises(),
        "zero at agreement",
    ),
    # of our own
    "mean of chunks": (mean_of_chunks, "tokens", KL, "chunk size"),
    "NaN of an ignored chunk": (nan_of_an_ignored_chunk, "tokens", KL, "ignored chunks"),
    "truncated list": (truncated, "top_k", Promises(definition="kl", tail="truncated"), STATIONARY_ON_A_LIST),
    "mean over padded patches": (mean_over_padded_patches, "features", PATCHES, "padded features"),
    "masked patches": (masked_patches_of_the_teacher, "features", PATCHES, "masked features"),
    "a zero vector": (normalized_by_zero, "features", VECTORS, "constant features"),
    "not normalized": (not_normalized, "features", VECTORS, "scale"),
    "one candidate": (one_candidate, "scores", Promises(), "one candidate"),
    "weighted twice": (weighted_twice, "top_k", DRAWN, "unbiased"),
    "self-normalized": (self_normalized, "top_k", DRAWN, "unbiased"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named_by_one_invariant(fault: str) -> None:
    loss, kind, promises, name = FAULTS[fault]
    report = check(loss, kind=kind, promises=promises, measure=False, examples=5)
    assert [r.name for r in report.failures] == [name], report.table()
    assert report[name].tensors and report[name].message


def by_torch(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def in_bits(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Base-2 logarithms, times ln 2."""
    valid = (labels != -100).unsqueeze(-1)
    student, teacher = (torch.where(valid, x, 0.0).float() / temperature for x in (student, teacher.detach()))
    p = teacher.softmax(-1)
    bits = torch.log_softmax(teacher, -1) / math.log(2) - torch.log_softmax(student, -1) / math.log(2)
    return mean_over((p * bits).sum(-1), labels) * math.log(2) * temperature**2


def by_hand(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax and logsumexp written out."""
    s, t = (x / temperature for x in (student, teacher.detach()))
    s, t = (x - x.amax(-1, keepdim=True) for x in (s, t))
    weight = t.exp() / t.exp().sum(-1, keepdim=True)
    rows = s.exp().sum(-1).log() - t.exp().sum(-1).log() + (weight * (t - s)).sum(-1)
    return rows.mean() * temperature * temperature


def loop_over_rows(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    total, count = student.new_zeros(()), 0
    for s, t, y in zip(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), strict=True):
        if y != -100:
            total, count = total + per_row(s, t, temperature) * temperature**2, count + 1
    return total / count if count else total + 0.0 * student.nan_to_num(0.0).sum()


def by_einsum(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    q, p = log_probs(student, temperature), log_probs(teacher.detach(), temperature)
    return torch.einsum("nc,nc->", p.exp(), p - q) * (temperature**2 / len(student))


def returned(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    return {"loss": (by_torch(student, teacher), "of a tuple"), "rows": len(student)}


def in_double(student: Tensor, teacher: Tensor, *, T: float = 2.0) -> Tensor:
    q, p = (F.log_softmax(x.double() / T, -1) for x in (student, teacher.detach()))
    return (F.kl_div(q, p, log_target=True, reduction="batchmean") * T**2).to(student.dtype)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        return per_row(student, teacher, 1.0).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, teacher = ctx.saved_tensors
        return grads[0] * (student.softmax(-1) - teacher.softmax(-1)) / len(student), None


def by_masked_select(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Reverse KL."""
    sides = (x.masked_select(mask.unsqueeze(-1)).view(-1, x.shape[-1]) for x in (teacher.detach(), student))
    return per_row_attached(*sides).sum() / mask.sum().clamp(min=1)


def per_row_attached(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = log_probs(student, 1.0), log_probs(teacher, 1.0)
    return (p.exp() * (p - q)).sum(-1)


def with_labels(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.9 * by_torch(student, teacher) + 0.1 * F.cross_entropy(student, labels)


def on_a_copy(student: Tensor, teacher: Tensor) -> Tensor:
    return 4.0 * by_torch(student.clone().div_(2.0), teacher.clone().div_(2.0))


class AtFour(torch.nn.Module):
    """T^2 and a weight, neither of which is declared."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 0.7 * in_double(student, teacher, T=4.0)


def margin_to_the_first(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (x[:, :1] - x for x in (student, teacher.detach()))
    return (q - p).square().mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student, teacher.detach().softmax(-1))


MEAN = Promises(reduction="mean")
RIGHT: dict[str, tuple[Callable[..., Any], Kind, Promises, int]] = {
    "dict of a tuple": (returned, "logits", MEAN, 18),
    "float64 inside": (in_double, "logits", MEAN, 20),
    "autograd.Function": (_KL.apply, "logits", Promises(), 15),
    "masked_select": (by_masked_select, "tokens", Promises(reduction="mean", ignored_rows=True), 24),
    "labels in it": (with_labels, "logits", Promises(), 11),
    "in place on a copy": (on_a_copy, "logits", MEAN, 18),
    "a module at T = 4": (AtFour(), "logits", MEAN, 18),
    "margin to the first": (margin_to_the_first, "scores", Promises(), 10),
    "ListNet": (soft_cross_entropy, "scores", Promises(), 9),
    "L1": (lambda student, teacher: F.l1_loss(student, teacher.detach()), "logits", MEAN, 15),
    "smooth L1": (lambda student, teacher: F.smooth_l1_loss(student, teacher.detach()), "logits", MEAN, 15),
    "cosine of logits": (cosine, "logits", MEAN, 15),
    "squared, summed over classes": (
        lambda student, teacher: (student - teacher.detach()).square().sum(-1).mean(),
        "logits",
        MEAN,
        15,
    ),
    "right": (right, "tokens", KL, 28),
    "masked": (masks, "tokens", replace(KL, masked_classes=True), 28),
    "in bits": (in_bits, "tokens", KL, 28),
    "loop over rows": (loop_over_rows, "tokens", KL, 28),
    "chunked": (chunked, "tokens", KL, 26),
    "by hand": (by_hand, "logits", Promises(definition="kl", reduction="mean", temperature_squared=True), 18),
    "einsum": (by_einsum, "logits", Promises(definition="kl", reduction="mean", temperature_squared=True), 18),
    "torch's kl_div": (by_torch, "logits", Promises(definition="kl", reduction="mean"), 18),
    "bucket": (bucket, "top_k", Promises(definition="kl", tail="bucket", reduction="mean"), 18),
    "patches": (patches, "features", PATCHES, 14),
    "cosine": (cosine, "features", VECTORS, 13),
    "margins": (margins, "scores", Promises(), 10),
    "sampled": (sampled, "top_k", DRAWN, 8),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_losses_pass(name: str) -> None:
    loss, kind, promises, passed = RIGHT[name]
    report = check(loss, kind=kind, promises=promises, measure=False, examples=3)
    assert report.ok, report.table()
    assert sum(r.status is Status.PASS for r in report.results) >= passed, report.table()


def test_the_command_checks_a_loss_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tempering.cli.main import main

    (tmp_path / "losses_here.py").write_text("""
import torch
from tempering.conformance import Promises

def loss(student, teacher):
    q, p = student.log_softmax(-1), teacher.detach().softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="mean")

loss.promises = Promises(reduction="elements")

def per_integer(student, teacher):
    return loss(student.long(), teacher.long())

class Needs:
    def __init__(self, weight): ...
""")
    (tmp_path / "broken_here.py").write_text("def loss(:")
    monkeypatch.chdir(tmp_path)
    assert main(["conformance", "losses_here:loss", "--examples", "2", "--compile", "no"]) == 0
    assert "pass           reduction" in capsys.readouterr().out
    flags = ["--definition", "kl", "--reduction", "mean", "--out", "found", "--examples", "2", "--compile", "no"]
    assert main(["conformance", "losses_here:loss", *flags]) == 1, "a flag is stronger than the attribute"
    assert "the sum is divided by rows times classes" in capsys.readouterr().out
    record = json.loads((tmp_path / "found" / "report.json").read_text())
    failed = [r for r in record["results"] if r["status"] == "fail"]
    assert [r["name"] for r in failed] == ["reduction"] and record["facts"]["definition"] == "kl"
    inputs = load_file(tmp_path / "found" / failed[0]["counterexample"])
    assert set(inputs) == {"student", "teacher", "labels"}
    assert "<b>reduction</b>" in (tmp_path / "found" / "report.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} <= {
        "losses_here.py",
        "broken_here.py",
        "found",
        "__pycache__",
    }, "nothing else is written"
    for name, message in (
        ("losses_here", "MODULE:NAME"),
        ("losses_here:no", "has no 'no'. Functions and classes there: Promises, loss, per_integer, Needs"),
        ("losses_here:Needs", "a class with required arguments"),
        ("losses_there:loss", f"there is no module 'losses_there', neither installed nor in {tmp_path}"),
        ("broken_here:loss", "broken_here cannot be imported: SyntaxError"),
    ):
        assert main(["conformance", name]) == 2 and message in capsys.readouterr().err
    assert main(["conformance", "losses_here:per_integer", "--compile", "no"]) == 2, "it raises at once"
    assert "error          runs" in capsys.readouterr().out
    assert main(["conformance", "losses_here:loss", "--badge", "badge.png"]) == 1
    assert "ends in .svg or .json; got badge.png" in capsys.readouterr().err


def test_a_badge_says_what_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tempering.cli.main import main
    from tempering.conformance.badge import badge

    (tmp_path / "losses_shown.py").write_text("""
import torch

def right(student, teacher):
    q, p = student.log_softmax(-1), teacher.detach().softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="batchmean")

def wrong(student, teacher):
    return right(student, teacher) / student.shape[-1]
""")
    monkeypatch.chdir(tmp_path)
    flags = ["--examples", "2", "--compile", "no", "--badge"]
    assert main(["conformance", "losses_shown:right", *flags, "shown/right.svg"]) == 0
    assert main(["conformance", "losses_shown:wrong", *flags, "wrong.json"]) == 1
    assert re.search(r"<title>distillation loss: \d\d invariants hold</title>", Path("shown/right.svg").read_text())
    shown = json.loads(Path("wrong.json").read_text())
    assert shown["schemaVersion"] == 1 and re.fullmatch(r"1 of \d\d invariants fail", shown["message"])
    late = check(by_torch, seconds=0.0)
    assert late.ok and {r.status for r in late.results} == {Status.NOT_APPLICABLE}
    assert badge([late.record()])["message"] == "not checked to the end"
    capsys.readouterr()


def test_losses_that_cannot_be_called_are_explained() -> None:
    def wrong(student: Tensor, teacher: Tensor, weight: float) -> Tensor:
        return right(student, teacher, torch.zeros(student.shape[:-1], dtype=torch.long)) * weight

    def of_sequences(student: Tensor, teacher: Tensor) -> Tensor:
        b, t, v = student.shape
        return by_torch(student.view(b * t, v), teacher.view(b * t, v))

    def of_outputs(student: Tensor, teacher: Any) -> Tensor:
        return by_torch(student, teacher.logits)

    for loss, call, advice in (
        (wrong, "loss(float64 (2, 2), float64 (2, 2)) raises TypeError", "functools.partial"),
        (of_sequences, "raises ValueError", "kind='tokens'"),
        (of_outputs, "raises AttributeError", "adapters.of_models"),
    ):
        result = check(loss, measure=False)["runs"]
        assert result.status is Status.ERROR and call in result.message and advice in result.message, result.message


def test_messages_show_the_values_that_differ() -> None:
    from tempering.conformance.checks.base import check_close
    from tempering.conformance.probe import Violation

    found = torch.tensor([[1.0, math.nan], [2.0, math.inf]])
    check_close(torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), "equal infinities", tol=0.0)
    with pytest.raises(Violation, match=r"first at \[0, 1\]") as caught:
        check_close(found, torch.tensor([[1.0, 5.0], [2.0, math.inf]]), "differs", tol=1e-6)
    assert math.isnan(caught.value.found) and caught.value.expected == 5.0


@pytest.mark.parametrize("invariant", invariants(in_bits, kind="tokens", promises=KL, only=("slope", "padding")))
def test_invariants_are_tests_of_another_suite(invariant: Callable[[], None]) -> None:
    invariant()


def test_adapters_convert_other_signatures() -> None:
    def of_probs(q: Tensor, p: Tensor) -> Tensor:
        return F.kl_div(q, p.detach(), reduction="batchmean")

    def fused(hidden: Tensor, head: Tensor, hidden_t: Tensor, head_t: Tensor, labels: Tensor) -> Tensor:
        return right(hidden @ head.T, hidden_t @ head_t.T, labels)

    def lists(q: Tensor, p: Tensor) -> Tensor:
        return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1).mean()

    class Trainer:
        teacher_model: Any = None

        def compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Any:
            student, teacher = model(**inputs), self.teacher_model(**inputs)
            return right(student.logits[:, :-1], teacher["logits"][:, :-1], inputs["labels"][:, 1:]), student

    losses: list[tuple[Callable[..., Any], Kind, Promises]] = [
        (adapters.of_log_probs(of_probs, teacher="probs"), "logits", Promises(definition="kl", reduction="mean")),
        (adapters.of_log_probs(of_probs, 2.0, teacher="probs"), "logits", Promises(definition="kl", temperature=2.0)),
        (adapters.of_hidden_states(fused), "logits", replace(KL, low_precision=None)),
        (adapters.of_lists(lists), "top_k", Promises(definition="kl")),
        (adapters.of_trainer(Trainer()), "tokens", replace(KL, shift=1)),
    ]
    for loss, kind, promises in losses:
        report = check(loss, kind=kind, promises=promises, measure=False, examples=3)
        assert report.ok and sum(r.status is Status.PASS for r in report.results) >= 15, report.table()


def test_compile_is_checked_when_it_is_asked_for() -> None:
    def other_when_compiled(student: Tensor, teacher: Tensor) -> Tensor:
        return by_torch(student, teacher) * (2.0 if torch.compiler.is_compiling() else 1.0)

    for loss, status in ((by_torch, Status.PASS), (other_when_compiled, Status.FAIL)):
        report = check(loss, only=("compile",), compile="aot_eager", measure=False)
        assert report["compile"].status is status, report.table()
    assert check(by_torch, only=("compile",), compile="aot_eager", measure=False)["compile"].message == "by aot_eager"
    assert check(by_torch, only=("compile",), measure=False)["compile"].status is Status.NOT_APPLICABLE


def test_cost_is_measured_in_logits() -> None:
    facts = check(by_torch, only=("runs",)).facts
    assert 3.0 <= facts["peak memory in logits"] <= 8.0 and facts["time over plain KL"] > 0.0


def test_the_page_is_current_and_its_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from docs.tools.conformance_page import page
    from tempering import conformance

    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert page(text) == text, "make pages"
    monkeypatch.setattr(conformance, "check", partial(check, measure=False, examples=1), raising=False)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/conformance.md", "exec"), names)
