"""Texts that a student writes, alone and under its teacher's eye: the caches, the draws, and what is learned of it."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data.pairs import Pair, make_pair
from tempering.data.text import TextExample, collate, make_prompt_example
from tempering.data.token_alignment import Pieces
from tempering.methods import Divergence, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts.generation_config import as_sampling
from tempering.rollouts.sampling import generate, prompts_of, scheduled_top_k, verify_tokens
from tempering.rows import IGNORE_INDEX, total
from tempering.tasks import GenerationScorer, LanguageModeling, OnPolicy, Sampling, SequenceLevel, Speculative
from tempering.teachers import Live
from tempering.utils.files import read_json_lines
from tests.cases import each
from tests.paths import needs_shared
from tests.test_generation import EOS, MODELS, PAD, V, gpt2, llama, texts
from tests.test_golden import Case, case, cases  # noqa: F401

GREEDY = Sampling(temperature=0.0)


@needs_shared
@cases("llm_skd", "k25", "k5", "k1", "kV")
def test_what_a_teacher_accepts(case: Case) -> None:  # noqa: F811
    proposed = torch.tensor(case.values["candidates"])
    block = proposed.shape[1]
    found = verify_tokens(torch.tensor(case.values["teacher_logits"])[:, :block], proposed, case.config["top_k"])
    case.agree("rank", found.rank)
    case.agree("accepted_mask", found.ok)
    case.agree("accepted", found.accepted)
    case.agree("replaced", found.accepted < block)
    case.agree("replace_position", found.accepted)
    case.agree("emitted_tokens", found.accepted + (found.accepted < block))
    case.all_seen("candidates")


def ragged() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(V - 1, (n,), generator=generator).tolist() for n in (4, 1, 6, 2)]


def after(batch: dict[str, Tensor]) -> list[list[int]]:
    """What was written in each row."""
    return [ids[learn].tolist() for ids, learn in zip(batch["input_ids"], batch["learn"], strict=True)]


@torch.no_grad()
def by_definition(
    student: nn.Module, teacher: nn.Module | None, prompt: list[int], *, top_k: int, length: int, eos: int | None
) -> tuple[list[int], list[bool]]:
    """Token by token, without caches or blocks, both sides greedy."""
    ids, replaced = list(prompt), []
    for _ in range(length):
        token, other = int(student(input_ids=torch.tensor([ids])).logits[0, -1].argmax()), False
        if teacher is not None:
            z = teacher(input_ids=torch.tensor([ids])).logits[0, -1]
            if other := int((z > z[token]).sum()) >= top_k:
                token = int(z.argmax())
        ids.append(token)
        replaced.append(other)
        if token == eos:
            break
    return ids[len(prompt) :], replaced


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("top_k", [1, 60, V])
@pytest.mark.parametrize("block", [1, 4])
def test_blocks_and_caches_write_what_the_definition_does(family: str, top_k: int, block: int) -> None:
    student, teacher = MODELS[family](8, 3).eval(), MODELS[family](12, 4).eval()
    for eos in (None, by_definition(student, teacher, ragged()[0], top_k=top_k, length=5, eos=None)[0][-1]):
        want = [by_definition(student, teacher, p, top_k=top_k, length=9, eos=eos) for p in ragged()]
        own: dict[str, Any] = {
            "sampling": GREEDY,
            "resampling": GREEDY,
            "top_k": top_k,
            "block": block,
            "eos": eos,
            "pad": 3,
        }
        batch, pace = generate(student, teacher, ragged(), max_new_tokens=9, **own)
        assert after(batch) == [ids for ids, _ in want]
        flags = [f[learn].tolist() for f, learn in zip(batch["replaced"], batch["learn"], strict=True)]
        assert flags == [f for _, f in want]
        assert pace.tokens == sum(len(ids) for ids, _ in want) and pace.replaced == sum(sum(f) for _, f in want)
        assert pace.ended == sum(ids[-1] == eos for ids, _ in want) and pace.texts == 4
        if top_k == 60 and eos is None:
            assert 0 < pace.replaced < pace.tokens and pace.report()["replaced"] == pace.replaced / pace.tokens


def test_all_of_the_vocabulary_is_on_policy_and_one_is_the_teacher() -> None:
    student, teacher = gpt2(8, 3), gpt2(12, 4)
    own: dict[str, Any] = {"max_new_tokens": 12, "eos": EOS, "pad": PAD, "seed": 7}
    alone, _ = generate(student, None, ragged(), **own)
    both, pace = generate(student, teacher, ragged(), top_k=V, **own)
    assert after(alone) == after(both) and pace.replaced == 0 and pace.report()["acceptance"] == 1.0
    assert after(alone) != after(generate(student, None, ragged(), **own | {"seed": 8})[0])
    one, pace = generate(student, teacher, ragged(), top_k=1, resampling=GREEDY, **own)
    said, _ = generate(teacher, None, ragged(), sampling=GREEDY, **own)
    assert after(one) == after(said) and pace.replaced > 0
    for prompt, ids in zip(ragged(), after(said), strict=True):
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        whole = teacher.generate(torch.tensor([prompt]), attention_mask=mask, **options)  # pyright: ignore
        assert whole[0, len(prompt) :].tolist() == ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_nucleus_accepts_the_smallest_likeliest_set(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log().to(dtype)
    proposed = torch.arange(4)[:, None]
    for nucleus, top_k, accepted in ((0.4, 4, 1), (0.6, 4, 2), (0.7, 4, 2), (0.8, 4, 4), (0.8, 1, 1), (1.0, 4, 4)):
        found = verify_tokens(logits.expand(4, 1, 4), proposed, top_k, nucleus)
        assert found.ok[:, 0].tolist() == [i < accepted for i in range(4)], (nucleus, top_k)
    student, teacher = gpt2(8, 3), gpt2(12, 4)
    own: dict[str, Any] = {"max_new_tokens": 12, "eos": EOS, "pad": PAD, "seed": 7, "top_k": V}
    rates = [generate(student, teacher, ragged(), nucleus=p, **own)[1].report()["acceptance"] for p in (0.3, 0.9, 1.0)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    (one, _), (said, _) = (
        generate(student, teacher, ragged(), nucleus=1e-9, resampling=GREEDY, **own),
        generate(teacher, None, ragged(), sampling=GREEDY, max_new_tokens=12, eos=EOS, pad=PAD),
    )
    assert after(one) == after(said), "the likeliest token alone"


def test_the_accepted_rank_changes_over_the_epochs() -> None:
    batches = Speculative(gpt2(8, 3), gpt2(12, 4), [], top_k=(40, 5), epochs=8)
    ranks = []
    for epoch in range(9):
        batches.set_epoch(epoch)
        ranks.append(batches.top_k)
    assert ranks == [40, 35, 30, 25, 20, 15, 10, 5, 5], "a longer run keeps the last"
    assert Speculative(gpt2(8, 3), gpt2(12, 4), [], top_k=(40, 5), epochs=1).top_k == 40
    for bad in ({"top_k": (40, 5)}, {"top_k": (0, 5), "epochs": 2}, {"nucleus": 0.0}, {"nucleus": 1.5}):
        with pytest.raises(ValueError, match="Speculative needs"):
            Speculative(gpt2(8, 3), gpt2(12, 4), [], **bad)  # pyright: ignore[reportArgumentType]


def test_the_accepted_rank_falls_over_a_text_as_in_the_released_code() -> None:
    """By the released loop: a counter of verified blocks, which takes effect after the first; batched as one by one."""
    for top_k, expected in ((25, 128), (25, 10), (5, 5), (40, 7), (1, 9)):
        every, dec, k, want = max(int(expected / top_k), 1), max(math.ceil(top_k / expected), 1), top_k, list[int]()
        for counter in range(60):
            want.append(k)
            k = max(k - dec, 1) if counter % every == 0 else k
        assert [scheduled_top_k(top_k, expected, verified) for verified in range(60)] == want
    student, teacher = gpt2(8, 3).eval(), gpt2(12, 4).eval()
    own: dict[str, Any] = {"max_new_tokens": 12, "sampling": GREEDY, "resampling": GREEDY, "top_k": 200, "block": 2}
    fixed, _ = generate(student, teacher, ragged(), **own)
    falling, _ = generate(student, teacher, ragged(), expected_length=4, **own)
    assert after(fixed) != after(falling)
    alone = [after(generate(student, teacher, [p], expected_length=4, **own)[0])[0] for p in ragged()]
    assert after(falling) == alone
    source = Speculative(student, teacher, loader(1), top_k=200, expected_length=4, block=2, max_new_tokens=12, pad=PAD)
    assert next(iter(source))["replaced"].sum() > 0


def test_a_nucleus_accepts_without_a_rank() -> None:
    """The fewest likeliest tokens that have the probability together; always the likeliest one."""
    z = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4, 4)
    tokens = torch.arange(4)[None]
    for p, accepted in ((0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.96, 4), (1.0, 4)):
        assert verify_tokens(z, tokens, None, p).ok.tolist() == [[i < accepted for i in range(4)]]
    source = Speculative(gpt2(8, 3), gpt2(12, 4), loader(1), top_k=None, nucleus=0.5, max_new_tokens=4, pad=PAD)
    assert source.top_k is None and bool(next(iter(source))["learn"].any())
    with pytest.raises(ValueError, match=r"and a top_k for an expected_length; got None, 5, 9 and 1\.0"):
        Speculative(gpt2(8, 3), gpt2(12, 4), [], top_k=None, expected_length=9)


@pytest.mark.parametrize("sizes", [(V + 15, V), (V, V + 15)])
def test_a_token_that_one_side_lacks_is_not_written(sizes: tuple[int, int]) -> None:
    student, teacher = gpt2(8, 3, sizes[0]), gpt2(12, 4, sizes[1])
    with torch.no_grad():  # each would say little else than what the other lacks
        for model in (student, teacher):
            model.transformer.wte.weight[V:] *= 20  # pyright: ignore
    batch, pace = generate(student, teacher, ragged(), max_new_tokens=20, top_k=20)
    assert 0 < pace.replaced < pace.tokens and int(batch["input_ids"].max()) < V
    assert not verify_tokens(torch.zeros(1, 1, V), torch.tensor([[V]]), V).ok.any()


class Toy(nn.Module):
    """A model whose next token depends on nothing; it has a cache in name."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=past_key_values)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("block", [1, 4])
def test_tokens_are_distributed_as_the_definition_says(rows: int, block: int) -> None:
    """Of 2,000 tokens; the statistic has 4 degrees of freedom, and 23.5 is passed once in 10,000."""
    q, p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double(), torch.tensor([0.05, 0.35, 0.1, 0.3, 0.2]).double()
    top = (p[:, None] < p).sum(1) < 2  # the teacher's first two
    want = q * top + q[~top].sum() * p
    toys = Toy(q.log().tolist()), Toy(p.log().tolist())
    counts, replaced = torch.zeros(5), 0
    for seed in range(8 // rows):
        batch, pace = generate(*toys, [[0]] * rows, max_new_tokens=250, top_k=2, block=block, seed=seed)
        counts += torch.bincount(torch.tensor(sum(after(batch), [])), minlength=5)  # noqa: RUF017
        replaced += pace.replaced
    n = counts.sum()
    assert n == 2000
    assert ((counts - n * want) ** 2 / (n * want)).sum() < 23.5
    assert abs(replaced / 2000 - float(q[~top].sum())) < 0.04


def test_sampling_cuts_and_sharpens() -> None:
    z, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1), torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> Tensor:
        return torch.bincount(sampling.draw(z, generator)[0], minlength=4) / 4000

    near = partial(torch.testing.assert_close, rtol=0.0, atol=0.03)
    near(shares(Sampling()), torch.tensor([0.5, 0.3, 0.15, 0.05]))
    near(shares(Sampling(top_p=0.5)), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    near(shares(Sampling(top_p=0.6)), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    near(shares(Sampling(temperature=0.5)), sharp / sharp.sum())
    assert shares(GREEDY)[0] == 1.0
    with pytest.raises(ValueError, match="temperature >= 0 and top_p"):
        Sampling(top_p=0.0)


def test_prompts_are_what_comes_before_the_first_learned_token() -> None:
    examples = texts()
    want = [[i for i, learn in zip(e.ids, e.learn, strict=True) if not learn] for e in examples]
    for side in ("left", "right"):
        assert prompts_of(collate(examples, pad=PAD, side=side)) == want
    whole = {"input_ids": torch.arange(12).view(2, 6)}
    assert prompts_of(whole) == [[0], [6]] and prompts_of(whole, 3) == [[0, 1, 2], [6, 7, 8]]


def loader(batches: int = 3) -> list[dict[str, Tensor]]:
    return [collate(texts()[i : i + 3], pad=PAD, ids=range(i, i + 3)) for i in range(batches)]


def test_written_batches_are_rows_without_labels_that_count_the_end_once() -> None:
    student, teacher = gpt2(8, 3), gpt2(12, 4)
    before = copy.deepcopy(student.state_dict())
    student.train()
    student.transformer.drop.eval()  # pyright: ignore[reportAttributeAccessIssue]
    state = torch.get_rng_state()
    source = Speculative(student, Live(teacher), loader(), top_k=60, max_new_tokens=6, eos=EOS, pad=PAD, vocabulary=V)
    task = LanguageModeling()
    for model in (student, teacher):
        task.prepare_model(model)
    for batch, given in zip(source, loader(), strict=True):
        assert "ids" not in batch and (batch["labels"] == IGNORE_INDEX).all()
        starts = prompts_of(given)
        rows = [p + w for p, w in zip(starts, after(batch), strict=True)]
        assert rows == [
            ids[m == 1].tolist() for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert int(task.row_weights(batch)["logits"]) == sum(map(len, after(batch))) <= 18
        (made,) = task.rows(student(task.inputs(batch)[0]), teacher(task.inputs(batch)[0]).logits.detach(), batch)
        loss = total(Divergence(objective="jsd", hard=1.0)(made), made)
        loss.backward()
        assert loss > 0 and made.target is not None and (made.target == IGNORE_INDEX).all()
    assert student.training and not student.transformer.drop.training  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, before[name]) for name, a in student.state_dict().items())
    report = source.report()
    assert 0 < report["acceptance"] < 1 and report["acceptance"] + report["replaced"] == pytest.approx(1.0)
    assert report["tokens_per_teacher_forward"] > 0 and report["length"] <= 6


def test_a_share_of_the_batches_is_written_and_any_place_of_an_epoch_is_found_again() -> None:
    def sources(share: float) -> OnPolicy:
        return OnPolicy(gpt2(8, 3), loader() * 10, generated_fraction=share, max_new_tokens=3, pad=PAD)

    def seen(source: OnPolicy, start: int = 0) -> list[tuple[bool, list]]:
        return [("learn" in batch, batch["input_ids"].tolist()) for batch in source.iterate(start)]

    assert not any(flag for flag, _ in seen(sources(0.0))) and all(flag for flag, _ in seen(sources(1.0)))
    source = sources(0.5)
    first = seen(source)
    assert len(source) == 30 and 8 <= sum(flag for flag, _ in first) <= 22
    assert seen(source, 17) == first[17:]
    source.set_epoch(1)
    assert seen(source) != first and source.report()["tokens_per_teacher_forward"] == 0.0
    source.set_epoch(0)
    assert seen(source) == first


@pytest.mark.parametrize("kind", ["on-policy", "speculative"])
def test_runs_in_distill(kind: str, tmp_path: Path) -> None:
    student, teacher = llama(8, 0).float(), llama(12, 1).float()
    data, task = loader(), LanguageModeling(vocabulary=V)
    adam = partial(torch.optim.Adam, lr=1e-2)
    distill(teacher, None, data, method=Supervised(), task=task, optimizer=adam, epochs=5, quiet=True)
    own: dict[str, Any] = {"max_new_tokens": 5, "eos": EOS, "pad": PAD, "vocabulary": V}
    source = OnPolicy(student, data, generated_fraction=1.0, **own)
    if kind == "speculative":
        source = Speculative(student, teacher, data, top_k=20, **own)
    method = Divergence(objective="kl")
    start = task.score(student, data, teacher=Live(teacher))["loss"]
    how: dict[str, Any] = {"method": method, "task": task, "optimizer": adam, "out": tmp_path, "log_every": 1}
    run = distill(student, teacher, source, epochs=6, test=data, quiet=True, **how)
    assert run.best["test"]["loss"] < start
    for name in ("steps", "epochs"):  # statistics of the epoch so far, and of the whole
        lines = read_json_lines(tmp_path / f"{name}.jsonl")
        assert all(line["rollout"].keys() == source.report().keys() for line in lines)
        assert lines[-1]["rollout"] == source.report()
    assert "only" in run.facts["selfcheck"]["line"] and source.report()["length"] > 0


def test_a_teacher_s_own_texts_are_labels() -> None:
    """Greedy texts of the teacher, the same in every epoch; of rows that are learned all have labels and no others."""
    teacher, given = llama(16, 1).eval(), loader()
    source = SequenceLevel(Live(teacher), given, max_new_tokens=6, eos=EOS, pad=PAD, vocabulary=V)
    first = list(source)
    for batch, data in zip(first, given, strict=True):
        for prompt, ids, labels in zip(prompts_of(data), batch["input_ids"], batch["labels"], strict=True):
            want, _ = by_definition(teacher, None, prompt, top_k=1, length=6, eos=EOS)
            assert labels[labels != IGNORE_INDEX].tolist() == want
            assert ids[: len(prompt) + len(want)].tolist() == prompt + want
    source.set_epoch(1)
    for batch, again in zip(first, source, strict=True):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    student, task = gpt2(8, 3), LanguageModeling()
    task.prepare_model(student)
    (rows,) = task.rows(student(task.inputs(first[0])[0]), None, first[0])
    loss = total(Supervised()(rows, 1.0), rows)
    loss.backward()
    assert len(rows) == int((first[0]["labels"] != IGNORE_INDEX).sum()) and float(loss.detach()) > 0.0
    assert any(bool(p.grad.any()) for p in student.parameters() if p.grad is not None)
    with pytest.raises(TypeError, match="SequenceLevel needs a teacher with a model; got str"):
        SequenceLevel("teacher", given)


def test_any_of_several_ends_ends_a_text() -> None:
    student, teacher = gpt2(8, 3), llama(12, 4)
    options: dict[str, Any] = {"sampling": GREEDY, "resampling": GREEDY, "max_new_tokens": 9, "top_k": 60, "block": 4}
    free, _ = generate(student, teacher, ragged(), **options)
    ends = [after(free)[0][2], after(free)[2][4]]
    for eos in (ends, tuple(ends), torch.tensor(ends)):
        got, stats = generate(student, teacher, ragged(), eos=eos, **options)
        want = [ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), 9)] for ids in after(free)]
        assert after(got) == want and stats.ended == sum(len(ids) < 9 or ids[-1] in ends for ids in want) >= 2
    assert make_prompt_example([1], [3], eos=[2, 9]).ids == (1, 3, 2)
    assert make_prompt_example([1], [3, 9], eos=[2, 9]).ids == (1, 3, 9)
    assert make_pair([5, 9], [6], eos=[2, 9]) == Pair((5, 9), (6, 2))
    assert Pieces(str.encode, {}, eos=[2, 9]).eos == 2


def test_settings_of_transformers_are_those_of_sampling() -> None:
    from transformers import GenerationConfig

    assert as_sampling(GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9)) == Sampling(0.7, 0.9, top_k=50)
    assert as_sampling(GenerationConfig(do_sample=True, top_k=0, min_p=0.1)) == Sampling(min_p=0.1)
    assert as_sampling(GenerationConfig(eos_token_id=[2, 9])) == GREEDY
    assert as_sampling({"temperature": 0.7, "top_k": 5}) == Sampling(0.7, top_k=5)
    assert as_sampling({"do_sample": False, "temperature": 0.7}) == GREEDY
    config = GenerationConfig(do_sample=True, top_k=3, eos_token_id=[2, 9], max_new_tokens=7, pad_token_id=0)
    source = OnPolicy(gpt2(8, 3), loader(), generated_fraction=1.0, sampling=config)
    assert (source.sampling, source.eos, source.max_new_tokens) == (Sampling(top_k=3), [2, 9], 7)
    assert OnPolicy(gpt2(8, 3), loader(), sampling=config, max_new_tokens=3, eos=1).max_new_tokens == 3
    z, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1), torch.Generator().manual_seed(0)
    for sampling, kept in ((Sampling(top_k=2), 2), (Sampling(top_k=9), 4), (Sampling(min_p=0.25), 3)):
        shares = torch.bincount(sampling.draw(z, generator)[0], minlength=4) / 4000
        want = torch.tensor([0.5, 0.3, 0.15, 0.05]) * (torch.arange(4) < kept)
        torch.testing.assert_close(shares, want / want.sum(), rtol=0.0, atol=0.03)
    for bad, why in (
        (GenerationConfig(do_sample=True, repetition_penalty=1.2), r"does not support repetition_penalty=1\.2"),
        ({"num_beams": 4}, "does not support num_beams=4"),
        ({"top_k": -1}, "top_k >= 1"),
    ):
        with pytest.raises(ValueError, match=why):
            as_sampling(bad)
    with pytest.raises(TypeError, match=r"sampling must be a Sampling, a GenerationConfig .* got float"):
        OnPolicy(gpt2(8, 3), loader(), sampling=0.7)


@each("side", ["right", "left"])
def test_of_a_chat_the_last_turn_is_generated_or_the_named_one(side: str) -> None:
    ids, learn = tuple(range(10, 22)), (False,) * 2 + (True,) * 3 + (False,) * 2 + (True,) * 4 + (False,)
    single = TextExample((1, 2, 3), (False, True, True))
    batch = collate([TextExample(ids, learn), single], pad=PAD, side=side)
    for turn, end in (("last", 7), ("first", 2)):
        assert prompts_of(batch, turn=turn) == [[*ids[:end]], [1]]
        source = OnPolicy(gpt2(8, 3), [batch], generated_fraction=1.0, max_new_tokens=3, turn=turn)
        made = next(iter(source))
        assert made["input_ids"][0, :end].tolist() == [*ids[:end]] and not made["learn"][0, :end].any()
    drawn = OnPolicy(gpt2(8, 3), [batch] * 20, generated_fraction=1.0, max_new_tokens=1, turn="random")
    sizes = [[int(made["attention_mask"][0].sum()) for made in drawn.iterate(start)] for start in (0, 5)]
    assert {*sizes[0]} == {3, 8} and sizes[0][5:] == sizes[1]
    with pytest.raises(ValueError, match="turn of last, first, random; got 'middle'"):
        OnPolicy(gpt2(8, 3), [batch], turn="middle")
    grades: list[Any] = []
    grade = GenerationScorer(lambda made, said: float(bool(grades.append(said))), name="x", max_new_tokens=2)
    grade(gpt2(8, 3), [batch])
    assert grades == [[*ids[7:11]], [2, 3]]


def test_inputs_are_carried_or_refused_by_name() -> None:
    student, teacher = gpt2(8, 3), gpt2(12, 4)
    scored = [dataclasses.replace(e, privacy_score=tuple(0.1 * i for i in range(1, len(e) + 1))) for e in texts()[:3]]
    for side in ("right", "left"):
        batch = collate(scored, pad=PAD, side=side)
        options: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 3}
        for source in (OnPolicy(student, [batch], **options), SequenceLevel(teacher, [batch], **options)):
            made = next(iter(source))
            for row, prompt, example in zip(made["privacy_score"].tolist(), prompts_of(batch), scored, strict=True):
                want = [*(example.privacy_score or ())][: len(prompt)]
                assert row == pytest.approx(want + [0.0] * (len(row) - len(prompt)))
    batch = loader(1)[0]
    for name, value in (("token_type_ids", batch["labels"]), ("pixel_values", torch.zeros(3, 3, 4, 4))):
        for source in (
            OnPolicy(student, [batch | {name: value}], **options),
            Speculative(student, teacher, [batch | {name: value}], **options),
        ):
            with pytest.raises(ValueError, match=f"A model that needs {name} cannot generate here"):
                next(iter(source))


@each("make", [gpt2, llama])
def test_texts_longer_than_the_positions_are_refused(make: Any) -> None:
    student, other = make(8, 3), gpt2(8, 1)
    student.config.max_position_embeddings = 64
    made, _ = generate(student, None, [[1] * 60], max_new_tokens=4)
    assert made["input_ids"].shape == (1, 64)
    for models in ((student, None), (other, student)):
        with pytest.raises(ValueError, match=r"has 60 tokens, .*max_new_tokens=5 .* 64 positions .* max_new_tokens=4"):
            generate(*models, [[1] * 60, [2]], max_new_tokens=5)


def test_what_is_refused() -> None:
    student = gpt2(8, 3)
    with pytest.raises(ValueError, match=r"generated_fraction in \[0, 1\].*got 1.5"):
        OnPolicy(student, [], generated_fraction=1.5)
    with pytest.raises(ValueError, match="iterated again"):
        OnPolicy(student, iter([]))
    with pytest.raises(ValueError, match=r"top_k, block and expected_length >= 1 and nucleus in \(0, 1\], .* got 0, 5"):
        Speculative(student, student, [], top_k=0)
    with pytest.raises(TypeError, match="Speculative needs a teacher with a model; got str"):
        Speculative(student, "gpt", [])
    with pytest.raises(TypeError, match="Linear has no cache"):
        generate(nn.Linear(2, 2), None, [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="the shortest of 0 tokens"):
        generate(student, None, [[1], []], max_new_tokens=2)
    packed = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": torch.arange(4)[None]}
    with pytest.raises(ValueError, match="OnPolicy needs padded texts"):
        list(OnPolicy(student, [packed], generated_fraction=1.0))
