"""Every way to a loss holds the contract: teachers read from disk, trainers, kernels compiled and not.

Each path gets the student's logits (B, T, V) of one batch of texts and finds its teacher by itself; the teacher's
logits are known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.conformance.adapters import GivenLogits
from tempering.conformance.definitions import kl
from tempering.data import Batches
from tempering.kernels import chunked, linear_loss
from tempering.methods import KD
from tempering.rows import Rows, total
from tempering.teachers import Cached, Live, TopKTeacher, record, record_hidden, record_top_k
from tests.test_hidden import TASK, data, gpt2, live

K = 5
pytest.importorskip("transformers")
# of torch itself, when Inductor is imported
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")


@dataclasses.dataclass
class Path_:
    """A loss of the student's logits, the teacher's logits that it finds, the valid rows, and the KL of one row."""

    loss: Callable[[Tensor], Tensor]
    teacher: Tensor
    valid: Tensor
    reference: Callable[[Tensor, Tensor], Tensor]

    def gradient(self, student: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().clone().requires_grad_()
        value = self.loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach().double(), gradient

    def expected(self, student: Tensor) -> float:
        rows = self.valid.nonzero(as_tuple=True)
        return float(self.reference(student[rows].double(), self.teacher[rows].double()).mean())


def method_at(tau: float) -> KD:
    return KD(soft=1.0, hard=0.0, temperature=tau)


def at_two(student: Tensor, teacher: Tensor) -> Tensor:
    return 4.0 * kl(student, teacher, 2.0)


def listed(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the K likeliest classes, the label, and the rest as one more."""
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, teacher.topk(K, -1).indices, True)
    inside = inside.scatter(-1, labels[:, None], True)
    rest = [torch.where(inside, -torch.inf, x).logsumexp(-1, keepdim=True) for x in (student, teacher)]
    both = [
        torch.cat((x.masked_fill(~inside, -torch.inf), r), -1) for x, r in zip((student, teacher), rest, strict=True)
    ]
    return kl(both[0], both[1], 1.0)


def texts(make: Callable[[Live, Any, Path], Any], tau: float, folder: Path) -> Path_:
    """The task's rows of a batch of texts whose teacher is recorded."""
    asked, batches = live(gpt2(12, 1)), data()
    teacher, batch = make(asked, batches, folder), next(iter(batches))
    _, inputs, ids = TASK.inputs(batch)
    with torch.no_grad():
        logits = asked(inputs, ids)

    def loss(student: Tensor) -> Tensor:
        (rows,) = TASK.rows(student, teacher(inputs, ids), batch)
        return total(method_at(tau)(rows), rows)

    logits = getattr(logits, "logits", logits).float()
    valid = torch.zeros(logits.shape[:2], dtype=torch.bool)
    number = torch.arange(valid.numel()).view(*valid.shape, 1).double().expand(logits.shape)
    (rows,) = TASK.rows(number, logits, batch)  # the number of every position that is a row
    valid.view(-1)[rows.student[:, 0].long()] = True
    assert rows.target is not None
    return Path_(loss, logits, valid, at_two if tau == 2.0 else partial(listed, rows.target))


def hidden(teacher: Live, batches: Any, folder: Path) -> Any:
    return record_hidden(teacher, batches, folder, inputs=TASK.inputs, precision="fp32", quiet=True)


def top_k(teacher: Live, batches: Any, folder: Path) -> Any:
    return record_top_k(TopKTeacher(teacher, top=K), batches, folder, inputs=TASK.inputs, quiet=True)


def given(classes: int = 7) -> tuple[Tensor, Tensor]:
    """Teacher's logits (2, 4, 7) and the valid positions."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.tensor([[True, True, False, True], [False, True, True, False]])
    return 2 * torch.randn(2, 4, classes, generator=generator), valid


def images(folder: Path) -> Path_:
    """Logits of eight images, recorded in float32 and looked up by their ids."""
    _, valid = given()
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    pixels, labels = torch.arange(0, 192, 2, dtype=torch.uint8).view(8, 3, 2, 2), torch.arange(8) % 7
    batches = Batches(pixels, labels, batch_size=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    record(Live(net), batches, folder, precision="fp32", quiet=True)
    inputs = torch.cat([x for x, _, _ in batches.clean()])
    with torch.no_grad():
        teacher = net(inputs).unflatten(0, (2, 4))
    cached, ids = Cached(folder, batches=batches), torch.arange(8).flip(0)

    def loss(student: Tensor) -> Tensor:
        sides = student.flatten(0, 1), cached(inputs, ids).flip(0)
        rows = Rows(*sides, weight=valid.flatten().float())
        return total(method_at(2.0)(rows), rows)

    return Path_(loss, teacher, valid, at_two)


def kernel(fused: bool, compile: bool, folder: Path) -> Path_:
    teacher, valid = given()
    head = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]

    def loss(student: Tensor) -> Tensor:
        wide = teacher.flatten(0, 1).to(torch.promote_types(student.dtype, torch.float32))
        student = student.flatten(0, 1)
        options: dict[str, Any] = {"memory": 1024, "compile": compile}
        weight = valid.flatten().float()
        if not fused:
            return chunked(method_at(2.0), Rows(student, wide, weight=weight), **options).loss
        if student.dtype == torch.bfloat16:  # the products of such a head would round the logits: no head at all
            sides = student, torch.eye(7, dtype=student.dtype), wide, torch.eye(7)
        else:
            sides = student @ head, head, wide @ head, head
        return linear_loss(method_at(2.0), *sides, weight=weight, **options).loss

    return Path_(loss, teacher, valid, at_two)


def lightning(folder: Path) -> Path_:
    pytest.importorskip("lightning")
    from tempering.integrations.lightning import DistillModule

    class Module(DistillModule):
        """A step without a trainer."""

        def _is_split(self) -> bool:
            return False

        def _progress(self) -> float:
            return 1.0

        def _log_step(self, means: dict[str, Tensor], rows: int | None = None) -> None:
            pass

    teacher, _ = given()
    labels = torch.tensor([[0, 1, 2, -100], [0, -100, 3, 4]])
    batch = {"input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels), "labels": labels}
    valid = torch.cat((labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)), 1)

    def loss(student: Tensor) -> Tensor:
        sides = GivenLogits(student), GivenLogits(teacher)
        module = Module(*sides, method=method_at(2.0), task=TASK, selfcheck=False)
        return module.training_step(batch, 0)

    return Path_(loss, teacher, valid, at_two)


PATHS: dict[str, Callable[[Path], Path_]] = {
    "logits from disk": images,
    "live texts": partial(texts, lambda teacher, batches, folder: teacher, 2.0),
    "hidden states from disk": partial(texts, hidden, 2.0),
    "likeliest tokens from disk": partial(texts, top_k, 1.0),
    "Lightning": lightning,
    "chunks": partial(kernel, False, False),
    "compiled chunks": partial(kernel, False, True),
    "from hidden states": partial(kernel, True, False),
    "compiled from hidden states": partial(kernel, True, True),
}


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path_:
    made = PATHS[request.param](tmp_path_factory.mktemp("path") / "stored")
    assert int(made.valid.sum()) >= 4 and not bool(made.valid.all())
    return made


def noise(path: Path_, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return scale * torch.randn(path.teacher.shape, generator=generator, dtype=torch.float64)


def test_value_is_the_mean_over_the_valid_rows(path: Path_) -> None:
    student = path.teacher.double() + noise(path, 1.0)
    value, _ = path.gradient(student)
    assert float(value) == pytest.approx(path.expected(student), rel=1e-3)


def test_gradient_is_the_slope_of_the_value(path: Path_) -> None:
    student, direction = path.teacher.double() + noise(path, 1.0), noise(path, 1.0)
    _, gradient = path.gradient(student)
    # far enough for float32
    up, down = (float(path.loss(student + h * direction)) for h in (0.02, -0.02))
    assert float((gradient * direction).sum()) == pytest.approx((up - down) / 0.04, rel=2e-3, abs=2e-4)


def test_zero_and_stationary_at_agreement(path: Path_) -> None:
    value, gradient = path.gradient(path.teacher.double())
    assert abs(float(value)) <= 1e-5 and float(gradient.abs().max()) <= 1e-3 * float(
        path.gradient(path.teacher.double() + noise(path, 1.0))[1].abs().max()
    )


@pytest.mark.parametrize("distance", [1.0, 0.03])
def test_bfloat16_far_from_and_near_agreement(path: Path_, distance: float) -> None:
    student = (path.teacher.double() + noise(path, distance)).bfloat16()
    value, gradient = path.gradient(student)
    assert float(value) == pytest.approx(path.expected(student), rel=0.01, abs=1e-6)
    assert gradient.dtype == torch.bfloat16 and bool(gradient.isfinite().all())


def test_ignored_rows_may_hold_nan_and_infinity(path: Path_) -> None:
    student = path.teacher.double() + noise(path, 1.0)
    broken = student.clone()
    broken[~path.valid] = torch.nan
    broken[~path.valid][:1] = torch.inf
    want, got = path.gradient(student), path.gradient(broken)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert not bool(got[1][~path.valid].any())
