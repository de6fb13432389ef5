"""Encoder-decoders: the tokens of a target as rows, what they write themselves, and grades of what they write."""

from __future__ import annotations

import copy
import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data.pairs import Pair, Pairs, collate_pairs, make_pair, read_pairs
from tempering.methods import DTKD, KD, Divergence, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts.decoding import RecomputingDecoder, decoder_strategy, make_decoder
from tempering.rollouts.sampling import GenerationState, generate
from tempering.rollouts.scoring import exact_match, rouge_l
from tempering.rows import IGNORE_INDEX
from tempering.tasks import GenerationScorer, LanguageModeling, OnPolicy, Sampling, Seq2Seq, Speculative
from tempering.teachers import Live, TopKTeacher
from tests.lazy_modules import needs
from tests.paths import SHARED, needs_shared
from tests.test_generation import gpt2, loss_of

pytestmark = needs("transformers")

EOS, PAD, V = 1, 0, 40
GREEDY = Sampling(temperature=0.0)


def t5(width: int, seed: int, vocabulary: int = V) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": width, "d_kv": 4, "d_ff": 2 * width, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=vocabulary, dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, **sizes)
    config.decoder_start_token_id, config.initializer_factor = PAD, 5.0
    return T5ForConditionalGeneration(config).double()


def bart(width: int, seed: int, vocabulary: int = V) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": width, "max_position_embeddings": 64, "init_std": 0.5}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 2 * width}
    special: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=vocabulary, dropout=0.0, forced_eos_token_id=None, **sizes, **special)
    model = BartForConditionalGeneration(config).double()
    model.final_logits_bias.normal_()  # pyright: ignore
    return model


MODELS = {"t5": t5, "bart": bart}


def pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 3), (2, 6), (7, 1), (4, 4))
    return [
        make_pair(*(torch.randint(3, V, (n,), generator=generator).tolist() for n in two), eos=EOS) for two in sizes
    ]


def ready(*models: nn.Module) -> Seq2Seq:
    task = Seq2Seq()
    for model in models:
        task.prepare_model(model)
    return task


METHODS = {"supervised": Supervised(), "dtkd": DTKD(), "jsd": Divergence(objective="jsd", hard=0.5)}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_padding_and_splitting_change_nothing(family: str, method: str) -> None:
    student, teacher = MODELS[family](8, 0), MODELS[family](12, 1)
    task, whole = ready(student, teacher), pairs()
    want, slopes = loss_of(student, teacher, [collate_pairs(whole)], METHODS[method], task)
    assert want > 0.1 and any(g.abs().max() > 1e-4 for g in slopes)
    ways = {
        "wide": [collate_pairs(whole, lengths=(16, 11), pad=7)],
        "split": [collate_pairs(whole[:1]), collate_pairs(whole[1:])],
    }
    for way, batches in ways.items():
        got, found = loss_of(student, teacher, batches, METHODS[method], task)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=way)
        for a, b in zip(found, slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=way)


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_is_the_models_own_and_the_end_counts_once(family: str) -> None:
    student, batch = MODELS[family](8, 0), collate_pairs(pairs())
    own = student(**batch)
    task = ready(student)
    scores = task.score(student, [batch], teacher=Live(copy.deepcopy(student)))
    assert scores["loss"] == pytest.approx(float(own.loss.detach()), rel=1e-9) and scores["agreement"] == 1.0
    assert int(task.row_weights(batch)["logits"]) == 3 + 6 + 1 + 4 + 4 and int((batch["labels"] == EOS).sum()) == 4
    (rows,) = task.rows(student(task.inputs(batch)[0]), None, batch)
    assert len(rows) == 18 and torch.equal(rows.student, own.logits[batch["labels"] != IGNORE_INDEX])
    loss, _ = loss_of(student, copy.deepcopy(student), [batch], KD(hard=0.0), task)
    assert loss < 1e-12
    said = student(task.inputs(batch)[0]).logits
    (moved,) = task.rows(said, said.detach().roll(1, 1), batch)
    assert (moved.student - moved.teacher).abs().max() > 0.1


@pytest.mark.parametrize("family", MODELS)
def test_sources_padded_on_the_left_are_the_same_sources(family: str) -> None:
    student, teacher = MODELS[family](8, 0), MODELS[family](12, 1)
    task, batch = ready(student, teacher), collate_pairs(pairs())
    holes = batch["attention_mask"].clone()
    holes[0, 1] = 0  # a token in the middle that is left out is no padding
    batch["attention_mask"] = holes
    left = dict(batch)
    for name in ("input_ids", "attention_mask"):
        left[name] = torch.stack([x.roll(8 - len(p.source)) for x, p in zip(batch[name], pairs(), strict=True)])
    assert int((left["attention_mask"][:, 0] == 0).sum()) == 3
    want, slopes = loss_of(student, teacher, [batch], DTKD(), task)
    got, found = loss_of(student, teacher, [left], DTKD(), task)
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(found, slopes, strict=True))
    options: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 5, "eos": EOS, "sampling": GREEDY}
    made, same = (next(iter(OnPolicy(student, [b], **options))) for b in (batch, left))
    assert all(torch.equal(made[name], same[name]) for name in made)


def test_nothing_to_learn_is_zero_with_a_gradient_path_and_some_may_be_left_out() -> None:
    student, teacher = t5(8, 0), t5(12, 1)
    task, batch = ready(student, teacher), collate_pairs(pairs())
    empty = batch | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    loss, slopes = loss_of(student, teacher, [empty], KD(), task)
    assert loss == 0.0 and slopes and all((g == 0).all() for g in slopes)
    learn = torch.zeros_like(batch["labels"])
    learn[1, 2:5] = 1
    (rows,) = task.rows(student(task.inputs(batch)[0]), None, batch | {"learn": learn})
    assert rows.target is not None and rows.target.tolist() == batch["labels"][1, 2:5].tolist()


def greedy(student: nn.Module, teacher: nn.Module | None, source: list[int], *, top_k: int, length: int) -> list[int]:
    """Token by token, from the definition."""
    start, out = [student.config.decoder_start_token_id], []  # pyright: ignore
    for _ in range(length):
        held = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([start + out])}
        token = int(student(**held).logits[0, -1].argmax())
        if teacher is not None:
            z = teacher(**held).logits[0, -1]
            token = int(z.argmax()) if int((z > z[token]).sum()) >= top_k else token
        out.append(token)
        if token == EOS:
            break
    return out


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("block", [1, 3])
def test_blocks_write_what_the_definition_does(family: str, top_k: int, block: int) -> None:
    student, teacher = MODELS[family](8, 3).eval(), MODELS[family](12, 4).eval()
    batch = collate_pairs(pairs())
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    start = [[student.config.decoder_start_token_id]] * 4  # pyright: ignore
    own: dict[str, Any] = {
        "max_new_tokens": 6,
        "eos": EOS,
        "sampling": GREEDY,
        "resampling": GREEDY,
        "block": block,
        "top_k": top_k,
    }
    with torch.no_grad():
        for other in (None, teacher):
            want = [greedy(student, other, list(p.source), top_k=top_k, length=6) for p in pairs()]
            made, pace = generate(student, other, start, source=source, **own)
            assert [ids[m].tolist() for ids, m in zip(made["generated"], made["learn"], strict=True)] == want
            assert pace.tokens == sum(map(len, want)) and torch.equal(made["input_ids"], batch["input_ids"])
        assert pace.replaced > 0


def test_no_position_is_read_that_a_decoder_does_not_have() -> None:
    student, teacher = bart(8, 3), bart(12, 4)
    for model in (student, teacher):  # room for six, behind an offset of two
        embedding: Any = model.model.decoder.embed_positions  # pyright: ignore
        embedding.weight = nn.Parameter(embedding.weight[: 6 + 2].detach().clone())
    batch = collate_pairs(pairs())
    own: dict[str, Any] = {"max_new_tokens": 6, "sampling": GREEDY, "resampling": GREEDY, "block": 5, "top_k": 8}
    own["source"] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    made, pace = generate(student, teacher, [[2]] * 4, **own)
    assert pace.tokens == 24 and made["generated"].shape == (4, 6)
    with torch.no_grad():
        want = [greedy(student.eval(), teacher.eval(), list(p.source), top_k=8, length=6) for p in pairs()]
    ended = [w[: len(x)] for w, x in zip(made["generated"].tolist(), want, strict=True)]
    assert ended == want


def marian(width: int, seed: int) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": width, "max_position_embeddings": 64, "init_std": 0.5}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 2 * width}
    return MarianMTModel(MarianConfig(vocab_size=V, pad_token_id=PAD, decoder_start_token_id=PAD, **sizes)).double()


def prophet(width: int, seed: int) -> nn.Module:
    """It takes one token at a time behind a cache."""
    from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": width, "max_position_embeddings": 64, "init_std": 0.5}
    for side in ("encoder", "decoder"):
        sizes |= {f"num_{side}_layers": 1, f"num_{side}_attention_heads": 2, f"{side}_ffn_dim": 2 * width}
    config = ProphetNetConfig(vocab_size=V, pad_token_id=PAD, decoder_start_token_id=2, **sizes)
    return ProphetNetForConditionalGeneration(config)


def fsmt(width: int, seed: int) -> nn.Module:
    """Its decoder looks ahead behind a cache."""
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": width, "max_position_embeddings": 64, "init_std": 0.5}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 2 * width}
    words: dict[str, Any] = {"langs": ["en", "de"], "src_vocab_size": V, "tgt_vocab_size": V}
    config = FSMTConfig(pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=2, **words, **sizes)
    return FSMTForConditionalGeneration(config)


def windowed(width: int, seed: int) -> nn.Module:
    """Gemma's encoder-decoder, whose decoder forgets what lies behind its window."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    torch.manual_seed(seed)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 16}
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2} | heads
    sizes |= {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "initializer_range": 0.5}
    config = T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=V, decoder_start_token_id=2)
    return T5GemmaForConditionalGeneration(config).double()


def read_by(model: nn.Module, reader: Any, whole: RecomputingDecoder, rows: int) -> tuple[float, list[int]]:
    """How far the two readers' logits lie apart where rows accept what they like, and the tokens that each read."""
    generator, counts, side = torch.Generator().manual_seed(rows), [0, 0], 0
    draft = GenerationState([[2]] * rows, max_new_tokens=20, eos=5, device=torch.device("cpu"))

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts[side] += kwargs["decoder_input_ids"].numel()

    hook, apart = model.register_forward_pre_hook(count, with_kwargs=True), 0.0
    while not all(draft.done):
        tokens = torch.randint(3, V, (rows, 5), generator=generator)
        read = torch.cat((draft.last[:, None], tokens[:, :-1]), 1)
        for first, n in ((0, 1), (1, 1), (2, 3)):
            said = []
            for side, each in enumerate((reader, whole)):  # noqa: B007
                seen = draft.block_mask(first + n)
                said.append(each.decode(read[:, first : first + n], draft.positions(first, n), seen))
            there = torch.tensor([0 if d else 20 - len(w) for d, w in zip(draft.done, draft.generated, strict=True)])
            counted = first + torch.arange(n) < there[:, None]
            off = (said[0] - said[1])[counted]
            assert off.isfinite().all()
            apart = max([apart, *off.abs().flatten().tolist()])
        draft.append(tokens, torch.randint(6, (rows,), generator=generator))
    hook.remove()
    return apart, counts


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("make", "way"), [(t5, "shift"), (bart, "crop"), (marian, "crop"), (windowed, "recompute")])
@torch.no_grad()
def test_behind_a_cache_logits_are_those_from_the_start(make: Any, way: str, rows: int) -> None:
    model, batch = make(8, 3).eval(), collate_pairs((pairs() * 2)[:rows])
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    reader = make_decoder(model, None, source, max_length=20)
    assert decoder_strategy(model, reader.encoder_kwargs) == way
    whole = RecomputingDecoder(model, None, reader.encoder_kwargs, max_length=20, cached=False)
    apart, (mine, theirs) = read_by(model, reader, whole, rows)
    assert apart < 1e-10
    if way == "recompute":
        assert mine == theirs
    else:
        asked = reader.forwards // 3 * 5 * rows
        assert mine <= asked if way == "shift" or rows == 1 else asked < mine < 0.7 * theirs
        assert mine < 0.7 * theirs


@pytest.mark.parametrize("make", [t5, bart])
def test_all_of_the_vocabulary_is_on_policy_whatever_the_batch(make: Any) -> None:
    student, teacher = make(8, 3), make(12, 4)
    batch = collate_pairs(pairs() * 2)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    start, own = [[student.config.decoder_start_token_id]], {"max_new_tokens": 9, "eos": EOS, "seed": 7}
    alone, _ = generate(student, None, start * 8, source=source, **own)
    both, pace = generate(student, teacher, start * 8, source=source, top_k=V, **own)
    assert torch.equal(alone["generated"], both["generated"]) and pace.replaced == 0 and pace.tokens > 8
    # a row that others stand beside is the row alone
    own |= {"sampling": GREEDY, "resampling": GREEDY, "top_k": 6, "block": 3}
    made, pace = generate(student, teacher, start * 8, source=source, **own)
    assert 0 < pace.replaced < pace.tokens
    for i in range(8):
        single, _ = generate(student, teacher, start, source={n: x[i : i + 1] for n, x in source.items()}, **own)
        assert single["generated"][0].tolist() == made["generated"][i][made["learn"][i]].tolist()


@pytest.mark.parametrize("make", [prophet, fsmt])
@torch.no_grad()
def test_what_cannot_go_on_behind_a_cache_reads_from_the_start(make: Any) -> None:
    student, batch = make(8, 3).eval(), collate_pairs(pairs()[:1])
    source = {"input_ids": batch["input_ids"]}
    want = greedy(student, None, batch["input_ids"][0].tolist(), top_k=1, length=6)
    made, _ = generate(student, None, [[2]], source=source, max_new_tokens=6, eos=EOS, sampling=GREEDY)
    assert made["generated"][made["learn"]].tolist() == want
    assert decoder_strategy(student, {}) == "recompute"


@pytest.mark.parametrize("kind", ["data", "on-policy", "speculative", "sparse"])
def test_runs_in_distill(kind: str) -> None:
    student, teacher = bart(8, 0).float(), bart(16, 1).float()
    data, task = Pairs(pairs() * 4, batch_size=4), Seq2Seq()
    adam = partial(torch.optim.Adam, lr=1e-2)
    options: dict[str, Any] = {"task": task, "optimizer": adam, "quiet": True}
    distill(teacher, None, data, method=Supervised(), epochs=8, **options)
    own: dict[str, Any] = {"max_new_tokens": 6, "eos": EOS, "generated_fraction": 0.5}
    source: Any = {
        "on-policy": OnPolicy(student, data, **own),
        "speculative": Speculative(student, teacher, data, top_k=8, **own),
    }.get(kind, data)
    taught = TopKTeacher(Live(teacher), top=5) if kind == "sparse" else teacher
    run = distill(student, taught, source, method=Divergence(hard=0.5), epochs=6, test=data, **options)
    assert run.epochs[-1]["test"]["loss"] < run.epochs[0]["test"]["loss"]
    if source is not data:
        assert source.report()["length"] > 0


def test_a_shard_is_a_share_of_every_batch_and_its_draws_are_its_own() -> None:
    data = Pairs(pairs() * 2, batch_size=4, seed=3)
    parts = [data.shard(rank, 2) for rank in range(2)]
    for whole, *shares in zip(data, *parts, strict=True):
        assert torch.equal(torch.cat([share["ids"] for share in shares]), whole["ids"])
    with pytest.raises(ValueError, match="batch_size=4 texts cannot be split evenly over 3"):
        data.shard(0, 3)
    source = OnPolicy(t5(8, 0), data, generated_fraction=0.5, max_new_tokens=4)
    one, other = (list(source.shard(rank, 2)) for rank in range(2))
    assert ["learn" in b for b in one] == ["learn" in b for b in other] and len(one) == 2
    with pytest.raises(ValueError, match="list cannot be sharded over 2"):
        OnPolicy(t5(8, 0), list(data)).shard(0, 2)


def test_grades() -> None:
    assert rouge_l("The cat sat.", "the cat sat") == 1.0 and rouge_l("", "a") == rouge_l("a b", "c") == 0.0
    # police killed the gunman / police kill the gunman: three of four in order
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l([1, 2, 3, 9], [1, 3]) == pytest.approx(2 * 2 / 6)
    assert exact_match("so 3 * 4\n#### 1,200", "#### 1200") == 1.0
    assert exact_match("#### 12", "#### 1200") == exact_match("1200", "#### 1200") == 0.0
    with pytest.raises(ValueError, match="no answer after"):
        exact_match("#### 1", "1")


def test_graded_writes_greedily_and_without_the_end() -> None:
    student, batch = t5(8, 3), collate_pairs(pairs())
    seen: list[tuple[list[int], list[int]]] = []

    def grade(written: list[int], wanted: list[int]) -> float:
        seen.append((written, wanted))
        return float(len(seen))

    task = Seq2Seq(scorer=GenerationScorer(grade, name="place", eos=EOS, max_new_tokens=5))
    scores = task.score(student, [batch])
    assert scores["place"] == 2.5 and scores["loss"] > 0
    want = [greedy(student.eval(), None, list(p.source), top_k=1, length=5) for p in pairs()]
    assert [w for w, _ in seen] == [w[:-1] if w[-1] == EOS else w for w in want]
    assert [list(w) for _, w in seen] == [list(p.target[:-1]) for p in pairs()]
    with pytest.raises(ValueError, match="max_new_tokens and prompt_length >= 1"):
        GenerationScorer(grade, name="x", max_new_tokens=0)


def test_pairs_and_their_files(tmp_path: Path) -> None:
    assert make_pair([3, EOS], [4], eos=EOS) == Pair((3, EOS), (4, EOS))
    assert make_pair([3, 4, 5], [6, 7, 8], eos=EOS, lengths=(2, 3)) == Pair((3, 4), (6, 7, 8))
    with pytest.raises(ValueError, match="needs tokens on both sides; got 0 and 1"):
        make_pair([], [1])
    with pytest.raises(ValueError, match="no longer than"):
        collate_pairs(pairs(), lengths=(3, 3))
    with pytest.raises(ValueError, match="needs pairs no longer"):
        Pairs([])
    path = tmp_path / "a.jsonl.gz"
    lines: list[dict[str, Any]] = [{"dialogue": "a", "summary": "b", "topic": "c"}, {"question": "d", "answer": "e"}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert read_pairs(path) == [("a", "b"), ("d", "e")]
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 has the fields \['text'\]"):
        read_pairs(other)
    other.write_text('{"source": "a", "target": "b"}\n', encoding="utf-8-sig")
    assert read_pairs(other) == [("a", "b")]
    other.write_text('{"source": "a", "target": "b"}\n[1]\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2, must be an object; got list"):
        read_pairs(other)
    assert Pairs(pairs(), batch_size=2).identity != Pairs(pairs()[::-1], batch_size=2).identity


@needs_shared
def test_the_data_sets_that_lie_here() -> None:
    for name, count in (("dialogsum/dev", 500), ("dialogsum/test", 500), ("gsm8k/test", 1319)):
        found = read_pairs(SHARED / "data" / "text" / f"{name}.jsonl.gz")
        assert len(found) == count and all(a and b for a, b in found)
        if name.startswith("gsm8k"):
            assert all(exact_match(b, b) == 1.0 for _, b in found)


class OwnShift(nn.Module):
    """An encoder-decoder of another make: it shifts the labels it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.table(nn.functional.pad(batch["labels"].clamp_min(0), (1, -1)))}


def test_what_is_refused_and_other_makes() -> None:
    task, batch = Seq2Seq(), collate_pairs(pairs())
    model = OwnShift()
    task.prepare_model(model)
    (rows,) = task.rows(model(task.inputs(batch)[0]), None, batch)
    assert len(rows) == 18
    with pytest.raises(TypeError, match=r"is an encoder-decoder. Its task is tasks.Seq2Seq"):
        LanguageModeling().prepare_model(t5(8, 0))
    with pytest.raises(TypeError, match=r"is not an encoder-decoder. Its task is tasks.LanguageModeling"):
        task.prepare_model(gpt2(8, 0))
    with pytest.raises(ValueError, match=r"input_ids \(B, S\) and labels \(B, L\); got tuple"):
        task.inputs((1, 2))
    with pytest.raises(ValueError, match=r"got \{'input_ids': \(4, 8\)"):
        task.inputs(batch | {"labels": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"needs learn of shape"):
        task.inputs(batch | {"learn": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match='no "generated" with their ids'):
        task.inputs(batch | {"learn": torch.ones_like(batch["labels"])})
    source = {"input_ids": batch["input_ids"]}
    with pytest.raises(TypeError, match="cannot generate together"):
        generate(t5(8, 0), gpt2(8, 0), [[PAD]] * 4, max_new_tokens=2, source=source)
    nowhere = t5(8, 0)
    nowhere.config.decoder_start_token_id = None  # pyright: ignore
    with pytest.raises(ValueError, match="has no decoder_start_token_id"):
        list(OnPolicy(nowhere, [batch], generated_fraction=1.0))
