"""Samples on which student and teacher differ most: what a run records of them, and what the page shows."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.data import Batches
from tempering.data.text import windows
from tempering.data.tokens import Tokens
from tempering.methods import KD
from tempering.reports.page import render
from tempering.reports.records import load_run, pack, without_private
from tempering.tasks import Classification, LanguageModeling
from tempering.tasks.base import Task
from tempering.tasks.examples import class_examples, png, token_examples
from tests.runs import cut, go, points
from tests.test_reports import Page

HOSTILE = "<script>alert(1)</script>"


class Table(nn.Module):
    """Logits by the first pixel of an image, times 255; or by token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Any) -> Tensor:
        index = x["input_ids"] if isinstance(x, dict) else (x[:, 0, 0, 0] * 255).round().long()
        return self.logits[index]


def images(n: int) -> Batches:
    """n images whose first pixel is their number, without normalization; the class of each is 0."""
    pixels = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(n)
    names = ["cat", HOSTILE, "owl"]
    return Batches(pixels, torch.zeros(n, dtype=torch.long), batch_size=4, mean=(0.0,), std=(1.0,), class_names=names)


def tables() -> tuple[Table, Table]:
    """Both sides' logits of 10 samples, drawn far apart."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(10, 3, generator=rng) for _ in range(2))
    return Table(student), Table(teacher)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (torch.distributions.Categorical(logits=z.double()) for z in (teacher, student))
    return torch.distributions.kl_divergence(q, p)


def test_images_of_the_largest_divergence_are_found_over_all_batches() -> None:
    student, teacher = tables()
    found = class_examples(Classification(), student, images(10), lambda x, _: teacher(x), 3)
    kl = divergence(student.logits.detach(), teacher.logits.detach())
    order = kl.argsort(descending=True)[:3]
    assert [item["kl"] for item in found] == pytest.approx(kl[order].tolist(), rel=1e-5)
    for item, i in zip(found, order.tolist(), strict=True):
        q, p = (z.logits.detach()[i].softmax(-1) for z in (teacher, student))
        assert {k: (a, b) for k, a, b in item["classes"]} == {
            k: (pytest.approx(float(q[k]), abs=1e-4), pytest.approx(float(p[k]), abs=1e-4)) for k in range(3)
        }
        assert item["label"] == 0
        image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(item["png"])))
        assert image.size == (4, 4) and image.getpixel((0, 0)) == i, "the pixels are not normalized any more"


def test_an_image_is_small_and_has_its_colors() -> None:
    Image = pytest.importorskip("PIL.Image")
    red = torch.tensor([2.0, -1.0, -1.0])[:, None, None].expand(3, 400, 200)
    item = png(red, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    image = Image.open(io.BytesIO(base64.b64decode(item["png"])))
    assert image.size == (item["width"], item["height"]) == (48, 96)
    assert image.getpixel((10, 10)) == (255, 0, 0)
    assert png(torch.zeros(1, 8, 8))["png"], "a constant image without normalization"


def test_tokens_of_the_largest_divergence_are_found_with_their_text() -> None:
    rng = torch.Generator().manual_seed(1)
    student, teacher = (Table(3 * torch.randn(128, 128, generator=rng)) for _ in range(2))
    data = Tokens(windows(b"abcdefghijklmnopqrstuvwxyz012345", 8), batch_size=2, shuffle=False)
    data.decode = lambda ids: bytes(ids).decode()
    found = token_examples(LanguageModeling(), student, data, lambda x, _: teacher(x), 2)
    kl = divergence(student.logits.detach(), teacher.logits.detach())
    texts = ["abcdefgh", "hijklmno", "opqrstuv", "vwxyz012"]
    worst = sorted((max(kl[ord(c)].item() for c in text[:-1]), text) for text in texts)[::-1][:2]
    assert [item["kl"] for item in found] == pytest.approx([value for value, _ in worst], rel=1e-5)
    for item, (value, text) in zip(found, worst, strict=True):
        assert item["prompt"] + "".join(token for token, _ in item["tokens"]) == text
        assert [v for _, v in item["tokens"]] == pytest.approx([kl[ord(c)].item() for c in text[:-1]], abs=1e-4)
        at = item["at"]
        assert item["tokens"][at][1] == pytest.approx(value, abs=1e-4)
        token, q, p = item["likeliest"][item["label"]]
        before, after = ord(text[at]), ord(text[at + 1])
        assert token == text[at + 1]
        assert q == pytest.approx(teacher.logits[before].softmax(-1)[after].item(), abs=1e-4)
        assert p == pytest.approx(student.logits[before].softmax(-1)[after].item(), abs=1e-4)
        assert max(q for _, q, _ in item["likeliest"]) == pytest.approx(
            teacher.logits[before].softmax(-1).max().item(), abs=1e-4
        )


@pytest.mark.parametrize("inf", [1, 2])
def test_a_class_that_both_sides_exclude_is_no_difference(inf: int) -> None:
    student, teacher = tables()
    with torch.no_grad():
        student.logits[:, inf] = teacher.logits[:, inf] = -torch.inf
    found = class_examples(Classification(), student, images(10), lambda x, _: teacher(x), 10)
    kept = [k for k in range(3) if k != inf]
    kl = divergence(student.logits.detach()[:, kept], teacher.logits.detach()[:, kept])
    assert [item["kl"] for item in found] == pytest.approx(kl.sort(descending=True).values.tolist(), abs=1e-6)


def run_images(folder: Path, **more: Any) -> Any:
    student, teacher = tables()
    settings = {"epochs": 1, "test": images(10), "out": folder, "selfcheck": False, "teacher": teacher} | more
    return go(images(10), student=student, method=KD(), **settings)


def test_a_run_records_them_and_its_page_shows_them_escaped(tmp_path: Path) -> None:
    run_images(tmp_path / "run", examples=2)
    run = load_run(tmp_path / "run")
    assert run.analysis and len(run.analysis["examples"]) == 2
    html = render([run])
    page = Page(html)
    assert "cat" in page.texts["examples"] and HOSTILE in page.texts["examples"]
    assert "<script" not in html and html.count("data:image/png;base64,") == 2 and "img-src data:" in html
    assert "Where student and teacher differ most" not in render([without_private(run)]), "data are not published"
    assert "examples" not in pack(tmp_path / "run")["analysis"]


def test_none_are_recorded_where_none_are_wanted(tmp_path: Path) -> None:
    run_images(tmp_path / "run", examples=0)
    assert "examples" not in json.loads((tmp_path / "run" / "analysis.json").read_text())
    with pytest.raises(ValueError, match="examples must be 0 or more; got -1"):
        run_images(tmp_path / "2", examples=-1)


class Distance(Classification):
    """A task of its own, with a score of its own."""

    def score(self, student: nn.Module, batches: Any, *, teacher: Any = None) -> dict[str, float]:
        return {"distance": float(sum((student(x).detach() ** 2).mean() for x, *_ in batches))}

    def headline(self) -> tuple[str, bool]:
        return "distance", False

    def analyze(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    score_teacher = Task.score_teacher


class Broken(Classification):
    def examples(self, *args: Any) -> list[dict[str, Any]]:
        raise RuntimeError(f"no {HOSTILE} today")


def test_the_teachers_score_of_a_task_of_ones_own_is_on_the_page(tmp_path: Path) -> None:
    test = cut(points(16), 16)
    from tests.runs import teacher_net

    go(cut(points(16), 8), epochs=2, task=Distance(), test=test, out=tmp_path / "run", selfcheck=False)
    run = load_run(tmp_path / "run")
    value = Distance().score(teacher_net().eval(), test)["distance"]
    assert run.analysis and run.analysis["teacher_scores"]["distance"] == pytest.approx(value, rel=1e-6)
    page = Page(render([run]))
    assert f"{value:.4f}" in page.texts["header"] and "teacher" in "".join(page.svgs["score"].itertext())


def test_an_error_is_on_the_page_and_loses_no_run(tmp_path: Path) -> None:
    made = go(cut(points(16), 8), epochs=1, task=Broken(), test=cut(points(8), 8), out=tmp_path / "run")
    assert made.facts["status"] == "done"
    html = render([load_run(tmp_path / "run")])
    assert "Examples of KD could not be made: RuntimeError: no " in Page(html).texts["examples"]
    assert "<script" not in html
