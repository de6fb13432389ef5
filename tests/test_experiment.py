"""A described run: nothing happens when it is made, and it runs as distill() does, to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tempering.data import Batches
from tempering.methods import KD, Supervised
from tempering.teachers import Live, Teacher
from tempering.training.config import TrainConfig
from tempering.training.distill import distill
from tempering.training.experiment import Experiment, TeacherRecipe, UntrainedTeacherError
from tempering.training.logit_cache import LogitCache
from tests.runs import SGD, cut, flattened, identical, left, points, student_net, teacher_net

CONFIG = TrainConfig(epochs=2, quiet=True, accelerator="cpu", log_every=1)


def images() -> Batches:
    """Points as images of 1 x 2 x 3 pixels."""
    x, y = points(60)
    pixels = (255 * x.sigmoid()).to(torch.uint8).view(60, 1, 2, 3)
    return Batches(pixels, y, batch_size=20, mean=(0.5,), std=(0.25,), shuffle=True)


def made(folder: Path | None = None, **changes: Any) -> Experiment:
    batches = cut(points(40), 8)
    fields: dict[str, Any] = {"student": student_net(), "teacher": teacher_net(), "train": batches, "test": batches}
    fields |= {"method": KD(), "optimizer": SGD, "config": CONFIG, "out": folder}
    return Experiment(**fields | changes)


def trained_teacher(folder: Path, **changes: Any) -> TeacherRecipe:
    """A linear teacher of the points' images."""

    def train(model: nn.Module) -> Experiment:
        config = CONFIG.for_teacher(20)
        return Experiment(student=model, train=images(), test=images(), method=Supervised(), config=config)

    fields: dict[str, Any] = {"name": "linear", "build": build, "train": train, "folder": folder}
    return TeacherRecipe(**fields | changes)


def build() -> nn.Module:
    torch.manual_seed(3)
    return flattened(nn.Linear(6, 5))


def test_it_runs_as_distill_does(tmp_path: Path) -> None:
    made(tmp_path / "described").run()
    options: dict[str, Any] = {"method": KD(), "optimizer": SGD, "epochs": 2, "quiet": True, "log_every": 1}
    batches = cut(points(40), 8)
    out = tmp_path / "called"
    distill(student_net(), teacher_net(), batches, test=batches, accelerator="cpu", out=out, **options)
    assert identical(left(tmp_path / "described"), left(tmp_path / "called"))
    facts = [json.loads((tmp_path / name / "facts.json").read_text()) for name in ("described", "called")]
    assert facts[0]["settings"] == facts[1]["settings"] and "clip" in facts[0]["settings"]


def test_making_and_checking_write_and_train_nothing(tmp_path: Path) -> None:
    student = flattened(student_net())
    cache = LogitCache(batches=images(), folder=tmp_path / "teachers", views=2, quiet=True)
    for teacher in (trained_teacher(tmp_path / "teachers"), trained_teacher(tmp_path / "teachers", cache=cache)):
        before = [p.clone() for p in student.parameters()]
        run = made(tmp_path / "run", student=student, teacher=teacher, train=images(), test=images())
        checked = run.check()
        assert checked.checks["above chance"] == "the teacher is not trained yet"
        assert checked.checks["training of the teacher linear"] == "ok"
        assert not list(tmp_path.iterdir())
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_a_teacher_is_trained_when_it_is_needed_and_then_found(tmp_path: Path) -> None:
    source = trained_teacher(tmp_path / "teachers")
    run = made(None, student=flattened(student_net()), teacher=source, train=images(), test=images())
    with pytest.raises(UntrainedTeacherError, match=r"the teacher linear is not trained: there are no weights in "):
        run.with_teacher("present")
    assert not source.is_trained
    done = run.run()
    assert source.is_trained and done.facts["teacher"]["scores"]["test"]["accuracy"] > 0.3
    assert done.facts["teacher"]["parameters"] == 35
    found = run.with_teacher("present").resolved_teacher
    assert found is not None and found.identity == done.facts["teacher"]["identity"]
    assert "training of the teacher linear" not in run.check().checks and run.check().checks["above chance"][:2] == "ok"


def test_a_cached_teacher_is_recorded_and_its_views_are_replayed(tmp_path: Path) -> None:
    cache = LogitCache(batches=images(), folder=tmp_path, views=2, quiet=True)
    source = trained_teacher(tmp_path, cache=cache)
    run = made(None, student=flattened(student_net()), teacher=source, train=images(), test=images())
    done = run.run()
    assert done.facts["teacher"]["calls"] == 120 and len(list(tmp_path.glob("answers-*-2-0"))) == 1
    live = run.with_teacher("present", cached=False)
    assert isinstance(live.resolved_teacher, Live) and live.train is run.train


def test_a_search_does_not_see_the_test_split(tmp_path: Path) -> None:
    run = made(None, student=flattened(student_net()), teacher=trained_teacher(tmp_path), train=images(), test=images())
    with pytest.raises(ValueError, match="a search scores its trials on a validation split"):
        run.without_test()
    blind = replace(run, validation=images()).without_test()
    done = blind.run()
    assert set(done.last) == {"epoch", "validation"} and done.facts["teacher"]["scores"] == {}
    assert run.test is not None, "the experiment itself is as it was"


def test_what_depends_on_the_teacher_is_made_with_it() -> None:
    seen: list[Teacher] = []

    def bind(experiment: Experiment, teacher: Teacher) -> Experiment:
        seen.append(teacher)
        return replace(experiment, teacher=None, method=Supervised(), facts={"label": "bound"})

    run = made(bind_teacher=bind)
    assert not seen
    done = run.run()
    assert len(seen) == 1 and isinstance(seen[0], Live)
    assert done.facts["label"] == "bound" and done.facts["teacher"] is None


def test_options_are_validated_when_it_is_made() -> None:
    for options, message in (
        ({}, "give either steps= or epochs="),
        ({"epochs": 0}, "epochs must be 1 or more; got 0"),
        ({"epochs": 1, "max_grad_norm": 0}, "max_grad_norm must be > 0; got 0"),
        ({"epochs": 1, "compile": "fast"}, "compile must be True, False or a mode"),
    ):
        with pytest.raises(ValueError, match=message):
            made(config=TrainConfig(**options))
    assert made(config=replace(CONFIG, steps=3)).run().facts["result"]["steps"] == 3, "steps override epochs"


def test_the_teacher_s_options_are_its_own() -> None:
    config = TrainConfig(epochs=9, seed=4, precision="bf16-mixed", accumulate=2, devices=2, quiet=True, patience=1)
    assert config.for_teacher(5) == TrainConfig(epochs=5, precision="bf16-mixed", quiet=True)
    assert config.changed("precision", "resume") == {"precision": "bf16-mixed"}
    assert config.record()["clip"] is None and "threads" not in config.record()


def test_a_partial_teacher_recipe_of_given_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(build().state_dict(), tmp_path / "w.safetensors")
    source = trained_teacher(tmp_path, weights=tmp_path / "w.safetensors", wrap=partial(Live, precision="bf16"))
    assert source.is_trained
    teacher, facts = source.make("present", lambda model: None)
    assert teacher.trained and facts["name"] == "linear" and facts["parameters"] == 35
    assert facts["weights"].endswith("w.safetensors: 2 tensors")
    assert teacher.model is not None and next(teacher.model.parameters()).dtype == torch.bfloat16
