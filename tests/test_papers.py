"""The papers' presets: configured methods with the published values, and an error where there are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.tools.papers_page import GOLDEN, made_by, page, parse_docstring, presets
from tempering.experiments import published as papers
from tempering.experiments.spec import method_from
from tempering.experiments.tune.space import format_call
from tempering.methods import DKD, KD, METHODS, MGD
from tempering.reports.paper_results import PUBLISHED, published, reported
from tempering.reports.records import pack, write_cell
from tempering.rows import total
from tempering.temperature import POLICIES, Curriculum, Instance  # pyright: ignore[reportAttributeAccessIssue]
from tests.conftest import random_rows
from tests.paths import ROOT, SHARED
from tests.records_made import make_run

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
        "differentiable": True,
    }
    rests = [papers.dkd(*pair).non_target for pair in papers.SAME if pair in papers.MDISTILLER]
    assert rests == [2.0, 2.0, 8.0, 6.0, 6.0, 6.0]
    assert papers.dkd("resnet34", "resnet18", data="imagenet").hyperparameters()["non_target"] == 0.5
    assert (papers.ttm("vgg13", "vgg8").soft, papers.ttm("vgg13", "vgg8").temperature.tau) == (45.0, 10.0)
    assert (papers.wttm("vgg13", "vgg8").soft, papers.wttm("resnet50", "mobilenetv1", data="imagenet").soft) == (
        2.25,
        3.5,
    )
    lskd = papers.lskd("resnet110", "resnet20")
    assert isinstance(lskd.inner, KD) and (lskd.inner.soft, lskd.inner.temperature.tau, lskd.hard) == (12.0, 4.0, 0.1)
    both = papers.lskd_dkd("resnet32x4", "resnet8x4").inner
    assert isinstance(both, DKD) and (both.target, both.non_target, both.temperature.tau) == (9.0, 72.0, 2.0)
    assert (
        papers.nkd("resnet34", "resnet18").non_target,
        papers.nkd("resnet34", "resnet18", data="imagenet").non_target,
    ) == (
        3.5,
        1.5,
    )
    assert (papers.uskd("resnet18").weak, papers.uskd("deit_tiny", data="imagenet").weak) == (0.1, 0.005)
    assert papers.r2kd("vgg13", "vgg8", published=True).rank == "published"
    assert papers.mlkd("resnet34", "resnet18", data="imagenet").temperatures == (1.0, 3.0, 5.0, 2.0, 6.0)
    assert not papers.ats("resnet110", "vgg8", published=True).centered
    assert papers.rld("resnet50", "mobilenetv1", data="imagenet").masked == 2.0
    reppoints = papers.fgd("RepPoints-RX101", "reppoints_r50")
    assert (reppoints.foreground, reppoints.background, reppoints.attention, reppoints.relation) == (
        1.6e-3,
        8e-4,
        8e-4,
        8e-6,
    )
    both = papers.inconsistent_mgd("cascade_mask_rcnn_rx101", "mask_rcnn_r50")
    assert isinstance(both.base, MGD) and (both.base.feature, both.base.masked) == (5e-7, 0.45)
    assert both.adversarial == 2.5e-7


def test_presets_invent_nothing() -> None:
    with pytest.raises(ValueError, match=r"published.dtkd has no values for resnet34 -> resnet18 on imagenet. It has"):
        papers.dtkd("resnet34", "resnet18", data="imagenet")
    with pytest.raises(ValueError, match=r"It has tiny_imagenet: resnet32x4 -> resnet8x4, .* configure the method"):
        papers.r2kd("resnet32x4", "resnet8x4", data="cifar100")


# every preset, and the page made of them


@pytest.mark.parametrize("name", presets())
def test_every_value_of_every_preset_can_be_typed(name: str) -> None:
    known = made_by(presets()[name])
    assert known and all(known.values())
    for pairs in known.values():
        for method in pairs.values():
            typed = method_from(format_call(method, whole=True))
            assert json.dumps(typed.hyperparameters()) == json.dumps(method.hyperparameters())


def test_presets_of_temperatures() -> None:
    ctkd = papers.ctkd("resnet34", "resnet18", data="imagenet")
    assert (ctkd.soft, ctkd.hard) == (1.0, 1.0)
    assert isinstance(ctkd.temperature, Curriculum) and ctkd.temperature.run_fraction == 5 / 120
    assert papers.ctkd("vgg13", "vgg8").hyperparameters()["soft"] == 0.9
    with pytest.raises(papers.UnknownPair, match=r"published.ctkd has no values for resnet32x4 -> resnet8x4"):
        papers.ctkd("resnet32x4", "resnet8x4")
    itkd = papers.itkd("resnet110", "resnet20", published=True).temperature
    assert isinstance(itkd, Instance) and itkd.form == "published"
    assert [papers.itkd_dkd(*pair).non_target for pair in (("resnet32x4", "resnet8x4"), ("resnet56", "resnet20"))] == [
        8,
        2,
    ]
    assert papers.normkd().hyperparameters()["temperature"] == {
        "name": "Standardized",
        "tau": 2.0,
        "scale": "teacher",
        "ddof": 1,
        "differentiable": True,
    }


def test_papers_md_is_up_to_date_and_lists_everything() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert text == page(ROOT / "benchmarks" / "results"), "docs/papers.md is out of date; make pages"
    for name in (*METHODS, *POLICIES):
        assert text.count(f"\n### {name}\n") == 1
    assert set(GOLDEN) <= {*METHODS, *POLICIES}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for named in {part for files in GOLDEN.values() for part in files.split(" and ")}:
        assert f'"{named.removesuffix(".npz")}"' in tests or named in tests, f"no test reads {named}"
        assert not (SHARED / "golden").is_dir() or (SHARED / "golden" / named).is_file()


def test_what_a_docstring_says() -> None:
    class Made:
        """a * (b - c),
        over rows of ``x``.

        As released, but for the sign. Stars * and under_scores stay.

        Args:
            eps: the released code adds 1e-8
                to the norm.
            size: of it.
            warmup: published: none.

        Nothing of interest.

        Reference: Somebody, 2024, arXiv:2401.00001.
        """

    equation, differs, reference = parse_docstring(Made)
    assert equation == "a * (b - c), over rows of x."
    assert differs == [
        r"As released, but for the sign. Stars \* and under\_scores stay.",
        "`eps`: the released code adds 1e-8 to the norm.",
    ]
    assert reference == "Somebody, 2024, arXiv:2401.00001."


def test_records_become_results(tmp_path: Path) -> None:
    for i, label in enumerate(("student alone", "KD", "DTKD exact")):
        for seed in range(2):
            run = make_run(tmp_path / "runs" / f"{i}-{seed}", label, seed, order=i)
            write_cell(tmp_path / "results" / "digits" / "records" / f"{i}-{seed}.json", pack(run))
    text = page(tmp_path / "results")
    (kd,) = re.findall(r"\n### KD\n.*?(?=\n### )", text, re.DOTALL)
    assert re.search(
        r"- KD: test accuracy \d\d\.\d\d ± \d\.\d\d %, best epoch \d\d\.\d\d, 2 seeds; [+-]\d\.\d\d to student alone "
        r"\(`benchmarks/results/digits`\)",
        kd,
    )
    (sharpness,) = re.findall(r"\n### Sharpness\n.*?(?=\n### )", text, re.DOTALL)
    assert "- DTKD exact: test accuracy" in sharpness and "- KD:" not in sharpness
    (dist,) = re.findall(r"\n### DIST\n.*?(?=\n### )", text, re.DOTALL)
    assert "**Measured.** Not measured." in dist


def test_reported_numbers_invent_nothing() -> None:
    assert reported("DKD", "ResNet32x4", "resnet-8x4", "cifar100") == pytest.approx(0.7632)
    assert reported("DTKD published", "resnet14", "resnet8", "CIFAR100") == pytest.approx(0.6288)
    assert reported("dist", "resnet34", "resnet18", "imagenet") == pytest.approx(0.7207)
    found = published("KD @ curriculum", "vgg13", "vgg8", "cifar100")
    assert found is not None and found.source == "CTKD's project page" and found.value == pytest.approx(0.7352)
    for label, pair, data in (
        ("DTKD exact", ("resnet14", "resnet8"), "cifar100"),  # not what the paper ran
        ("DTKD published", ("resnet32x4", "resnet8x4"), "cifar100"),  # its tables could not be seen
        ("dkd(non_target=2)", ("resnet32x4", "resnet8x4"), "cifar100"),
        ("KD", ("resnet14", "resnet20"), "cifar100"),
        ("KD", ("resnet32x4", "resnet8x4"), "digits"),
        ("r2kd", ("vgg13", "vgg8"), "cifar100"),
    ):
        assert reported(label, *pair, data) is None
    values = [found.value for table in PUBLISHED.values() for found in table.values()]
    assert len(values) > 150 and all(0.5 < value < 0.8 for value in values)
