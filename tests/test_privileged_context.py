"""Privileged context: teacher and student predict one completion after two prompts; also of one model."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data.text import TextExample, chat, collate, make_prompt_example, pack, with_privileged_context
from tempering.data.tokens import Tokens
from tempering.methods import Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts import OnPolicy, Speculative
from tempering.rollouts.sampling import prompts_of
from tempering.rows import Rows, total
from tempering.tasks import LanguageModeling, PrivilegedContext
from tempering.teachers import Live, SelfTeacher, TopKTeacher, record_top_k
from tests.cases import each
from tests.test_adapters_rollouts import trainer
from tests.test_generation import EOS, PAD, Bytes, gpt2, llama
from tests.trainers import LR
from tests.trainers import models as small

KL = Divergence(objective="kl")
# prompts, hints and completions, of all lengths
PARTS = [
    ([5], [7, 8, 9, 1], [3, 4]),
    ([1, 2, 3, 4], [6], [8, 8, 2]),
    ([4, 4], [4, 4, 1], [9]),
    ([2, 6, 1], [3], [5, 1]),
]


def examples(size: int = len(PARTS), eos: int | None = EOS) -> list[TextExample]:
    pairs = [(make_prompt_example(a, c, eos=eos), make_prompt_example(b, c, eos=eos)) for a, b, c in PARTS[:size]]
    return [with_privileged_context(*pair) for pair in pairs]


def by_hand(student: nn.Module, teacher: nn.Module, texts: list[tuple[list[int], list[int], list[int]]]) -> Tensor:
    """The mean over tokens of KL(teacher after the hint || student after the prompt), each text alone."""
    terms = []
    for prompt, hint, completion in texts:
        sides = []
        for model, start in ((student, prompt), (teacher, hint)):
            logits = model(input_ids=torch.tensor([start + completion])).logits[0]
            sides.append(logits[len(start) - 1 : -1].log_softmax(-1))
        q, p = sides[0], sides[1].detach()
        terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean()


def rows_of(student: nn.Module, teacher: Any, batch: Any) -> Rows:
    task = PrivilegedContext()
    for model in (student, *teacher.models):
        task.prepare_model(model)
    inputs, seen, ids = task.inputs(batch)
    return task.rows(student(inputs), teacher(seen, ids), batch)[0]


@each("family, side, masked", [(f, s, m) for f in (gpt2, llama) for s in ("left", "right") for m in (False, True)])
def test_both_sides_predict_one_completion(family: Any, side: str, masked: bool) -> None:
    student, teacher = family(8, 0).double(), family(12, 1).double()
    texts = [(a, b, [*c, EOS]) for a, b, c in PARTS]
    want = by_hand(student, teacher, texts)
    slopes = torch.autograd.grad(want, list(student.parameters()), allow_unused=True)
    batch = collate(examples(), pad=PAD, side=side)
    if masked:
        batch["learn"] = batch.pop("labels") != -100
    rows = rows_of(student, Live(teacher), batch)
    assert len(rows) == sum(len(c) for *_, c in texts)
    loss = total(KL(rows), rows)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    torch.testing.assert_close(got, slopes, rtol=1e-8, atol=1e-11)
    task = PrivilegedContext()
    index, shape, _ = task.row_fields(batch)
    place, sizes = task.teacher_index(batch, index, shape)
    tokens = task.inputs(batch)[1]["input_ids"]
    assert tokens.shape == sizes
    assert torch.equal(tokens.flatten()[place + 1], batch["input_ids"].flatten()[index + 1]), "the same tokens"


def test_generated_texts_follow_both_prompts() -> None:
    """The student writes from its own prompt; stored logits of a teacher without the context are not used."""
    student, teacher = gpt2(8, 3).double(), gpt2(12, 4).double()
    own: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 4, "pad": PAD}
    data = [collate(examples(), pad=PAD, side="left")]
    for loader in (OnPolicy(student, data, **own), Speculative(student, teacher, data, reuse=True, **own)):
        (batch,) = loader
        assert prompts_of(batch) == [a for a, *_ in PARTS]
        written = [ids[learn].tolist() for ids, learn in zip(batch["input_ids"], batch["learn"], strict=True)]
        rows = rows_of(student, Live(teacher), batch)
        want = by_hand(student, teacher, [(a, b, c) for (a, b, _), c in zip(PARTS, written, strict=True)])
        torch.testing.assert_close(total(KL(rows), rows), want, rtol=1e-9, atol=1e-12)


def test_likeliest_tokens_are_those_after_the_hint_and_are_cached(tmp_path: Path) -> None:
    student, teacher, task = gpt2(8, 3), gpt2(12, 4), PrivilegedContext()
    task.prepare_model(teacher)
    data = Tokens(examples(), batch_size=4, pad=PAD, shuffle=False)
    few = TopKTeacher(Live(teacher), top=9)
    cached = record_top_k(few, data, tmp_path, inputs=task.inputs)
    (batch,) = data
    live, stored = (rows_of(student, source, batch) for source in (few, cached))
    torch.testing.assert_close(stored.teacher, live.teacher, rtol=1e-2, atol=1e-2)
    whole = rows_of(student, Live(teacher), batch)
    p = whole.teacher.log_softmax(-1).topk(9).values
    torch.testing.assert_close(live.teacher[:, :9].sort(descending=True).values, p, rtol=1e-4, atol=1e-4)


def test_one_model_is_both_sides() -> None:
    """Two steps of the engine by hand: the teacher has the weights of each step, and no gradient."""
    student = llama(8, 0).double()
    plain, losses = copy.deepcopy(student), []
    own: dict[str, Any] = {"task": PrivilegedContext(), "optimizer": partial(torch.optim.SGD, lr=0.5), "epochs": 2}
    own |= {"on_step": lambda step, loss: losses.append(float(loss)), "precision": "64-true", "quiet": True}
    batches = [collate(examples(), pad=PAD)]
    distill(student, SelfTeacher(), batches, method=KL, accelerator="cpu", **own)
    for step in range(2):
        loss = by_hand(plain, plain, [(a, b, [*c, EOS]) for a, b, c in PARTS])
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-9) and losses[step] > 0
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.5 * (0.0 if p.grad is None else p.grad)
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="SelfTeacher has no student yet"):
        SelfTeacher()({}, None)


@each("linear", [False, True])
def test_the_trainer_of_transformers_distills_a_model_into_itself(tmp_path: Path, linear: bool) -> None:
    student, _ = small("llama")
    own: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 3, "pad": 11}
    options: dict[str, Any] = {"task": PrivilegedContext(), "max_steps": 1, "method": KL}
    teacher: Any = SelfTeacher()
    if linear:  # whose hidden states a model has to be there for
        options["linear"], teacher = True, copy.deepcopy(student)
    made = trainer(tmp_path, student, teacher, partial(OnPolicy, **own), **options)
    made.train_dataset, made.data_collator = examples(3, None), partial(collate, pad=11)
    made.train()
    ((_, batch, weights),) = made.seen
    plain, _ = small("llama")
    plain.load_state_dict(weights)
    written = [ids[learn].tolist() for ids, learn in zip(batch["input_ids"], batch["learn"], strict=True)]
    order = [next(part for part in PARTS if part[0] == prompt) for prompt in prompts_of(batch)]
    want = by_hand(plain, plain, [(a, b, c) for (a, b, _), c in zip(order, written, strict=True)])
    assert made.state.log_history[0]["soft"] == pytest.approx(float(want.detach()), rel=1e-5)
    want.backward()
    for p, q in zip(made.model.parameters(), plain.parameters(), strict=True):
        step = 0.0 if q.grad is None else q.grad
        torch.testing.assert_close(p.detach(), q.detach() - LR * step, rtol=1e-6, atol=1e-8)


def test_a_chat_with_a_hint_in_its_system_prompt() -> None:
    tokenizer = Bytes()
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    student, teacher = chat(tokenizer, turns), chat(tokenizer, [{"role": "system", "content": "it is 4"}, *turns])
    example = with_privileged_context(student, teacher)
    start = example.learn.index(True)
    assert example.teacher_prompt == teacher.ids[: len(teacher) - (len(student) - start)]
    assert (example.ids, example.learn) == (student.ids, student.learn)
    ids = {Tokens([x], pad=PAD).identity for x in (student, example)}
    assert len(ids) == 2


def test_what_is_refused() -> None:
    one = make_prompt_example([1], [3, 4])
    for other, words in [
        (make_prompt_example([1, 2], [3, 5]), "it differs from the student's in token 1 of the completion"),
        (make_prompt_example([1, 2], [3, 4, 5]), "it differs from the student's in token 2 of the completion"),
        (make_prompt_example([], [3, 4]), "it has no prompt"),
        (TextExample((1, 2, 3), (True, False, True)), "the teacher's text has 2"),
        (TextExample((1, 2), (False, False)), "the teacher's text has 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            with_privileged_context(one, other)
    task, batch = PrivilegedContext(), collate(examples(), pad=PAD)
    packed = pack([one], 6)[0]
    for wrong, words in [
        (collate([one], pad=PAD), "got input_ids, attention_mask, labels. data.text.with_privileged_context"),
        (packed | {n: batch[n][:1] for n in ("teacher_prompt", "teacher_prompt_mask")}, "without position_ids"),
        ({**batch, "teacher_prompt_mask": torch.zeros_like(batch["teacher_prompt"])}, "and one has none"),
    ]:
        with pytest.raises(ValueError, match=words):
            task.inputs(wrong)
    assert LanguageModeling().inputs(batch)[0].keys() == {"input_ids", "attention_mask", "position_ids", "use_cache"}
