"""Soft labels (N, C) and label smoothing: torch's cross entropy, methods that take them, and those that do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tempering.kernels.chunked import chunked
from tempering.methods import DTKD, KD, METHODS, Method, Supervised
from tempering.objectives import cross_entropy
from tempering.rows import Rows, class_labels, is_labeled, total, without_labels
from tempering.temperature import POLICIES
from tempering.temperature.base import Policy
from tests.cases import each

N, C = 12, 5
INDICES = (
    "ATS",
    "CKD",
    "DKD",
    "MarginMSE",
    "NKD",
    "RLD",
    "USKD",
)  # compare the label with the other classes


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def soft_labels(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return logits(2, dtype).softmax(-1)


@each("smoothing, dtype", [(0.0, torch.float64), (0.1, torch.float64), (0.3, torch.float32), (1.0, torch.float64)])
def test_soft_labels_and_label_smoothing_are_those_of_torch(smoothing: float, dtype: torch.dtype) -> None:
    index = torch.arange(N) % C
    index[3] = -100
    for target in (index, soft_labels(dtype)):
        ours, torchs = (logits(0, dtype).requires_grad_() for _ in range(2))
        value = cross_entropy(Rows(ours, logits(1, dtype), target, label_smoothing=smoothing))
        expected = F.cross_entropy(torchs, target, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, torchs.grad)


def test_masked_classes_get_no_smoothing_and_no_soft_label_is_needed_there() -> None:
    student, target = logits(0), soft_labels()
    student[:, 0], target[:, 0] = -torch.inf, 0.0
    target = target / target.sum(-1, keepdim=True)
    for labels, cut in ((target, target[:, 1:]), (torch.arange(N) % (C - 1) + 1, torch.arange(N) % (C - 1))):
        value = cross_entropy(Rows(student, student, labels, label_smoothing=0.2))
        torch.testing.assert_close(value, F.cross_entropy(student[:, 1:], cut, label_smoothing=0.2, reduction="none"))


@each("method", [KD(), DTKD(), Supervised()])
def test_methods_with_a_cross_entropy_take_soft_labels(method: Method) -> None:
    """One-hot labels give the loss of class indices, also in chunks; a row of zeros has no label."""
    index = torch.arange(N) % C
    index[4] = -100
    one_hot = F.one_hot(index.clamp_min(0), C).double() * (index >= 0)[:, None]
    for smoothing in (0.0, 0.1):
        of = {}
        for name, target in (("index", index), ("soft", one_hot)):
            rows = Rows(logits(0).requires_grad_(), logits(1), target, label_smoothing=smoothing)
            loss = total(method(rows), rows)
            in_chunks = chunked(method, rows, 1.0)[0]
            torch.testing.assert_close(in_chunks, loss)
            of[name] = [loss, *torch.autograd.grad(loss, rows.student)]
        torch.testing.assert_close(of["soft"], of["index"])


def _with_policy(policy: type[Policy]) -> Method:
    return KD(temperature=policy.example())


def loss_of(method: Method, target: torch.Tensor) -> torch.Tensor:
    rows = Rows(logits(0).requires_grad_(), logits(1), target, ids=torch.arange(N))
    torch.manual_seed(0)
    if method.needs_setup():
        method.setup(rows)
    return total(method.double()(rows, 0.5), rows)


def test_every_method_over_logits_and_every_policy_takes_soft_labels_or_refuses_them_by_name() -> None:
    index = torch.arange(N) % C
    index[4] = -100
    one_hot = F.one_hot(index.clamp_min(0), C).double() * (index >= 0)[:, None]
    methods = [m for m in METHODS.values() if m.__module__.startswith("tempering.methods.logits")]
    made = [m.example for m in methods if m.__name__ != "FeatureCKD"]  # it compares features
    made += [partial(_with_policy, policy) for policy in POLICIES.values()]
    assert len(made) > 25
    for make in made:
        torch.manual_seed(0)
        name, expected = type(make()).__name__, loss_of(make(), index)
        if name in INDICES:
            with pytest.raises(
                ValueError, match=rf"{name} needs class indices, .* has soft labels \(12, 5\), .*--mixup"
            ):
                loss_of(make(), one_hot)
        else:
            torch.testing.assert_close(loss_of(make(), one_hot), expected, msg=name)


def test_soft_labels_that_are_none_are_refused() -> None:
    z = logits(0)
    for target, said in (
        (torch.full((N, C), 0.5), "are probabilities: >= 0, with a sum of 1"),
        (z, "Pass logits.softmax"),
        (soft_labels()[:, 1:], r"of the logits' shape \(12, 5\); got \(12, 4\)"),
        (torch.zeros(N, C, dtype=torch.int64), r"One-hot labels\? Pass labels.float\(\)"),
        (torch.zeros(N), "class indices as target, an integer tensor, or soft labels"),
    ):
        with pytest.raises(ValueError, match=said):
            Rows(z, z, target)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\]; got 1.5"):
        Rows(z, z, label_smoothing=1.5)


def test_labels_of_soft_labels() -> None:
    target = soft_labels()
    target[2] = 0.0
    assert is_labeled(target).tolist() == [i != 2 for i in range(N)]
    assert class_labels(target)[2] == -100 and torch.equal(class_labels(target)[3:], target[3:].argmax(-1))
    hidden = without_labels(target, torch.arange(N) == 5)
    assert not is_labeled(hidden)[5] and torch.equal(hidden[6:], target[6:])
    assert without_labels(torch.arange(3), torch.tensor([False, True, False])).tolist() == [0, -100, 2]
