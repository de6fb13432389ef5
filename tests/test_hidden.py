"""Hidden states in place of logits: recorded once, checked, and equal to the teacher that was asked."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tempering import distill
from tempering.data import Pairs, Tokens
from tempering.data.text import TextExample
from tempering.kernels import linear_loss
from tempering.methods import DTKD, KD  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rows import total
from tempering.tasks import LanguageModeling, Seq2Seq
from tempering.teachers import CachedHidden, Live, record_hidden
from tempering.teachers.cache.base import CorruptCacheError
from tempering.teachers.cache.hidden import head_of
from tempering.teachers.outputs import Head, Hidden
from tempering.temperature import Sharpness
from tests.test_generation import PAD, V, gpt2, llama, texts
from tests.test_seq2seq import bart, pairs, t5

TASK = LanguageModeling()


def capped(seed: int = 1) -> nn.Module:
    """Gemma 2, whose logits are capped softly."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 1.5}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=V, initializer_range=0.3, pad_token_id=PAD, **sizes, **heads))


def scaled(seed: int = 1) -> nn.Module:
    """Cohere's, whose logits are scaled."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "logit_scale": 0.3}
    return CohereForCausalLM(CohereConfig(vocab_size=V, initializer_range=0.3, pad_token_id=PAD, **sizes, **heads))


MODELS = {"gpt2": partial(gpt2, 12), "llama": partial(llama, 12), "capped": capped, "scaled": scaled}


def data(**options: Any) -> Tokens:
    return Tokens(texts(), batch_size=2, pad=PAD, **options)


def live(model: nn.Module, task: LanguageModeling = TASK) -> Live:
    model = model.float()
    task.prepare_model(model)
    return Live(model)


def ask(teacher: Live, batches: Any, path: Path, **options: Any) -> CachedHidden:
    return record_hidden(teacher, batches, path, quiet=True, **{"inputs": TASK.inputs, **options})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_rows_are_the_live_teacher_s_to_the_rounding(tmp_path: Path, family: str, precision: str) -> None:
    teacher, student = live(MODELS[family](seed=1)), gpt2(8, 0)
    TASK.prepare_model(student)
    tokens = data(side="left")
    cached = ask(teacher, tokens, tmp_path / "h", precision=precision)
    near = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 3e-3}[precision]
    for batch in tokens:
        student_in, inputs, ids = TASK.inputs(batch)
        said = student(student_in)
        (want,) = TASK.rows(said, teacher(inputs, ids), batch)
        (got,) = TASK.rows(said, cached(inputs, ids), batch)
        assert got.teacher.shape == want.teacher.shape and want.teacher.std() > 0.1
        torch.testing.assert_close(got.teacher, want.teacher, rtol=near, atol=near * float(want.teacher.abs().max()))
    head = cached.head
    assert (head.cap, head.scale) == ({"capped": 1.5}.get(family), {"scaled": 0.3}.get(family, 1.0))


@pytest.mark.parametrize("family", [t5, bart])
def test_encoder_decoders_too(tmp_path: Path, family: Any) -> None:
    task, batches = Seq2Seq(), Pairs(pairs(), batch_size=2)
    teacher = live(family(8, 1), task)
    cached = ask(teacher, batches, tmp_path / "h", precision="fp32", inputs=task.inputs)
    for batch in batches:
        _, inputs, ids = task.inputs(batch)
        place = task._positions(batch)[0]
        want = teacher(inputs, ids).logits.flatten(0, 1)[place]
        torch.testing.assert_close(
            cached(inputs, ids).gather_positions(place, batch["labels"].shape), want, rtol=1e-6, atol=1e-5
        )


def test_a_run_learns_the_same_from_it(tmp_path: Path) -> None:
    teacher, tokens = live(gpt2(12, 1)), data()
    cached, losses = ask(teacher, tokens, tmp_path / "h", precision="fp32"), []
    for source in (teacher, cached):
        student, seen = gpt2(8, 0).float(), []
        options: dict[str, Any] = {"task": TASK, "epochs": 2, "quiet": True, "skip_checks": ["above chance"]}
        options["on_step"] = lambda step, loss, seen=seen: seen.append(float(loss.detach()))
        sgd = partial(torch.optim.SGD, lr=0.1)
        # in float32 the root of "exact" is known to 1e-5 and so a loss to 1e-6: either source is as near to a run in
        # float64 as to the other; temperatures in closed form show what the cache itself changes
        method = DTKD(temperature=Sharpness(4.0, solve="std"))
        run = distill(student, source, tokens, method=method, optimizer=sgd, test=data(), **options)
        losses.append([*seen, run.best["test"]["loss"], run.best["test"]["agreement"]])
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("family", ["capped", "scaled"])
def test_from_hidden_states_to_the_loss_without_logits(tmp_path: Path, family: str) -> None:
    teacher, student, tokens = live(MODELS[family]()), MODELS[family](seed=0).float(), data(shuffle=False)
    TASK.prepare_model(student)
    answers = ask(teacher, tokens, tmp_path / "h", precision="fp32")
    batch = next(iter(tokens))
    student_in, inputs, ids = TASK.inputs(batch)
    (rows,) = TASK.rows(student(student_in), teacher(inputs, ids), batch)
    want = total(KD()(rows, 1.0), rows)
    want.backward()
    slopes = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    place, target, _ = TASK._positions(batch)
    answer, told = answers(inputs, ids), {n: student_in[n] for n in ("input_ids", "attention_mask", "position_ids")}
    mine = student.model(**told).last_hidden_state.flatten(0, 1)[place]  # pyright: ignore
    taught = answer.rows(place, tuple(batch["input_ids"].shape))
    got = linear_loss(KD(), mine, head_of(student), taught, answer.head, target=target, memory=2**14).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.backward()
    found = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(found) > 5 and max(float(g.abs().max()) for g in found) > 1e-2
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"needs cap > 0; got 0\.0"):
        Head(torch.zeros(3, 2), cap=0.0)


def test_a_recording_is_refused_for_anything_else_and_damage_is_named(tmp_path: Path) -> None:
    path, teacher = tmp_path / "h", live(gpt2(12, 1))
    first = ask(teacher, data(), path)
    assert ask(teacher, data(), path).identity == first.identity
    with pytest.raises(ValueError, match="its teacher is"):
        ask(live(gpt2(12, 2)), data(), path)
    with pytest.raises(ValueError, match="its precision is 'bf16', requested is 'fp32'"):
        ask(teacher, data(), path, precision="fp32")
    other = Tokens([*texts(), TextExample((1, 2, 3), (False, True, True))], batch_size=2, pad=PAD)
    with pytest.raises(ValueError, match=r"contains outputs for other data: .* the text with id 5, of 3 tokens"):
        CachedHidden(path, batches=other)
    with pytest.raises(ValueError, match="contains outputs for other data"):
        distill(gpt2(8, 0), CachedHidden(path), other, method=KD(), task=TASK, epochs=1, quiet=True)
    with pytest.raises(ValueError, match="contains the outputs of another teacher"):
        CachedHidden(path, teacher=live(gpt2(12, 2)))
    batch = data().batch([3, 1])
    with pytest.raises(ValueError, match=r"has texts, and the batch has no input_ids but \['pixels'\]"):
        first({"pixels": batch["input_ids"]}, None)
    with pytest.raises(ValueError, match=r"have \(2, 14\) positions, and the batch has \(2, 9\)"):
        first(batch, None).gather_positions(torch.tensor([0]), (2, 9))
    for name in ("00000.safetensors", "head.safetensors"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CorruptCacheError, match=f"{name} was changed since it was recorded"):
            CachedHidden(path)
        unseen = CachedHidden(path, checksum=False)
        with pytest.raises(CorruptCacheError, match=f"{name} was changed"):
            unseen.check_files()
        (path / name).write_bytes(whole[:-2])
        with pytest.raises(
            CorruptCacheError, match=f"{name} has {len(whole) - 2} bytes, and key.json says {len(whole)}"
        ):
            CachedHidden(path, checksum=False)
        (path / name).unlink()
        with pytest.raises(CorruptCacheError, match=f"{name} is missing"):
            CachedHidden(path)
        (path / name).write_bytes(whole)
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        CachedHidden(tmp_path / "nothing")


class Killed(RuntimeError):
    pass


def test_a_recording_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempering.teachers.cache.shard_recorder.TEXTS", 2)
    teacher, calls = live(gpt2(12, 1)), []
    plain = Live.__call__

    def counted(self: Live, inputs: Any, ids: Any = None) -> Any:
        calls.append(ids.tolist())
        if len(calls) == 2:
            raise Killed
        return plain(self, inputs, ids)

    monkeypatch.setattr(Live, "__call__", counted)
    with pytest.raises(Killed):
        ask(teacher, data(), tmp_path / "h")
    with pytest.raises(ValueError, match="its teacher is"):
        ask(live(gpt2(12, 2)), data(), tmp_path / "h")
    cached = ask(teacher, data(), tmp_path / "h")
    assert calls == [[0, 1], [2, 3], [2, 3], [4]] and not (tmp_path / "h.partial").exists()
    assert sorted(p.name for p in (tmp_path / "h").glob("*.safetensors")) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "head.safetensors",
    ]
    monkeypatch.undo()
    whole = ask(teacher, data(), tmp_path / "other")
    batch = TASK.inputs(data().batch([4, 0, 3]))[1]
    torch.testing.assert_close(cached(batch, None).states, whole(batch, None).states, rtol=0, atol=0, equal_nan=True)


def looked_up(indices: list[Any], *, cached: CachedHidden) -> torch.Tensor:
    return cached(TASK.inputs(data().batch(indices))[1], None).states.nan_to_num()


def test_many_workers_read_it(tmp_path: Path) -> None:
    cached = ask(live(gpt2(12, 1)), data(), tmp_path / "h")
    want = [looked_up(part, cached=cached) for part in ([0, 1], [2, 3], [4])]  # its files are open
    loader = DataLoader(
        range(5),  # pyright: ignore[reportArgumentType]
        batch_size=2,
        collate_fn=partial(looked_up, cached=cached),
        num_workers=2,
    )
    for a, b in zip(loader, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(looked_up([0, 1], cached=pickle.loads(pickle.dumps(cached))), want[0])


def test_what_is_refused(tmp_path: Path) -> None:
    teacher = live(scaled())
    head = head_of(teacher.model)
    wrong = Head(head.weight, head.bias)
    with pytest.raises(
        ValueError, match=r"head of CohereForCausalLM does not reproduce its logits .* largest difference"
    ):
        ask(teacher, data(), tmp_path / "a", head=wrong)
    with pytest.raises(TypeError, match="Linear has no head"):
        head_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="precision 'fp16', 'bf16', 'fp32'; got 'int8'"):
        ask(teacher, data(), tmp_path / "b", precision="int8")
    broken = live(gpt2(12, 1))
    with torch.no_grad():
        broken.model.transformer.ln_f.weight.fill_(1e6)  # pyright: ignore
    with pytest.raises(ValueError, match=r"the teacher's hidden states reach .* and the largest fp16 number is 65504"):
        ask(broken, data(), tmp_path / "c", precision="fp16")
    with torch.no_grad():
        broken.model.transformer.ln_f.weight.fill_(torch.nan)  # pyright: ignore
    with pytest.raises(ValueError, match=r"largest difference is nan"):
        ask(broken, data(), tmp_path / "d")
    empty = Hidden(torch.zeros(1, 3, 2), Head(torch.ones(4, 2))).gather_positions(
        torch.tensor([], dtype=torch.long), (1, 3)
    )
    assert empty.shape == (0, 4)
