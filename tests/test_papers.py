"""The papers' presets: configured methods with the published values, and an error where there are none."""

from __future__ import annotations

import json

import pytest

from tempering import papers
from tempering.methods import DKD, KD, METHODS
from tempering.rows import total
from tests.conftest import random_rows

PRESETS = {
    "kd": papers.kd,
    "dkd": papers.dkd,
    "dtkd": papers.dtkd,
    "dist": papers.dist,
    "ttm": papers.ttm,
    "wttm": papers.wttm,
    "lskd": papers.lskd,
    "lskd_dkd": papers.lskd_dkd,
    "rld": papers.rld,
    "erkd": papers.erkd,
    "mlkd": papers.mlkd,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_field_s_first_pair(name: str) -> None:
    method = PRESETS[name]("ResNet32x4", "resnet-8x4")
    assert type(method).__name__ in METHODS and json.dumps(method.hyperparameters())
    rows = random_rows(8, 6)
    rows.student.requires_grad_()
    loss = total(method(rows, 0.5), rows)
    loss.backward()
    assert loss.isfinite() and rows.student.grad is not None and rows.student.grad.isfinite().all()


def test_presets_are_the_papers() -> None:
    dtkd = papers.dtkd("wrn-40-2", "ShuffleNetV1")
    assert (dtkd.dynamic, dtkd.soft, dtkd.hard, dtkd.warmup) == (2.0, 0.5, 1.0, 20 / 240)
    published = papers.dtkd("resnet56", "resnet20", published=True)
    assert (published.dynamic, published.soft) == (1.0, 0.5)
    assert published.temperature.hyperparameters() == {
        "tau": 4.0,
        "solve": "published",
        "reach": 0.9,
        "attached": True,
    }
    rests = [papers.dkd(*pair).rest for pair in papers.SAME if pair in papers.MDISTILLER]
    assert rests == [2.0, 2.0, 8.0, 6.0, 6.0, 6.0]
    assert papers.dkd("resnet34", "resnet18", data="imagenet").hyperparameters()["rest"] == 0.5
    assert (papers.ttm("vgg13", "vgg8").soft, papers.ttm("vgg13", "vgg8").temperature.tau) == (45.0, 10.0)
    assert (papers.wttm("vgg13", "vgg8").soft, papers.wttm("resnet50", "mobilenetv1", data="imagenet").soft) == (
        2.25,
        3.5,
    )
    lskd = papers.lskd("resnet110", "resnet20")
    assert isinstance(lskd.inner, KD) and (lskd.inner.soft, lskd.inner.temperature.tau, lskd.hard) == (12.0, 4.0, 0.1)
    both = papers.lskd_dkd("resnet32x4", "resnet8x4").inner
    assert isinstance(both, DKD) and (both.target, both.rest, both.temperature.tau) == (9.0, 72.0, 2.0)
    assert (papers.nkd("resnet34", "resnet18").rest, papers.nkd("resnet34", "resnet18", data="imagenet").rest) == (
        3.5,
        1.5,
    )
    assert (papers.uskd("resnet18").weak, papers.uskd("deit_tiny", data="imagenet").weak) == (0.1, 0.005)
    assert papers.r2kd("vgg13", "vgg8", published=True).rank == "published"
    assert papers.mlkd("resnet34", "resnet18", data="imagenet").temperatures == (1.0, 3.0, 5.0, 2.0, 6.0)
    assert not papers.ats("resnet110", "vgg8", published=True).centred
    assert papers.rld("resnet50", "mobilenetv1", data="imagenet").masked == 2.0


def test_presets_invent_nothing() -> None:
    with pytest.raises(ValueError, match=r"papers.dtkd knows no values for resnet34 -> resnet18 on imagenet. It knows"):
        papers.dtkd("resnet34", "resnet18", data="imagenet")
    with pytest.raises(ValueError, match=r"It knows tiny_imagenet: resnet32x4 -> resnet8x4, .* configure the method"):
        papers.r2kd("resnet32x4", "resnet8x4", data="cifar100")
