"""GLUE's format from files to batches, text classification as a task, and recipes/glue.py from files to records."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering import distill
from tempering.data import TextPairLoader
from tempering.data.glue import Labeled, read_glue, trained_tokenizer
from tempering.experiments.recipe import flags, load
from tempering.methods import KD, Interactive
from tempering.methods.base import Step
from tempering.methods.step._holdout import HoldoutLoader
from tempering.methods.step._virtual_step import VirtualStep, split_step
from tempering.tasks import TextClassification
from tempering.teachers import Live, record
from tests import recipes
from tests.paths import ROOT, SHARED, needs_shared
from tests.runs import LOADERS, flattened, go, identical, left, stop_at
from tests.runs import student_net as plain_student
from tests.runs import teacher_net as plain_teacher

recipe = sys.modules[load(ROOT / "tempering" / "recipes" / "glue.py").__module__]
GOOD, BAD = ("good", "fine", "lovely", "warm"), ("bad", "dull", "awful", "cold")
SMALL: dict[str, Any] = {"teacher": "1x32", "student": "1x16", "length": 16, "vocabulary": 300, "quiet": True}
SMALL |= {"batch_size": 8, "lr": 1e-2, "teacher_lr": 1e-2}


def texts(n: int, *, pair: bool = False) -> Labeled:
    """Whether a text is kind; of a pair, whether both say the same."""
    found = [(f"a {GOOD[i % 4]} film" if i % 2 else f"a {BAD[i // 2 % 4]}, dull film no. {i}", i % 2) for i in range(n)]
    if not pair:
        return Labeled([(text,) for text, _ in found], [label for _, label in found])
    other = [(f"this is {'good' if i % 3 else 'bad'}", i % 3 > 0) for i in range(n)]
    both = zip(found, other, strict=True)
    return Labeled(
        [(a, b) for (a, _), (b, _) in both], [int(y == z) for (_, y), (_, z) in zip(found, other, strict=True)]
    )


def lines(part: Labeled, *keys: str) -> str:
    rows = [dict(zip(keys, text, strict=True)) | {"label": y} for text, y in zip(part.texts, part.labels, strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "kind"
    place.mkdir()
    (place / "train.jsonl.gz").write_bytes(gzip.compress(lines(texts(48), "sentence").encode()))
    (place / "dev.jsonl").write_text(lines(texts(12), "sentence"))
    (place / "test.jsonl").write_text(lines(texts(20), "sentence"))
    return place


def batches(n: int = 24, **options: Any) -> TextPairLoader:
    part = texts(n, pair=True)
    return TextPairLoader(
        part, trained_tokenizer(part.texts, vocabulary=300), **{"batch_size": 8, "length": 16, **options}
    )


def bert(layers: int = 1, width: int = 16, seed: int = 0, **options: Any) -> Any:
    tokenizer = trained_tokenizer(texts(24, pair=True).texts, vocabulary=300)
    net = recipe._build(f"{layers}x{width}", tokenizer, classes=2, length=16, dropout=0.1, seed=seed)
    TextClassification().prepare_model(net)
    return net


# reading


def test_keys_are_found_and_errors_say_what_is_wanted(folder: Path) -> None:
    found = read_glue(folder)
    assert {split: len(part.texts) for split, part in found.items()} == {"train": 48, "validation": 12, "test": 20}
    assert found["train"].texts[1] == ("a fine film",) and found["train"].labels[:2] == [0, 1]
    for name in ("train.jsonl.gz", "dev.jsonl"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no train split: it holds test\.jsonl"):
        read_glue(folder)
    (folder / "train.jsonl").write_text(lines(texts(9, pair=True), "premise", "hypothesis"))
    with pytest.raises(ValueError, match=r"sentences per text are \{'train': 2, 'test': 1\}"):
        read_glue(folder)
    (folder / "dev.jsonl").write_text(lines(texts(6, pair=True), "premise", "hypothesis"))
    (folder / "test.jsonl").write_text(lines(texts(6, pair=True)._replace(labels=[-1] * 6), "premise", "hypothesis"))
    found = read_glue(folder)
    assert {split: len(part.texts[0]) for split, part in found.items()} == {"train": 2, "test": 2}
    assert len(found["test"].texts) == 6 and min(found["test"].labels) == 0  # the dev split: test's labels are hidden


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"sentences": "a", "label": 1}',
            "line 1: got sentences: str, label: int; each line needs an object.* or sentence or",
        ),
        (
            '{"sentence": "a", "label": "entailment"}',
            "got sentence: str, label: str; each line needs .* texts sentence, and an",
        ),
        ('{"sentence": "a"}', "got sentence: str; each line needs"),
        ("[1]", r"got '\[1\]'; each line needs"),
        ('\n{"sentence": "a', r"line 2: got '\{\"sentence\": \"a'; each line needs"),
        ('{"sentence": "a", "label": 2}', r"the validation split has the labels \{2\}, which no training text has"),
        ("", "contains no examples"),
    ],
)
def test_a_line_that_does_not_fit_is_named(folder: Path, line: str, said: str) -> None:
    (folder / "dev.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        read_glue(folder)


def test_one_class_is_refused(folder: Path) -> None:
    (folder / "train.jsonl").write_text(lines(texts(6)._replace(labels=[1] * 6), "sentence"))
    with pytest.raises(ValueError, match=r"two or more classes are needed; the labels of the training texts are \{1\}"):
        read_glue(folder)


@needs_shared
def test_the_packed_sets_are_read() -> None:
    sizes = {
        name: {split: len(part.texts) for split, part in read_glue(SHARED / "data" / "text" / name).items()}
        for name in ("glue_sst2", "glue_mrpc", "glue_cola")
    }
    assert sizes["glue_sst2"] == {"train": 67_349, "validation": 872, "test": 1_821}
    assert sizes["glue_mrpc"] == {"train": 4_076, "test": 1_725} and sizes["glue_cola"]["test"] == 1_043


# batches


def test_batches_are_padded_pairs_and_begin_anywhere() -> None:
    data = batches(22, shuffle=True, seed=3)
    data.set_epoch(2)
    whole = list(data)
    assert [len(y) for _, y, _ in whole] == [8, 8, 6]
    assert sorted(torch.cat([i for *_, i in whole]).tolist()) == list(range(22))
    for (a, y, i), (b, z, j) in zip(whole[1:], data.iterate(1), strict=True):
        assert torch.equal(y, z) and torch.equal(i, j) and all(torch.equal(a[name], b[name]) for name in a)
    inputs, labels, ids = whole[0]
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"} and inputs["token_type_ids"].max() == 1
    assert inputs["attention_mask"].any(0).all() and (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()
    again, _, _ = data.gather(ids)
    assert torch.equal(again["input_ids"], inputs["input_ids"]) and torch.equal(labels, data.labels[ids])
    data.set_epoch(3)
    assert not torch.equal(next(iter(data))[2], ids)
    halves = [next(iter(data.shard(rank, 2)))[2] for rank in range(2)]
    assert torch.equal(torch.cat(halves), next(iter(data))[2])


def test_subsets_hold_outs_and_what_is_refused() -> None:
    data = batches(24)
    few = data.subset(6)
    assert few.size == 6 and few.identity != data.identity and data.subset(24) is data
    ones, all_ones = int(few.gather(torch.arange(6))[1].sum()), int(data.labels.sum())
    assert abs(ones - 6 * all_ones / 24) < 1
    rest, held = data.split(5)
    assert {*rest.index} | {*held.index} == {*range(24)} and (rest.size, held.size) == (19, 5) and not held.shuffle
    assert next(iter(held))[2].tolist() == [0, 1, 2, 3, 4]  # ids count within a split
    for call, said in ((lambda: data.subset(0), "cannot take 0 of 24"), (lambda: data.split(24), "cannot hold out 24")):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match="got 0 texts, 0 labels"):
        TextPairLoader(Labeled([], []), None)
    with pytest.raises(ValueError, match="they have no 2 views"):
        data.replay(2)


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "from tests.test_glue import texts, trained_tokenizer as t;"
        "print(t(texts(24, pair=True).texts, vocabulary=300).backend_tokenizer.to_str())"
    )
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout]
    said.append(trained_tokenizer(texts(24, pair=True).texts, vocabulary=300).backend_tokenizer.to_str() + "\n")
    assert said[0] == said[1] and "Ġfilm" in said[0]


def test_two_tokenizers_read_the_same_texts(tmp_path: Path) -> None:
    """The teacher's inputs are its own, in training, in scores and in a recording."""
    part = texts(24)
    ours, theirs = (trained_tokenizer(part.texts, vocabulary=v) for v in (300, 280))
    data = TextPairLoader(part, ours, teacher_tokenizer=theirs, batch_size=8)
    task, batch = TextClassification(), next(iter(data))
    student_in, teacher_in, ids = task.inputs(batch)
    alone = TextPairLoader(part, theirs, batch_size=8)
    assert torch.equal(teacher_in["input_ids"], next(iter(alone))[0]["input_ids"]) and ids is not None
    assert not torch.equal(student_in["input_ids"][:, :3], teacher_in["input_ids"][:, :3])
    teacher = bert(seed=5)
    cached = record(Live(teacher), data, tmp_path / "cache", quiet=True)
    said = teacher(teacher_in).logits
    assert torch.allclose(cached(None, ids), said, atol=2e-3)
    settings: dict[str, Any] = {"method": KD(), "task": task, "epochs": 1, "quiet": True, "selfcheck": False}
    run = distill(bert(), cached, data, test=alone, **settings)
    assert set(run.last["test"]) == {"accuracy", "loss", "ece", "f1"}


# the task


def test_f1_and_accuracy_by_hand() -> None:
    class Says(torch.nn.Module):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return inputs["z"]

    z = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([1, 0, 1, 0, 1])  # 2 right of 3 said to be 1, of 3 that are
    scores = TextClassification().score(Says(), [({"z": z}, y)])
    assert scores["accuracy"] == pytest.approx(0.6) and scores["f1"] == pytest.approx(2 / 3)
    assert "f1" not in TextClassification().score(Says(), [({"z": torch.eye(3)}, torch.arange(3))])
    with pytest.raises(ValueError, match=r"inputs that are a mapping, with input_ids .* got Tensor"):
        TextClassification().inputs((z, y))


def test_models_are_asked_by_name_without_what_they_do_not_take() -> None:
    class Takes(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.stack((input_ids.sum(1), attention_mask.sum(1)), 1).float()

    task, net, (inputs, _, _) = TextClassification(), Takes(), next(iter(batches()))
    for _ in range(2):
        task.prepare_model(net)
    assert len(net._forward_pre_hooks) == 1 and net(inputs)[:, 1].tolist() == inputs["attention_mask"].sum(1).tolist()


# Interactive on texts


def test_both_forms_of_the_exam_s_gradient_on_a_transformer() -> None:
    """The forward-mode form is that of double backward through attention, and the difference near it; dropout is on."""
    found: dict[str, list[torch.Tensor]] = {}
    for derivative in ("exact", "difference"):
        student, teacher = bert().double().train(), bert(2, seed=1).double()
        taught, method = Live(teacher), Interactive(virtual_lr=0.5, derivative=derivative)
        inputs, labels, ids = next(iter(batches()))
        batch, task = (inputs, labels, ids), TextClassification()
        step = Step(
            student, taught, inputs, inputs, ids, batch, 1.0, task.rows, teacher_with_grad=taught.forward_with_grad
        )
        parts = split_step(step, 0.5)
        assert parts is not None and [len(p.student_inputs["input_ids"]) for p in parts] == [4, 4]
        torch.manual_seed(0)
        told, T = method.feedback(VirtualStep(student), *parts)
        weights = [p.requires_grad_() for p in teacher.parameters()]
        loss = method.teacher_loss(parts[0], told, T)
        found[derivative] = list(torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True))
    largest = max(float(g.abs().max()) for g in found["exact"])
    apart = max(float((a - b).abs().max()) for a, b in zip(found["exact"], found["difference"], strict=True))
    assert largest > 1e-6 and 0.0 < apart < 1e-3 * largest


def test_held_out_samples_are_examined_and_never_learned() -> None:
    data = batches(40, shuffle=True, seed=1)
    exams = HoldoutLoader(data, holdout=10, fraction=0.25)
    assert len(exams) == 4 and exams.identity == data.identity
    learned, examined = [], []
    for epoch in range(2):
        exams.set_epoch(epoch)
        walked = list(exams)
        sizes = [len(ids) for *_, ids in walked]
        assert sizes == [11, 11, 11, 8]  # 8 and 3 of them, 6 and 2
        for (*_, ids), held in zip(walked, (3, 3, 3, 2), strict=True):
            learned += ids[:-held].tolist()
            examined += ids[-held:].tolist()
        assert [ids.tolist() for *_, ids in exams.iterate(2)] == [ids.tolist() for *_, ids in walked[2:]]
    assert sorted(learned) == sorted(2 * sorted(set(learned))) and len(set(learned)) == 30
    assert set(examined) == set(range(40)) - set(learned)
    for batch, held in zip(HoldoutLoader(data, holdout=10, fraction=0.25), (3, 3, 3, 2), strict=True):
        inputs, _, ids = batch
        parts = split_step(
            Step(bert(), lambda x, i: x, inputs, inputs, ids, batch, 1.0, TextClassification().rows), 0.25
        )
        assert parts is not None and len(parts[1].batch[1]) == held
    words = r"holdout=2.* and list has no \.gather\. Use data\.Batches, data\.TextPairLoader or holdout=0"
    with pytest.raises(TypeError, match=words):
        HoldoutLoader([1, 2], holdout=2, fraction=0.5)
    with pytest.raises(ValueError, match="holdout=40 of 40 training samples leaves none"):
        HoldoutLoader(data, holdout=40, fraction=0.5)
    with pytest.raises(ValueError, match="Interactive needs holdout >= 0, samples held out for exams; got -1"):
        Interactive(holdout=-1)


def test_the_course_is_on_what_is_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that the engine's loss is of are those of the lesson, and the exam is on the held ones."""
    seen: list[tuple[int, int]] = []
    method, exam = Interactive(holdout=8, exam_fraction=0.5), Interactive._exam
    monkeypatch.setattr(
        Interactive, "_exam", lambda self, a, b: (seen.append((len(a.ids), len(b.ids))), exam(self, a, b))
    )
    run = distill(
        bert(),
        bert(2, seed=1),
        batches(),
        method=method,
        task=TextClassification(),
        epochs=1,
        quiet=True,
        selfcheck=False,
    )
    assert seen == [(8, 8), (8, 8)] and run.facts["result"]["steps"] == 2
    assert run.facts["method"]["holdout"] == 8


def test_interactive_on_texts_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    def run(out: Path, **more: Any) -> None:
        settings: dict[str, Any] = {"epochs": 3, "checkpoint_every": 2, "selfcheck": False, "quiet": True}
        method = Interactive(holdout=6, teacher_lr=1e-3)
        data = batches(shuffle=True)
        adam = partial(torch.optim.AdamW, lr=1e-3)
        models = bert(), bert(1, 32, seed=1)
        settings |= {"task": TextClassification(), "optimizer": adam, "validation": batches()}
        distill(*models, data, method=method, out=out, **settings, **more)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_step=stop_at(4))
    run(tmp_path / "stopped")
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))


# the recipe


def test_from_files_to_records(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    given = SMALL | {"data": folder, "teacher_epochs": 8}
    cached = {"method": "kd", "teacher_cache": True, "epochs": 3, "out": out / "kd"}
    run = recipes.run("glue", given | cached)
    assert run.facts["status"] == "done" and run.facts["best_by"] == "validation/accuracy"
    assert run.facts["teacher"]["scores"]["test"]["accuracy"] > 0.9 and run.facts["teacher"]["calls"] == 48
    assert {"accuracy", "f1", "loss"} <= set(run.last["test"]) and run.last["test"]["accuracy"] > 0.7
    assert run.facts["data"]["name"] == "kind" and run.facts["student"]["name"] == "bert-1x16"
    held = {"method": "interactive(holdout=12)", "subset": 32, "epochs": 2, "out": out / "i"}
    other = recipes.run("glue", given | held)
    teachers = [path.name for path in (out / "teachers").iterdir() if path.is_dir() and "answers" not in path.name]
    assert len(teachers) == 1 and other.facts["teacher"]["scores"] == run.facts["teacher"]["scores"]
    with pytest.raises(ValueError, match=r"Interactive trains its teacher, so its logits cannot be cached\. Omit"):
        recipes.describe("glue", given | {"method": "interactive", "teacher_cache": True})
    with pytest.raises(ValueError, match=r"kind has its own validation split \(12 texts\)\. Omit --validation"):
        recipes.describe("glue", given | {"method": "supervised", "validation": 4})


def test_a_local_folder_as_teacher_with_a_tokenizer_of_its_own(folder: Path, tmp_path: Path) -> None:
    part = texts(24)
    tokenizer = trained_tokenizer(part.texts, vocabulary=280)
    recipe._build("1x32", tokenizer, classes=2, length=16, dropout=0.1, seed=2).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    options: dict[str, Any] = {
        **SMALL,
        "data": folder,
        "method": "kd",
        "teacher": str(tmp_path / "theirs"),
        "epochs": 1,
    }
    run = recipes.run("glue", options | {"teacher_epochs": 6, "out": tmp_path / "runs" / "a"})
    assert run.facts["teacher"]["name"] == "theirs" and run.facts["teacher"]["scores"]["test"]["accuracy"] > 0.9
    options |= {"student": str(tmp_path / "theirs"), "selfcheck": False}
    run = recipes.run("glue", options | {"teacher_epochs": 0, "out": tmp_path / "runs" / "b"})
    assert run.facts["student"]["name"] == "theirs" and "scores" not in run.facts["teacher"]


def test_it_has_the_flags_that_a_grid_sets() -> None:
    assert {"method", "temperature", "label", "seed", "out", "threads", "quiet"} <= flags(
        ROOT / "tempering" / "recipes" / "glue.py"
    )


# images too


def test_images_are_held_out_as_well() -> None:
    data = LOADERS["batches"]()
    run = go(
        data,
        student=flattened(plain_student()),
        teacher=flattened(plain_teacher()),
        method=Interactive(holdout=16, exam_fraction=0.25),
        epochs=1,
        selfcheck=False,
    )
    assert run.facts["result"]["steps"] == -(-(data.rows - 16) // data.batch_size)
