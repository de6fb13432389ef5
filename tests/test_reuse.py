"""The logits by which a teacher checked what was written, used again for the loss."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tempering import distill
from tempering.data import Pairs, Tokens
from tempering.methods import DTKD, Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.tasks import LanguageModeling, Seq2Seq, Speculative
from tempering.teachers import Live, TopKTeacher
from tempering.teachers.outputs import PrecomputedLogits
from tests.test_generation import EOS, MODELS, PAD, V, gpt2, loss_of, texts
from tests.test_on_policy import loader
from tests.test_seq2seq import EOS as END
from tests.test_seq2seq import pairs, t5


def both(student: nn.Module, teacher: Any, batches: Any, **options: Any) -> tuple[list[dict], list[dict]]:
    """The same batches, once with the teacher's logits and once without."""
    own: dict[str, Any] = {"max_new_tokens": 7, "eos": EOS, "pad": PAD, "top_k": 60, "block": 4} | options
    with_, without = (list(Speculative(student, teacher, batches, reuse=r, **own)) for r in (True, False))
    return with_, without


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("sizes", [(V, V), (V + 15, V), (V, V + 15)])
def test_the_loss_is_that_of_a_teacher_asked_again(family: str, sizes: tuple[int, int]) -> None:
    student, teacher = MODELS[family](8, 3, sizes[0]), MODELS[family](12, 4, sizes[1])
    teacher.train()  # its dropout would be on, were it not put in eval mode
    task = LanguageModeling()
    for model in (student, teacher):
        task.prepare_model(model)
    for with_, without in zip(*both(student, teacher, loader()), strict=True):
        assert torch.equal(with_["input_ids"], without["input_ids"]) and "teacher_outputs" not in without
        assert len(with_["teacher_outputs"].logits) == int(task.row_weights(with_)["logits"])
        inputs = task.inputs(with_)
        assert "teacher_outputs" in inputs[1] and "teacher_outputs" not in inputs[0]
        assert isinstance(Live(teacher)(inputs[1]), PrecomputedLogits)
        for method in (Divergence(objective="jsd"), DTKD()):
            want, slopes = loss_of(student, teacher, [without], method, task)
            got, found = loss_of(student, teacher, [with_], method, task)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
            for a, b in zip(found, slopes, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_of_an_encoder_decoder() -> None:
    student, teacher, task = t5(8, 3), t5(12, 4), Seq2Seq()
    for model in (student, teacher):
        task.prepare_model(model)
    batches = list(Pairs(pairs(), batch_size=2))
    for with_, without in zip(*both(student, teacher, batches, eos=END, pad=0, top_k=8), strict=True):
        want, _ = loss_of(student, teacher, [without], Divergence(), task)
        got, _ = loss_of(student, teacher, [with_], Divergence(), task)
        assert want > 0.01
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_run_asks_the_teacher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, asked = [], []
    for reuse in (True, False):
        student, teacher, seen, calls = gpt2(8, 3).float(), gpt2(12, 4).float(), [], []
        teacher.register_forward_hook(lambda m, args, out, calls=calls: calls.append(out.logits.shape))
        data = Tokens(texts(), batch_size=5, pad=PAD)
        own: dict[str, Any] = {"max_new_tokens": 5, "eos": EOS, "pad": PAD, "top_k": 60, "reuse": reuse}
        distill(
            student,
            teacher,
            Speculative(student, teacher, data, **own),
            method=Divergence(),
            task=LanguageModeling(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            steps=3,
            selfcheck=False,
            on_step=lambda step, loss, seen=seen: seen.append(float(loss.detach())),
            quiet=True,
        )
        losses.append(seen)
        asked.append(len(calls))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert asked[1] - asked[0] == 3, "one forward a step is saved"


def test_another_teacher_is_asked_and_a_changed_batch_is_refused() -> None:
    student, teacher, task = gpt2(8, 3), gpt2(12, 4), LanguageModeling()
    other = copy.deepcopy(teacher)
    for model in (student, teacher, other):
        task.prepare_model(model)
    batch = both(student, Live(teacher), loader(1))[0][0]
    inputs = task.inputs(batch)[1]
    assert Live(other)(inputs).logits.shape[:2] == batch["input_ids"].shape
    assert TopKTeacher(Live(teacher), top=3)(inputs, None).ids.shape[:2] == batch["input_ids"].shape
    batch["learn"][0] = False
    with pytest.raises(ValueError, match=r"logits of \d+ tokens, and \d+ are learned"):
        task.rows(student(task.inputs(batch)[0]), batch["teacher_outputs"], batch)
