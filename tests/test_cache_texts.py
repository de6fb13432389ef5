"""Recordings of texts by their tokens: any padding, order and subset; only learned positions take space."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.data import Pairs, Tokens
from tempering.data.pairs import make_pair
from tempering.data.text import TextExample, collate, pack
from tempering.methods import Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.tasks import LanguageModeling, Seq2Seq
from tempering.teachers import (
    CachedTopK,
    Live,
    TopKTeacher,
    record_hidden,
    record_sampled,
    record_top_k,
)
from tempering.teachers import record as record_logits
from tempering.teachers.outputs import Hidden
from tests.test_cache_files import write_shards
from tests.test_generation import PAD, gpt2, llama, texts
from tests.test_seq2seq import pairs, t5

TASK = LanguageModeling()


def live(model: Any, task: LanguageModeling = TASK) -> Live:
    model = model.float()
    task.prepare_model(model)
    return Live(model)


Record = Callable[..., Any]
KINDS: dict[str, Record] = {
    "likeliest": lambda source, *args, **how: record_top_k(TopKTeacher(source, top=4), *args, **how),
    "sampled": lambda source, *args, **how: record_sampled(TopKTeacher(source, samples=6), *args, **how),
    "hidden": lambda source, *args, **how: record_hidden(source, *args, precision="fp32", **how),
}


class Counted(Live):
    """Counts the texts that the model is run on."""

    count = 0

    def __call__(self, inputs: Any, ids: Any = None) -> Any:
        self.count += len(inputs["input_ids"])
        return super().__call__(inputs, ids)


def counted(model: Any, task: LanguageModeling = TASK) -> Counted:
    return Counted(live(model, task).model)


def rows(cached: Any, batch: dict[str, Any], task: LanguageModeling = TASK) -> list[torch.Tensor]:
    """The outputs at the learned positions of a batch."""
    _, inputs, ids = task.inputs(batch)
    output, index, shape = cached(inputs, ids), task._positions(batch)[0], task._shape(batch)
    if isinstance(output, Hidden):
        return [output.rows(index, shape)]
    found = output.gather_positions(index, shape)
    return [found.ids, found.logp, found.tail_logp]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", [gpt2, llama])
@pytest.mark.parametrize("kind", KINDS)
def test_other_padding_order_and_subsets_read_the_same_bits(tmp_path: Path, kind: str, family: Any) -> None:
    source, examples = counted(family(12, 1)), texts()
    tokens = Tokens(examples, batch_size=2, pad=PAD)
    cached = KINDS[kind](source, tokens, tmp_path / "c", inputs=TASK.inputs, quiet=True)
    want = rows(cached, collate(examples, pad=PAD, ids=range(5)))
    others = [
        Tokens(examples, batch_size=3, pad=PAD, side="left", length=21),
        Tokens(examples[::-1], batch_size=5, pad=7, shuffle=False),
        Tokens(examples[1:4], batch_size=1, pad=PAD),
    ]
    for other in others:
        assert cached.incompatibility(other) is None
        again = KINDS[kind](source, other, tmp_path / "c", inputs=TASK.inputs, quiet=True)
        assert again.identity == cached.identity and source.count == 5, "nothing was computed again"
    hows: list[dict[str, Any]] = [{"side": "left", "length": 21}, {"multiple": 8}, {"ids": [4, 3, 2, 1, 0]}, {}]
    for how in hows:
        batch = collate(examples, pad=PAD, **how)  # also without ids, as trainers of other libraries give them
        assert equal(rows(cached, batch), want)
    lone = [rows(cached, collate([example], pad=PAD)) for example in examples]
    if kind != "sampled":  # whose number of columns depends on the batch
        assert equal([torch.cat(side) for side in zip(*lone, strict=True)], want)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_added_to_a_finished_recording(tmp_path: Path, kind: str) -> None:
    source, examples, path = counted(gpt2(12, 1)), texts(), tmp_path / "c"
    first = KINDS[kind](source, Tokens(examples[:3], batch_size=2, pad=PAD), path, inputs=TASK.inputs, quiet=True)
    batch = collate(examples[:3], pad=PAD, ids=range(3))
    want = rows(first, batch)
    whole = Tokens(examples, batch_size=2, pad=PAD, side="left")
    assert "the text with id 3" in str(first.incompatibility(whole))
    with pytest.raises(ValueError, match=r"c has 3 texts, and the text with id 4, of \d+ tokens, is not one of them"):
        first(*TASK.inputs(whole.batch([1, 4]))[1:])
    more = KINDS[kind](source, whole, path, inputs=TASK.inputs, quiet=True)
    assert source.count == 5 and more.identity == first.identity and more.rows == 5
    assert equal(rows(more, batch), want) and equal(rows(first, batch), want), "an open one reads on"
    assert len(rows(more, whole.batch([1, 4]))[0]) == 7 and more.incompatibility(whole) is None
    assert not (path / "done.jsonl").exists() and not list(tmp_path.glob("*.partial*"))


def test_an_encoder_decoder_s_texts_are_found_by_source_and_target(tmp_path: Path) -> None:
    task, whole = Seq2Seq(), pairs()
    source = counted(t5(8, 1), task)
    twin = make_pair(whole[0].source, whole[1].target)
    first, path = Pairs(whole, batch_size=2), tmp_path / "c"
    for kind, record in KINDS.items():
        cached, before = record(source, first, path / kind, inputs=task.inputs, quiet=True), source.count
        wide = Pairs(whole[::-1], batch_size=3, lengths=(30, 20), shuffle=False)
        record(source, wide, path / kind, inputs=task.inputs, quiet=True)
        assert source.count == before
        order = list(range(len(whole)))
        narrow = rows(cached, first.batch(order), task)
        assert equal(rows(cached, wide.batch(order[::-1]), task), narrow)
        more = record(source, Pairs([*whole, twin], batch_size=2), path / kind, inputs=task.inputs, quiet=True)
        assert source.count == before + 1 and equal(rows(more, first.batch(order), task), narrow)


def test_other_labels_of_a_text_are_added_and_never_guessed(tmp_path: Path) -> None:
    source, examples = counted(gpt2(12, 1)), texts()
    whole, more = [dataclasses.replace(x, learn=(True,) * len(x)) for x in examples], None
    for kind, record in KINDS.items():
        few, path = Tokens(examples, batch_size=2, pad=PAD), tmp_path / kind
        cached, before = record(source, few, path, inputs=TASK.inputs, quiet=True), source.count
        want = rows(cached, few.batch(range(5)))
        batch = collate(whole, pad=PAD)
        with pytest.raises(
            ValueError, match=r"does not have \d+ of the \d+ learned positions: it stores those that were"
        ):
            rows(cached, batch)
        more = record(source, Tokens(whole, batch_size=2, pad=PAD), path, inputs=TASK.inputs, quiet=True)
        assert source.count == before + 4 and more.rows == 5, "one has a prompt of one token"
        assert len(rows(more, batch)[0]) == sum(len(x) - 1 for x in examples)
        if kind != "sampled":  # whose number of columns depends on the batch
            assert equal(rows(more, few.batch(range(5))), want)
    without = [dataclasses.replace(x, ids=x.ids[::-1], learn=(False,) * len(x)) for x in examples[:2]]
    for kind, record in KINDS.items():  # texts whose answer was truncated, and a recording of nothing else
        for number, tokens in enumerate((Tokens([*examples, *without], pad=PAD), Tokens(without, pad=PAD))):
            path = tmp_path / f"{kind}{number}"
            cached = record(source, tokens, path, inputs=TASK.inputs, quiet=True)
            ids, several = torch.arange(tokens.rows), tokens.batch(range(tokens.rows))
            assert cached(*TASK.inputs(several)[1:]).stored.sum() == TASK.learned(several).sum() and len(ids) > 1
    nothing = collate([dataclasses.replace(examples[0], learn=(False,) * len(examples[0]))], pad=PAD)
    output: Any = more and more(TASK.inputs(nothing)[1], None)
    loss = TASK.rows(torch.zeros(*nothing["input_ids"].shape, output.head.weight.shape[0]), output, nothing)[0]
    assert loss.weight is not None and loss.weight.tolist() == [0.0]


def test_packed_texts_are_found_too(tmp_path: Path) -> None:
    examples = texts()
    for kind, record in KINDS.items():
        tokens = Tokens(examples, batch_size=2, pad=PAD)
        cached = record(live(gpt2(12, 1)), tokens, tmp_path / kind, inputs=TASK.inputs, quiet=True)
        packed = [rows(cached, batch) for batch in pack(examples, 64)]
        assert len(packed) == 1 and equal(packed[0], rows(cached, collate(examples, pad=PAD)))


@pytest.mark.parametrize(("precision", "each"), [("fp32", 6 * 17 + 4), ("fp16", 4 * 17 + 2)])
def test_a_learned_token_takes_the_documented_bytes_whatever_the_padding(
    tmp_path: Path, precision: str, each: int
) -> None:
    """448 learned tokens in 7,168 positions."""
    prompt, answer = (False,) * 20, (True,) * 7
    examples = [TextExample(tuple(range(i, i + 27)), prompt + answer) for i in range(64)]
    tokens = Tokens(examples, batch_size=16, pad=PAD, length=112)
    teacher = TopKTeacher(live(gpt2(12, 1)), top=16)
    cached = record_top_k(teacher, tokens, tmp_path / "c", inputs=TASK.inputs, precision=precision, quiet=True)
    size = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.safetensors"))
    assert len(rows(cached, tokens.batch(range(64)))[0]) == 448
    assert size < 448 * each + 64 * 24 + 600, "and 16 a text, 8 a stretch, and a header"


def test_sampled_tokens_and_hidden_states_take_no_space_for_padding(tmp_path: Path) -> None:
    def size(kind: str, length: int) -> int:
        path, tokens = tmp_path / f"{kind}{length}", Tokens(texts(), batch_size=2, pad=PAD, length=length)
        KINDS[kind](live(gpt2(12, 1)), tokens, path, inputs=TASK.inputs, quiet=True)
        return sum(file.stat().st_size for file in path.glob("0*.safetensors"))

    for kind in ("sampled", "hidden"):
        assert size(kind, 14) == size(kind, 120)


def test_a_recording_of_an_earlier_version_cannot_be_extended(tmp_path: Path) -> None:
    part = {
        "ids": torch.zeros(2, 2, 3, 1, dtype=torch.uint8),
        "logp": torch.zeros(2, 2, 3),
        "rest": torch.zeros(2, 2),
    }
    write_shards(tmp_path / "c", "likeliest tokens", {"00000.safetensors": (part, {})}, precision="fp32")
    teacher, tokens = TopKTeacher(live(gpt2(12, 1)), top=2), Tokens(texts(), pad=PAD)
    with pytest.raises(
        ValueError, match=r"its teacher is 't+', requested is .*Give another path, or remove that folder"
    ):
        record_top_k(teacher, tokens, tmp_path / "c", inputs=TASK.inputs, quiet=True)
    with pytest.raises(ValueError, match="of tokens, labels, padding and order"):
        CachedTopK(tmp_path / "c", batches=tokens)


def test_errors_of_text_caches_speak_of_texts(tmp_path: Path) -> None:
    tokens = Tokens(texts(), batch_size=2, pad=PAD)
    for kind, record in KINDS.items():
        cached = record(live(gpt2(12, 1)), tokens, tmp_path / kind, inputs=TASK.inputs, quiet=True)
        strange = Tokens([TextExample((1, 2), (True, True))], pad=PAD)
        for why in (str(cached.incompatibility(strange)), str(cached.incompatibility([1]))):
            assert "text" in why and not any(word in why for word in ("image", "mean", "std", "views")), why
    bare: Any = gpt2(12, 1)
    with pytest.raises(
        TypeError, match=r"record_hidden needs a live teacher; got GPT2LMHeadModel.*teachers\.Live\(model"
    ):
        record_hidden(bare, tokens, tmp_path / "x", inputs=TASK.inputs)
    with pytest.raises(TypeError, match=r"needs a Teacher; got GPT2LMHeadModel.*TopKTeacher\(teachers\.Live"):
        record_top_k(bare, tokens, tmp_path / "x", inputs=TASK.inputs)


def test_a_recording_serves_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Its batches are padded to their longest text, and have no ids."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tempering.integrations.huggingface import DistillMixin

    class Distiller(DistillMixin, transformers.Trainer):
        pass

    examples, source = texts(), TopKTeacher(live(gpt2(12, 1)), top=4)
    tokens = Tokens(examples, batch_size=2, pad=PAD, length=30)
    cached = record_top_k(source, tokens, tmp_path / "c", inputs=TASK.inputs, quiet=True)
    losses = []
    for teacher in (source, cached):
        options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 0}
        args = transformers.TrainingArguments(
            str(tmp_path), **options, report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no"
        )
        trainer: Any = Distiller(
            gpt2(8, 0).float(),
            args,
            train_dataset=examples,
            data_collator=lambda part: collate(part, pad=PAD, side="left"),
            teacher=teacher,
            method=Divergence(objective="kl"),
            task=LanguageModeling(),
            selfcheck=False,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


# faults


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_named_and_the_recording_resumed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempering.teachers.cache.shard_recorder.TEXTS", 2)
    sync, left, tokens = os.fsync, [0], Tokens(texts(), batch_size=2, pad=PAD)

    def full(descriptor: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    def recorded(path: Path) -> Any:
        cached = KINDS[kind](live(gpt2(12, 1)), tokens, path, inputs=TASK.inputs, quiet=True)
        return rows(cached, tokens.batch(range(5)))

    monkeypatch.setattr(os, "fsync", full)
    want = recorded(tmp_path / "whole")
    for where in (1, 2, 5):
        path, left[0] = tmp_path / str(where), where
        with pytest.raises(OSError, match=rf"cannot write .* under {path}\.partial: No space left.*record\(\) again"):
            recorded(path)
        assert equal(recorded(path), want) and not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_on_a_read_only_disk_is_reused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, path = texts(), tmp_path / "c"
    tokens, few = (Tokens(part, batch_size=2, pad=PAD, length=20) for part in (examples, examples[1:3]))
    source = counted(gpt2(12, 1))
    want = rows(KINDS[kind](source, tokens, path, inputs=TASK.inputs, quiet=True), tokens.batch(range(5)))
    low, high = os.open, builtins.open

    def read_only(name: Any, flags: int, *args: Any, **how: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(name))
        return low(name, flags, *args, **how)

    def opened(name: Any, mode: str = "r", *args: Any, **how: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(name))
        return high(name, mode, *args, **how)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(builtins, "open", opened)
    count = source.count
    more = Tokens([*examples, TextExample((1, 2, 3), (True,) * 3)], batch_size=2, pad=PAD)
    for data in (tokens, few):
        cached = KINDS[kind](source, data, path, inputs=TASK.inputs, quiet=True)
        assert equal(rows(cached, tokens.batch(range(5))), want) and source.count == count
    with pytest.raises(OSError, match=r"cannot write .*Read-only file system\. .*make it writable"):
        KINDS[kind](source, more, path, inputs=TASK.inputs, quiet=True)


def test_what_cannot_be_recorded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, source = Tokens(texts(), batch_size=2, pad=PAD), live(gpt2(12, 1))
    numbers: Any = [0, 1]
    for batches in (torch.utils.data.DataLoader(numbers), numbers, None):
        given: Any = batches
        for record_texts in KINDS.values():
            with pytest.raises(TypeError, match=r"does not have\. Use data\.Tokens.* or data\.Pairs"):
                record_texts(source, given, tmp_path / "c", inputs=TASK.inputs)
        with pytest.raises(TypeError, match=r"a recording needs samples with ids.*does not have\. Use data\.Batches"):
            record_logits(source, given, tmp_path / "c")
    with pytest.raises(ValueError, match=r"only logits \(B, C\).*For texts: record_top_k\(TopKTeacher"):
        record_logits(source, tokens, tmp_path / "logits", quiet=True)
    for wrong in (None, TASK, lambda batch: batch):
        inputs: Any = wrong
        with pytest.raises(TypeError, match=r"inputs needs a function.*LanguageModeling\(\)\.inputs"):
            record_top_k(TopKTeacher(source, top=4), tokens, tmp_path / "c", inputs=inputs)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"must be a folder, and .*file is a file"):
        record_top_k(TopKTeacher(source, top=4), tokens, file / "c", inputs=TASK.inputs)
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = record_top_k(TopKTeacher(source, top=4), tokens, "~/c", inputs=TASK.inputs, quiet=True)
    assert cached.path == tmp_path / "c" == CachedTopK("~/c").path
    batch = collate(texts(), pad=PAD)
    with pytest.raises(ValueError, match="Only one of the two has the inputs token_type_ids"):
        rows(cached, {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})


class Changed(torch.nn.Module):
    """A model that changes the logit of a token."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = gpt2(12, 1).float(), value
        self.config = self.inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits.index_fill(-1, torch.tensor([3]), self.value)
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_cannot_be_stored_are_named(kind: str, value: float, tmp_path: Path) -> None:
    """A forbidden token can be, except by a head, which would allow it."""
    source, tokens = live(Changed(value)), Tokens(texts(), batch_size=2, pad=PAD)
    if value == float("-inf") and kind != "hidden":
        cached = KINDS[kind](source, tokens, tmp_path / "c", inputs=TASK.inputs, quiet=True)
        output: Any = cached(TASK.inputs(tokens.batch(range(5)))[1], None)
        assert not bool(((output.ids == 3) & (output.logp > -1e3)).any())
        return
    message = "head of Changed does not reproduce its logits" if kind == "hidden" else "log-probabilities contain NaN"
    with pytest.raises(ValueError, match=message):
        KINDS[kind](source, tokens, tmp_path / "c", inputs=TASK.inputs, quiet=True)
