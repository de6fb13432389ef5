"""Exposure of planted canaries: exact and sampled, of a model that learned them, in the audit, a run and its table."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.audits.canaries import UNSEEN, Canaries, as_bytes, log_likelihoods
from tempering.cli.main import main as command
from tempering.data import Tokens
from tempering.data.canaries import Canary, canaries
from tempering.data.text import make_prompt_example
from tempering.experiments.recipe import load
from tempering.methods import Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.reports.compare import compare
from tempering.reports.records import load_run
from tempering.reports.table import markdown
from tempering.tasks import LanguageModeling
from tests import recipes
from tests.lazy_modules import LazyModule, needs
from tests.paths import ROOT

pytestmark = needs("transformers")
transformers = LazyModule("transformers")


def gpt(width: int = 32, layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    drops: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 40, "vocab_size": 256}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes, **drops)
    ).eval()


class Markov(nn.Module):
    """Every byte's likelihood by the byte before it alone."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(spread * torch.randn(256, 256, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table[input_ids]


def test_likelihoods_are_those_of_each_sequence_by_itself() -> None:
    model = gpt()
    texts = [as_bytes(text) for text in ("pin 12", "pin 13", "pin 1", "a", "pin 12é", "zz top") if len(text) > 1]
    got = log_likelihoods(model, texts, batch=2)
    for ids, value in zip(texts, got, strict=True):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        want = sum(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1))
        assert math.isclose(float(value), want, rel_tol=1e-5)
    with pytest.raises(ValueError, match="two tokens at least; sequence 1 has 1"):
        log_likelihoods(model, [[1, 2], [3]])
    with pytest.raises(ValueError, match=r"with \(B, L, V\) logits, \(B, L\) being \(10, 1\) here; got \(10, 1\)"):
        Canaries([Canary("", "12", 1)]).exposures(Answers())


class Answers(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids.double()


def test_sampled_exposures_are_near_the_exact_ones() -> None:
    model, secrets = Markov(), [Canary(f"\n{c} is ", secret, 1) for c in "ab" for secret in ("4821", "0000", "9375")]
    exact = Canaries(secrets).exposures(model)
    sampled = Canaries(secrets, max_candidates=1, sampled=2000).exposures(model)
    for one, other in zip(exact.tolist(), sampled.tolist(), strict=True):
        share = 2.0**-one
        assert abs(2.0**-other - share) < 5 * math.sqrt(share / 2000) + 1 / 2000
    assert not torch.equal(Canaries(secrets, max_candidates=1, sampled=2000, seed=1).exposures(model), sampled)


def test_beyond_what_sampling_counts_a_tail_is_fitted() -> None:
    pytest.importorskip("scipy")
    model, digits = Markov(0.7), [ord(c) for c in "0123456789"]
    best, last = [], ord(" ")
    for _ in range(12):  # the likeliest digit each time, so near the first of 10^12
        last = digits[int(model.table[last, digits].argmax())]
        best.append(chr(last))
    secrets = [Canary("is ", "".join(best), 1)]
    (found,) = Canaries(secrets, sampled=200).exposures(model).tolist()
    assert math.log2(201) < found <= 12 * math.log2(10) + 1e-9


def memorized(secrets: list[Canary], epochs: int = 12) -> nn.Module:
    """A model trained on the canaries alone, each in a text by itself."""
    examples = [
        make_prompt_example(as_bytes(c.prompt[:1]), as_bytes(c.prompt[1:] + c.secret + c.end))
        for c in secrets
        for _ in range(c.repeats)
    ]
    model, data = gpt(48), Tokens(examples, batch_size=32)
    adam = partial(torch.optim.Adam, lr=1e-2)
    options: dict[str, Any] = {"task": LanguageModeling(), "selfcheck": False, "quiet": True}
    distill(model, None, data, method=Supervised(), optimizer=adam, epochs=epochs, **options)
    return model.eval()


def test_canaries_rank_by_how_often_they_were_learned() -> None:
    secrets = canaries((0, 1, 10, 100), each=6, digits=2, form="\n{name} has ")
    student = memorized(secrets)
    audit = Canaries(secrets)
    found = {f.name: f for f in audit(student, gpt(seed=3), []) if f.of in ("student", "both")}
    most = math.log2(100)
    assert [f.n for name, f in found.items() if name != "exposure_passed_on"] == [6] * 4
    value = {name: float(f.value) for name, f in found.items() if f.value is not None}
    assert value["exposure_100x"] == pytest.approx(most), "what was learned by heart is read off at once"
    assert value["exposure_100x"] >= value["exposure_10x"] > value["exposure_0x"]
    assert abs(value["exposure_0x"] - UNSEEN) < 1.6 and found["exposure_0x"].low is not None
    assert "about" not in found["exposure_1x"].meaning and "its exact rank among all" in found["exposure_1x"].meaning
    assert found["exposure_passed_on"].share and value["exposure_passed_on"] > 1.0, "an untrained teacher knows nothing"
    means = audit.means(student)
    assert means["exposure_10x"] == pytest.approx(value["exposure_10x"])
    planted = [means[f"exposure_{n}x"] for n in (1, 10, 100)]
    assert means["exposure"] == pytest.approx(sum(planted) / 3)


def test_unseen_canaries_have_the_mean_of_chance() -> None:
    secrets = canaries((0,), each=48, digits=2, seed=5)
    bits = Canaries(secrets).exposures(gpt(seed=1))
    assert abs(float(bits.mean()) - UNSEEN) < 4 * UNSEEN / math.sqrt(48)


def test_slips_are_named() -> None:
    with pytest.raises(
        ValueError, match="Canaries needs canaries, sampled >= 20, and max_candidates and batch >= 1; got 0, 1000"
    ):
        Canaries([])
    with pytest.raises(ValueError, match="got 1, 5"):
        Canaries([Canary("x", "1", 1)], sampled=5)


# the recipe


TINY: dict[str, Any] = {
    "teacher_width": 32,
    "teacher_layers": 1,
    "student_width": 32,
    "student_layers": 1,
    "canaries_per_count": 1,
}
TINY |= {
    "length": 32,
    "epochs": 1,
    "teacher_epochs": 1,
    "subset": 4000,
    "canary_digits": 2,
    "threads": 1,
    "quiet": True,
}


def test_from_made_up_text_to_an_audited_run_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        word for name, value in TINY.items() if name != "quiet" for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    for method in ("swing", "kd"):
        run = recipes.run("swing", TINY | {"method": method, "out": tmp_path / method})
        assert run.facts["status"] == "done" and run.facts["label"] == {"swing": "Swing", "kd": "KD"}[method]
        assert {"loss", "exposure", "exposure_0x", "exposure_100x"} <= set(run.epochs[-1]["test"])
        assert "exposure" not in run.epochs[-1]["validation"]
        taught = run.facts["teacher"]["scores"]["test"]
        assert 0.0 <= taught["exposure_100x"] <= 2 * math.log2(10) + 1e-9
    assert len(list((tmp_path / "teachers").glob("*/facts.json"))) == 1, "one teacher for both"
    made = compare([load_run(tmp_path / name) for name in ("swing", "kd")], "KD")
    assert made.metric.name == "test/exposure" and made.metric.lower and made.columns[-1].name == "test/loss"
    table = markdown(made)
    assert "| test exposure 100x | test loss |" in table and "| vs KD |" in table
    recipe = str(ROOT / "tempering" / "recipes" / "swing.py")
    audited = ["audit", str(tmp_path / "swing"), "--privacy", "--recipe", recipe, "--", "--method", "swing", *flags]
    assert command([*audited, "--out", str(tmp_path / "swing")]) == 0
    content = json.loads((tmp_path / "swing" / "audits.json").read_text())["audits"]["privacy"]
    names = {(f["of"], f["name"]) for f in content["findings"]}
    assert {("student", "exposure_100x"), ("teacher", "exposure_0x"), ("both", "exposure_passed_on")} <= names
    assert content["settings"]["canaries"][0]["repeats"] == 0
    assert "exposure 100x" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="its validation part has 100 characters, length=200"):
        recipes.describe("swing", TINY | {"method": "kd", "out": tmp_path / "short", "length": 200, "subset": 2000})


def test_the_recipe_s_detector_finds_what_was_planted() -> None:
    recipe = load(ROOT / "tempering" / "recipes" / "swing.py").__globals__
    text = recipe["_synthetic_text"](20_000)
    how: dict[str, Any] = {"length": 64, "batch_size": 8, "seed": 3}
    marked = recipe["_parts"](text, recipe["Patterns"](kinds=["number"]), 2, 3, **how)["train"]
    private = sum(p for example in marked.examples for p in example.privacy_score or ())
    assert 0.9 * 222 * 3 < private < 1.2 * 222 * 3, "each planted digit once, save where windows share or leave a byte"
