"""recipes/robust.py: a robust teacher trained once, students of it attacked at the end, and a table of that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tempering.experiments.recipe import load
from tempering.reports.compare import compare
from tempering.reports.records import load_run
from tempering.reports.table import cells, markdown
from tests import recipes
from tests.paths import ROOT, SHARED, needs_shared
from tests.runs import left
from tests.test_audits_robustness import Linear, distance, images

main = load(ROOT / "tempering" / "recipes" / "robust.py")
recipe = sys.modules[main.__module__]
SMALL = {"teacher": "resnet8", "student": "resnet8", "epochs": 1, "subset": 100, "test_subset": 100, "batch_size": 50}
SMALL |= {"attack_steps": 1, "test_steps": 2, "selfcheck": False, "quiet": True, "threads": 1}


class Wrapped(nn.Module):
    """As the engine wraps a net: nobody may go backwards through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x).detach()


def test_accuracy_under_attack_is_that_of_the_distance() -> None:
    net, p = Linear(), images(200)
    y = net(p).argmax(-1)
    y[:20] = 1 - y[:20]
    eps = float(distance(net, p, "linf").detach().median())
    batches = [(p[:150], y[:150]), (p[150:], y[150:], torch.arange(50))]
    clean = recipe.Attacked(eps=0.0, steps=2).analyze(net, batches)["scores"]
    assert clean == {"fgsm": 0.9, "pgd": 0.9}
    for model in (net, Wrapped(net)):
        found = recipe.Attacked(eps=eps, steps=10).final_scores(model, batches)
        far = (distance(net, p, "linf") > eps) & (torch.arange(200) >= 20)
        assert found["pgd"] == pytest.approx(float(far.double().mean()), abs=0.011) and found["pgd"] <= found["fgsm"]
    assert net.weight.requires_grad and net.weight.grad is None


def test_the_teacher_s_method_gets_the_recipe_s_attack() -> None:
    made = recipe._teacher_loss("TRADES", 0.1, 3)
    assert (type(made).__name__, made.eps, made.attack_steps) == ("TRADES", 0.1, 3)
    assert recipe._teacher_loss("pgdat(eps=0.2)", 0.1, 3).eps == 0.2
    assert type(recipe._teacher_loss("supervised", 0.1, 3)).__name__ == "Supervised"
    with pytest.raises(ValueError, match="the teacher is trained without one, and kd needs one"):
        recipe._teacher_loss("kd", 0.1, 3)


@needs_shared
def test_a_table_of_students_of_one_robust_teacher(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    given = SMALL | {"data": SHARED / "data" / "cifar100", "teacher_dir": tmp_path / "teachers", "seed": 0}
    runs = [recipes.run("robust", given | {"method": m, "out": tmp_path / m}) for m in ("kd", "kdiga")]
    made = list((tmp_path / "teachers").glob("resnet8-*/facts.json"))
    assert len(made) == 1 and load_run(made[0].parent).facts["method"]["name"] == "PGDAT"
    for r in runs:
        score = r.last["test"]
        assert 0 <= score["pgd"] <= score["fgsm"] <= score["accuracy"] <= 1
        assert r.facts["data"]["name"] == "cifar100"
    assert set(runs[1].facts["teacher"]["scores"]["test"]) >= {"accuracy", "fgsm", "pgd"}
    assert "pgd" not in left(tmp_path / "kd")["lines"]["epochs.jsonl"][-1]["test"], "the attack comes once, at the end"
    found = compare([load_run(tmp_path / m) for m in ("kd", "kdiga")])
    row = cells(found, found.group("KD"))
    assert found.metric.name == "test/accuracy" and {"test fgsm (%)", "test pgd (%)"} <= set(row)
    assert row["test pgd (%)"][0] == f"{100 * runs[0].last['test']['pgd']:.2f}" and "test pgd (%)" in markdown(found)


@needs_shared
def test_features_are_tapped_inside(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    data = SHARED / "data" / "cifar100"
    own = {"data": data, "method": "fitnet", "teacher_method": "supervised", "out": tmp_path / "fitnet"}
    r = recipes.run("robust", SMALL | own)
    assert r.last["test"]["pgd"] <= r.last["test"]["accuracy"]
