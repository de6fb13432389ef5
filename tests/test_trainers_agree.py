"""The engine, the Trainer of transformers and Lightning compute one loss, one gradient and one set of scores."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from tempering.audits.calibration import Calibration
from tempering.integrations.huggingface import Labeled, Unpacked
from tempering.methods import KD
from tempering.rows import Rows, total
from tempering.tasks import Classification, LanguageModeling
from tempering.tasks.base import Task
from tests.cases import each
from tests.lazy_modules import needs
from tests.paths import ROOT
from tests.trainers import (
    LR,
    TRAINERS,
    Classifier,
    Data,
    Result,
    agree,
    expected,
    generated,
    language,
    loader,
    models,
    paired,
    points,
    stacked,
    texts,
)

pytestmark = [needs("transformers"), needs("accelerate"), needs("lightning")]


@cache
def by_hand(family: str, more: int, unmasked: bool) -> Result:
    result = expected(*models(family, more=more), texts(6, 0), texts(9, 1), unmasked=unmasked)
    assert all(result.scores[name] for name in ("accuracy", "agreement")), "scores of 0 would show little"
    return result


LAYOUTS = [
    ("right", "gpt2", 0),
    ("left", "gpt2", 8),
    ("packed", "gpt2", 0),
    ("one by one", "llama", 0),
    ("left", "llama", 0),
    ("micro-batches", "llama", 8),
    ("packed", "llama", 8),
    ("packed and masked", "llama", 0),
    ("left unmasked", "llama", 0),
    ("right unmasked", "gpt2", 8),
]


@pytest.mark.parametrize("trainer", TRAINERS)
@each("layout, family, more", LAYOUTS)
def test_texts_have_one_loss_gradient_and_scores(trainer: str, layout: str, family: str, more: int) -> None:
    """Labels are copied from the tokens, padding included, if the layout is unmasked."""
    got = TRAINERS[trainer](*models(family, more=more), language(layout), LanguageModeling())
    agree(got, by_hand(family, more, "unmasked" in layout))


@each(
    "trainer, batch, accumulate, evaluate",
    [(trainer, *size) for trainer in TRAINERS for size in ((12, 1, 10), (5, 3, 4), (4, 3, 1))],
)
def test_images_have_one_loss_gradient_and_scores(trainer: str, batch: int, accumulate: int, evaluate: int) -> None:
    """A third has no label and learns from the teacher alone; the last batches are smaller."""
    train, test, mapping = points(12, 0), points(10, 1), trainer == "transformers"
    student, teacher = (Classifier(*sizes, mapping=mapping) for sizes in ((5, 0), (7, 2)))
    plain = Classifier(5, 0, mapping=False)
    method = KD(soft=1.0, hard=1.0, temperature=4.0)

    def rows(part: list[dict[str, torch.Tensor]]) -> Rows:
        x, y = paired(part)
        return Rows(plain(x), teacher.net(x).detach(), y)

    loss = total(method(rows(train)), rows(train))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    with torch.no_grad():
        for p in plain.parameters():
            p -= LR * p.grad  # pyright: ignore[reportOperatorIssue]
        scored = rows(test)
    y, top = scored.target, scored.student.argmax(-1)
    assert y is not None
    scores = {"loss": float(total(method(scored), scored)), "accuracy": float((top == y)[y >= 0].double().mean())}
    scores["cross_entropy"] = float(torch.nn.functional.cross_entropy(scored.student.detach(), y))
    scores["agreement"] = float((top == scored.teacher.argmax(-1))[y >= 0].double().mean())

    data = Data(train, test, stacked if mapping else paired, batch, accumulate, evaluate)
    got = TRAINERS[trainer](student, teacher, data, Labeled() if mapping else Classification())
    agree(got, Result(float(loss.detach()), gradient.tolist(), scores))


def test_two_processes_have_one_loss_gradient_and_scores(tmp_path: Path) -> None:
    """Also where the sampler gives a process a text twice, to make the last batches equal, and of a sharded student."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "trainers"}
    command = [sys.executable, "-m", "tests.trainers", str(tmp_path / "out.json")]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors[0][-3000:]
    results = {name: Result(**result) for name, result in json.loads((tmp_path / "out.json").read_text()).items()}
    agree(results.pop("generated"), generated(*models("llama"), language("left")))
    for result in results.values():
        agree(result, by_hand("llama", 0, False))


# the audits


def calibrated(student: nn.Module, teacher: nn.Module, data: Data, task: Task | None) -> dict[str, float]:
    found = Calibration(draws=10, task=task)(student, teacher, loader(data, "test"))
    return {f"{f.of} {f.name}": f.value for f in found if f.value is not None and f.n}


def calibrated_by_hand(rows: Rows) -> dict[str, float]:
    """Of the labeled rows as a classification, whose inputs are the logits."""
    y = rows.target
    assert y is not None
    kept = y >= 0
    both = torch.cat((rows.student, rows.teacher), 1).detach()[kept]
    halves = [Half(0, rows.student.shape[1]), Half(rows.student.shape[1], both.shape[1])]
    found = Calibration(draws=10)(*halves, [(both, y[kept])])
    return {f"{f.of} {f.name}": f.value for f in found if f.value is not None and f.n}


class Half(nn.Module):
    """A model that returns some columns of its inputs."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.low : self.high]


@each("layout, family, more", LAYOUTS)
def test_texts_have_one_calibration(layout: str, family: str, more: int) -> None:
    """Of the tokens that are learned, whatever the padding and the order."""
    student, teacher = (model.eval() for model in models(family, more=more))
    parts = []
    for example in texts(9, 1):
        ids = torch.tensor([example.ids])
        learn = torch.tensor(example.learn)[1:] | ("unmasked" in layout)
        with torch.no_grad():
            z = student(input_ids=ids).logits[0, :-1][learn]
            parts.append((z, teacher(input_ids=ids).logits[0, :-1, : z.shape[1]][learn], ids[0, 1:][learn]))
    want = calibrated_by_hand(Rows(*(torch.cat(x) for x in zip(*parts, strict=True))))
    got = calibrated(student, teacher, language(layout), LanguageModeling())
    assert len(want) == 18 and got == pytest.approx(want, rel=1e-6, abs=1e-6)


@each("evaluate, mapping", [(10, False), (4, False), (1, False), (4, True)])
def test_images_have_one_calibration(evaluate: int, mapping: bool) -> None:
    """A third has no label; the last batches are smaller."""
    test = points(30, 1)
    student, teacher = (Classifier(*sizes, mapping=mapping) for sizes in ((5, 0), (7, 2)))
    x, y = paired(test)
    want = calibrated_by_hand(Rows(student.net(x), teacher.net(x).detach(), y))
    data = Data(test, test, stacked if mapping else paired, 4, evaluate=evaluate)
    models = (Unpacked(student), Unpacked(teacher)) if mapping else (student, teacher)
    for task in (Labeled(),) if mapping else (Classification(), None):
        got = calibrated(*models, data, task)
        assert len(want) == 18 and got == pytest.approx(want, rel=1e-6, abs=1e-6)
