"""recipes/language.py from a text file to records, and a killed on-policy run that goes on to the same bits."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering import distill
from tempering.data import Tokens
from tempering.methods import Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.tasks import LanguageModeling, OnPolicy, Speculative
from tests import recipes
from tests.test_generation import EOS, PAD, gpt2, texts


@pytest.mark.parametrize("source", ["data", "teacher", "on-policy", "speculative"])
def test_from_a_text_to_records(tmp_path: Path, source: str) -> None:
    text = tmp_path / "text.txt.gz"
    text.write_bytes(gzip.compress(b"to be, or not to be, that is the question: " * 40))
    sizes: dict[str, Any] = {"teacher_width": 32, "teacher_layers": 1, "student_width": 32, "student_layers": 1}
    sizes |= {
        "length": 16,
        "prompt_length": 4,
        "max_new_tokens": 4,
        "batch_size": 16,
        "epochs": 2,
        "teacher_epochs": 3,
        "lr": 1e-2,
    }
    common = {"text": text, "quiet": True}
    run = recipes.run("language", common | sizes | {"text_source": source, "out": tmp_path / "runs" / "one"})
    assert run.facts["label"] == ("DTKD exact" if source == "data" else f"DTKD exact, {source}")
    assert run.facts["status"] == "done" and run.facts["teacher"]["scores"]["test"]["loss"] < 4.0
    assert run.epochs[-1]["test"]["loss"] < run.epochs[0]["test"]["loss"] < 5.6
    if source == "data":
        there = {"out": tmp_path / "else" / "two", "teacher_dir": tmp_path / "runs" / "teachers"}
        recipes.run("language", common | sizes | there)
        assert not (tmp_path / "else" / "teachers").exists(), "a trained teacher is found where it lies"
        with pytest.raises(ValueError, match="its validation part has 86 bytes, length=128"):
            recipes.run("language", common | {"out": tmp_path / "runs" / "two"})


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(("score", "source"), [("rouge_l", "speculative"), ("answers", "on-policy")])
def test_pairs_are_learned_and_graded(tmp_path: Path, kind: str, score: str, source: str) -> None:
    fields = ("dialogue", "summary") if score == "rouge_l" else ("question", "answer")
    answer = "" if score == "rouge_l" else "#### "
    lines = [dict(zip(fields, (f"what is {i % 2} ?", f"{answer}{i % 2}"), strict=True)) for i in range(80)]
    lines.append({fields[0]: "too long", fields[1]: answer + "9" * 40})
    text = tmp_path / "pairs.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    sizes: dict[str, Any] = {"teacher_width": 32, "teacher_layers": 1, "student_width": 32, "student_layers": 1}
    sizes |= {"length": 24, "max_new_tokens": 8, "batch_size": 12, "epochs": 2, "teacher_epochs": 4, "lr": 3e-2}
    sizes |= {"text": text, "kind": kind, "quiet": True, "method": "divergence(hard=1)"}
    run = recipes.run("language", sizes | {"text_source": source, "out": tmp_path / "runs" / "one"})
    scores, family = run.epochs[-1]["test"], "gpt" if kind == "causal" else "t5"
    assert run.facts["student"]["name"] == f"{family}-1x32" and 0.0 <= scores[score] <= 1.0
    assert scores["loss"] < run.epochs[0]["test"]["loss"] and score in run.facts["teacher"]["scores"]["test"]
    if source == "on-policy":
        return
    with pytest.raises(ValueError, match=r"no pairs for train: 0 of 81 in pairs.jsonl have a target of at most"):
        recipes.run("language", sizes | {"out": tmp_path / "runs" / "two", "length": 1})
    plain = tmp_path / "plain.txt"
    plain.write_text("a b" * 200)
    if kind == "seq2seq":
        with pytest.raises(ValueError, match=r"seq2seq needs pairs, and plain\.txt is plain text"):
            recipes.run("language", sizes | {"out": tmp_path / "runs" / "three", "text": plain})


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("kind", ["on-policy", "speculative"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    def run(out: Path, kill: int | None = None) -> dict[str, torch.Tensor]:
        def on_step(step: int, loss: torch.Tensor) -> None:
            if step == kill:
                raise Killed

        student, teacher = gpt2(8, 3).float(), gpt2(12, 4).float()
        own: dict[str, Any] = {"max_new_tokens": 4, "eos": EOS, "pad": PAD, "generated_fraction": 0.7}
        data = Tokens(texts() * 3, batch_size=3, pad=PAD)
        source = OnPolicy(student, data, **own)
        if kind == "speculative":
            source = Speculative(student, teacher, data, top_k=60, **own)
        options: dict[str, Any] = {"task": LanguageModeling(), "epochs": 2, "checkpoint_every": 2, "selfcheck": False}
        adam = partial(torch.optim.Adam, lr=1e-2)
        distill(
            student,
            teacher,
            source,
            method=Divergence(),
            optimizer=adam,
            out=out,
            on_step=on_step,
            quiet=True,
            **options,
        )
        return student.state_dict()

    straight = run(tmp_path / "straight")
    for kill in (3, 7):
        with pytest.raises(Killed):
            run(tmp_path / f"killed{kill}", kill)
        resumed = run(tmp_path / f"killed{kill}")
        assert all(torch.equal(a, straight[name]) for name, a in resumed.items())
