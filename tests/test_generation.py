"""Generation: tokens as rows, whatever the padding, the packing, the split and the heads' sizes."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data.text import TextExample, chat, collate, make_prompt_example, pack, windows
from tempering.data.tokens import Tokens
from tempering.methods import DKD, DTKD, KD, Divergence, Method, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.tasks import LanguageModeling, shared_vocabulary
from tempering.teachers import Live
from tempering.temperature import Sharpness
from tests.lazy_modules import needs

pytestmark = needs("transformers")

EOS, PAD, V = 256, 256, 257  # bytes, and an end that is the padding too


class Bytes:
    """A tokenizer of bytes, with one end and a chat template that only appends."""

    eos_token_id, bos_token_id, pad_token_id = EOS, None, PAD

    def __init__(self, *, swapped: bool = False, more: int = 0, backwards: bool = False) -> None:
        self.vocabulary = {f"<{i}>": i for i in range(256)} | {"<end>": EOS} | {f"<new{i}>": V + i for i in range(more)}
        self.backwards = backwards
        if swapped:
            self.vocabulary["<65>"], self.vocabulary["<66>"] = 66, 65

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def encode(self, text: str) -> list[int]:
        return list(text.encode())[:: -1 if self.backwards else 1]

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool, tokenize: bool) -> list[int]:
        assert tokenize
        out: list[int] = []
        for message in messages:
            out += self.encode(f"{message['role'][0]}:{message['content']}")
            out += [EOS]
        return out + (self.encode("a:") if add_generation_prompt else [])


def gpt2(width: int, seed: int, vocabulary: int = V) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": vocabulary, "n_positions": 64, "n_embd": width, "n_layer": 1, "n_head": 2}
    config = GPT2Config(bos_token_id=EOS, eos_token_id=EOS, **sizes, **drops)  # pyright: ignore[reportArgumentType]
    config.initializer_range = 0.3
    return GPT2LMHeadModel(config).double()


def llama(width: int, seed: int, vocabulary: int = V) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


MODELS = {"gpt2": gpt2, "llama": llama}


def texts() -> list[TextExample]:
    """Of unequal length, each with a prompt."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 5), (1, 2), (4, 9), (2, 1), (6, 3))
    return [
        make_prompt_example(*(torch.randint(256, (n,), generator=generator).tolist() for n in pair), eos=EOS)
        for pair in sizes
    ]


def ready(student: nn.Module, teacher: nn.Module | None = None) -> LanguageModeling:
    task = LanguageModeling()
    for model in (student, teacher):
        if model is not None:
            task.prepare_model(model)
    return task


def loss_of(
    student: nn.Module, teacher: nn.Module, batches: list[Any], method: Method, task: LanguageModeling | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a step of these micro-batches, and its gradients in the student."""
    task = task or ready(student, teacher)
    taught = Live(teacher)
    student.zero_grad()
    whole = sum(float(task.row_weights(batch)["logits"]) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        student_in, teacher_in, ids = task.inputs(batch)
        (rows,) = task.rows(student(student_in), taught(teacher_in, ids), batch)
        loss = loss + total(method(rows, 1.0), rows, normalizer=whole)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in student.parameters() if p.grad is not None]


METHODS = {
    "supervised": Supervised(),
    "kd": KD(),
    "dtkd": DTKD(temperature=Sharpness(4.0)),
    "dkd": DKD(),
    "jsd": Divergence(objective="jsd", hard=0.5),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_padding_splitting_and_packing_change_nothing(family: str, method: str) -> None:
    student, teacher = MODELS[family](8, 0), MODELS[family](12, 1)
    examples, made = texts(), METHODS[method]
    want, slopes = loss_of(student, teacher, [collate(examples, pad=PAD)], made)
    assert want > 0.1 and any(g.abs().max() > 1e-4 for g in slopes)
    ways = {
        "left": [collate(examples, pad=PAD, side="left")],
        "wide": [collate(examples, pad=7, multiple=32)],
        "split": [collate(examples[:1]), collate(examples[1:4], side="left"), collate(examples[4:])],
        "packed": [pack(examples, 24, pad=PAD)[0], *pack(examples, 24, pad=PAD)[1:]],
    }
    assert len(ways["packed"]) == 2
    for way, batches in ways.items():
        got, found = loss_of(student, teacher, batches, made)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=way)
        for a, b in zip(found, slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=way)


def test_the_loss_is_the_mean_over_the_completions_tokens_and_the_end_counts_once() -> None:
    student, teacher = gpt2(8, 0), gpt2(12, 1)
    task, examples = ready(student, teacher), texts()
    batch = collate(examples, pad=PAD)
    by_hand, count = 0.0, 0
    for example in examples:
        said = student(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for i, (token, learned) in enumerate(zip(example.ids, example.learn, strict=True)):
            if learned:
                by_hand, count = by_hand - said[i - 1, token].item(), count + 1
    assert count == sum(n + 1 for n in (5, 2, 9, 1, 3)) == int(task.row_weights(batch)["logits"])
    got, _ = loss_of(student, teacher, [batch], Supervised())
    assert float(got) == pytest.approx(by_hand / count, rel=1e-9)
    scores = task.score(student, [batch], teacher=Live(teacher))
    assert scores["loss"] == pytest.approx(by_hand / count, rel=1e-9)
    assert scores["perplexity"] == pytest.approx(math.exp(by_hand / count))
    assert task.score(student, [batch], teacher=Live(copy.deepcopy(student)))["agreement"] == 1.0
    assert "agreement" not in task.score(student, [batch]) and task.headline() == ("loss", False)


def test_prompt_completion_and_windows() -> None:
    example = make_prompt_example([1, 2], [3, EOS], eos=EOS)
    assert example == TextExample((1, 2, 3, EOS), (False, False, True, True))
    assert make_prompt_example([1, 2], [3], eos=EOS) == example
    assert make_prompt_example([1, 2, 3], [4, 5], eos=EOS, length=4).ids == (3, 4, 5, EOS)
    assert make_prompt_example([1, 2, 3], [4, 5, 6], eos=EOS, length=2) == TextExample((4, 5), (True, True))
    assert [e.ids for e in windows(range(8), 4)] == [(0, 1, 2, 3), (3, 4, 5, 6)]
    with pytest.raises(ValueError, match="no token to learn"):
        make_prompt_example([1], [])
    with pytest.raises(ValueError, match="length >= 2"):
        windows([1, 2, 3], 1)
    with pytest.raises(ValueError, match="does not fit into length=3"):
        pack([example], 3)
    with pytest.raises(ValueError, match="side 'left' or 'right'; got 0"):
        collate([])
    with pytest.raises(ValueError, match="a learn flag for every id"):
        TextExample((1, 2), (True,))


def test_of_a_chat_the_assistant_s_turns_are_learned() -> None:
    talk = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")]
    messages = [{"role": role, "content": said} for role, said in talk]
    example = chat(Bytes(), messages)
    learned = bytes(i for i, flag in zip(example.ids, example.learn, strict=True) if flag and i < 256)
    assert learned == b"yook" and sum(example.learn) == 6, "two texts and two ends"

    class Rewrites(Bytes):
        def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
            return [len(messages), *super().apply_chat_template(messages, **options)]

    with pytest.raises(ValueError, match="before turn 1 when later turns are added"):
        chat(Rewrites(), messages)
    with pytest.raises(ValueError, match="no assistant token to learn: roles \\['user'\\]"):
        chat(Bytes(), messages[:1])


class Thinking(Bytes):
    """A template with tools and thinking, as Qwen 3's: the generation prompt closes an empty block of thoughts."""

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()

    def apply_chat_template(
        self, messages: Any, *, tools: Any = None, thinking: bool = False, **options: Any
    ) -> list[int]:
        out = self.encode(f"tools:{len(tools)}") if tools else []
        out += super().apply_chat_template(messages, **options)
        return out + (self.encode("<think></think>") if options["add_generation_prompt"] and not thinking else [])


def test_tools_and_arguments_reach_the_template_of_a_chat() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(ValueError, match=r"generation prompt for turn 1 ends with '<think></think>'.*such as chat\("):
        chat(Thinking(), messages)
    example = chat(Thinking(), messages, tools=[len, max], thinking=True)
    assert bytes(i for i in example.ids if i < 256) == b"tools:2u:hia:yo"
    assert sum(example.learn) == 3 and example.learn[-3:] == (True,) * 3
    written = [messages[0], {"role": "assistant", "content": "<think></think>yo"}]
    assert sum(chat(Thinking(), written).learn) == 3, "the block is part of the turn"


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_a_padded_vocabulary_is_left_out_on_both_sides_as_minus_infinity_is(wider: str) -> None:
    sizes = {"student": V, "teacher": V} | {wider: V + 15}
    student, teacher = gpt2(8, 0, sizes["student"]), gpt2(12, 1, sizes["teacher"])
    task, batch = ready(student, teacher), collate(texts(), pad=PAD)
    got, slopes = loss_of(student, teacher, [batch], DTKD(), task)

    said, taught = (m(task.inputs(batch)[0]).logits.flatten(0, 1) for m in (student, teacher))
    place, target, _ = task._positions(batch)
    said, taught = said[place], taught[place].detach()
    widen = {"student": (said, 0), "teacher": (taught, 0)}
    for side, (z, _) in widen.items():
        z = torch.nn.functional.pad(z, (0, V + 15 - z.shape[1]))
        widen[side] = (z.masked_fill(torch.arange(V + 15) >= V, -torch.inf), 0)
    rows = Rows(widen["student"][0], widen["teacher"][0], target)
    want = total(DTKD()(rows, 1.0), rows)
    torch.testing.assert_close(got, want.detach())
    student.zero_grad()
    want.backward()
    for a, b in zip(slopes, [p.grad for p in student.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    alike = LanguageModeling(vocabulary=V)
    assert alike.score(student, [batch])["loss"] == pytest.approx(
        alike.score(student, [batch], teacher=Live(teacher))["loss"]
    )


def test_agreeing_is_zero_and_shifted_by_one_it_is_not() -> None:
    student = gpt2(8, 0)
    batch, task = collate(texts(), pad=PAD), ready(student)
    loss, slopes = loss_of(student, copy.deepcopy(student), [batch], KD(hard=0.0))
    assert loss < 1e-12 and max(float(g.abs().max()) for g in slopes) < 1e-9
    said = student(task.inputs(batch)[0]).logits
    (rows,) = task.rows(said, said.detach().roll(1, 1), batch)
    assert total(KD(hard=0.0)(rows, 1.0), rows) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_nothing_to_learn_is_zero_with_a_gradient_path(method: str) -> None:
    student, teacher = gpt2(8, 0), gpt2(12, 1)
    batch = collate(texts(), pad=PAD)
    batch["labels"].fill_(IGNORE_INDEX)
    loss, slopes = loss_of(student, teacher, [batch], METHODS[method])
    assert loss == 0.0 and slopes and all((g == 0).all() for g in slopes)
    with pytest.raises(ValueError, match="no token has a label"):
        LanguageModeling().score(student, [batch])
    empty = {"input_ids": torch.zeros(0, 4, dtype=torch.long)}
    assert (
        len(LanguageModeling().rows(torch.zeros(0, 4, V), None, empty)[0])
        == LanguageModeling().row_weights(empty)["logits"]
        == 0
    )


def test_without_labels_every_token_of_a_text_is_learned() -> None:
    batch = collate(texts(), pad=PAD)
    del batch["labels"]
    assert int(LanguageModeling().row_weights(batch)["logits"]) == sum(len(e) - 1 for e in texts())


def test_runs_in_distill_on_models_of_transformers_as_they_are(tmp_path: Any) -> None:
    data = [collate(texts()[i : i + 2], pad=PAD) for i in range(4)]
    student, teacher = llama(8, 0).float(), llama(12, 1).float()
    names = set(student.state_dict())
    adam = partial(torch.optim.Adam, lr=1e-2)
    whole: dict[str, Any] = {"task": LanguageModeling(vocabulary=V), "epochs": 4, "quiet": True, "optimizer": adam}
    distill(teacher, None, data, method=Supervised(), **whole)
    run = distill(student, teacher, data, method=DTKD(), test=data, out=tmp_path, accumulate=2, **whole)
    assert "zero at agreement" in run.facts["selfcheck"]["line"] and set(student.state_dict()) == names
    losses = [epoch["test"]["loss"] for epoch in run.epochs]
    assert losses[-1] < losses[0] and run.best["test"]["loss"] == min(losses)
    assert 0.0 <= run.best["test"]["agreement"] <= 1.0


def test_runs_in_the_trainer_of_transformers(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from tempering.integrations.huggingface import DistillMixin

    class KDTrainer(DistillMixin, Trainer):
        pass

    student, teacher = gpt2(8, 0).float(), gpt2(12, 1).float()
    plain, seen = copy.deepcopy(student), []

    class Seen(KDTrainer):
        def get_batch_samples(self, *args: Any) -> Any:
            batches, count = super().get_batch_samples(*args)
            seen.extend(batches)
            return batches, count

    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        max_grad_norm=0.0,
    )
    collator = partial(collate, pad=PAD)
    own: dict[str, Any] = {"teacher": teacher, "method": KD(), "task": LanguageModeling(), "data_collator": collator}
    own["selfcheck"] = False  # the teacher is not trained
    Seen(student, args, train_dataset=texts()[:4], **own).train()  # pyright: ignore[reportArgumentType]
    assert len(seen) == 2
    loss_of(plain, teacher, seen, KD())
    with torch.no_grad():
        for p in plain.parameters():
            p -= 0.1 * p.grad  # pyright: ignore[reportOperatorIssue]
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class OwnWay(nn.Module):
    """A model that takes the mapping itself, without attention: what follows a token depends on it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.table(batch["input_ids"])}


class NoPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


def test_models_that_take_the_mapping_or_tensors_are_trained_and_scored() -> None:
    data = Tokens(texts(), batch_size=2, pad=PAD)
    for model in (OwnWay, NoPositions):
        run = distill(
            model(), None, data, method=Supervised(), task=LanguageModeling(), epochs=1, test=data, quiet=True
        )
        assert run.last is not None and math.isfinite(run.last["test"]["loss"])


def test_models_of_other_makes() -> None:
    batch = collate(texts(), pad=PAD)
    for model in (OwnWay(), NoPositions()):
        task = ready(model)
        task.prepare_model(model)  # twice is once
        (rows,) = task.rows(model(task.inputs(batch)[0]), None, batch)
        assert rows.student.shape == (int(task.row_weights(batch)["logits"]), V) and rows.student.requires_grad
    with pytest.raises(ValueError, match="NoPositions takes no position_ids, so it cannot keep packed texts apart"):
        model(task.inputs(pack(texts(), 64)[0])[0])


class Wrapped(nn.Module):
    """As adapters wrap a model: all arguments are handed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wrapped_copied_and_in_half_precision(dtype: torch.dtype) -> None:
    student, teacher = Wrapped(gpt2(8, 0).to(dtype)), gpt2(12, 1).to(dtype)
    task, batch = ready(student, teacher), collate(texts(), pad=PAD, side="left")
    batch["attention_mask"] = batch["attention_mask"].bool()
    student = copy.deepcopy(student)  # the hook goes with the copy
    loss, slopes = loss_of(student, teacher, [batch], DTKD(), task)
    assert loss.isfinite() and loss > 0 and all(g.isfinite().all() for g in slopes)
    assert 0.0 < task.score(student, [batch], teacher=Live(teacher))["loss"] < 20.0


def test_what_is_no_batch_of_tokens_is_refused() -> None:
    task, batch = LanguageModeling(), collate(texts())
    with pytest.raises(ValueError, match=r"mappings with input_ids .*; got tuple"):
        task.inputs((1, 2))
    with pytest.raises(ValueError, match=r"got input_ids \(13,\)"):
        task.inputs({"input_ids": torch.arange(13)})
    with pytest.raises(ValueError, match="labels of the shape of input_ids"):
        task.row_weights(batch | {"labels": batch["labels"][:, 1:]})
    with pytest.raises(ValueError, match=r"the teacher must return \(B, L, V\) logits"):
        task.rows(torch.zeros(*batch["input_ids"].shape, V), torch.zeros(2, V), batch)
    with pytest.raises(ValueError, match="vocabulary >= 1"):
        LanguageModeling(vocabulary=0)
    ids = task.rows(torch.zeros(*batch["input_ids"].shape, V), None, batch | {"ids": torch.arange(5) * 10})[0].ids
    assert ids is not None and ids.unique().tolist() == [0, 10, 20, 30, 40]


def test_tokenizers_that_differ_are_told_by_their_first_difference() -> None:
    assert shared_vocabulary(Bytes(), Bytes()) == V
    with pytest.raises(ValueError, match="id 65 is '<65>' for the student and '<66>' for the teacher"):
        shared_vocabulary(Bytes(), Bytes(swapped=True))
    with pytest.raises(
        ValueError, match=r"id 257 is nothing for the student and '<new0>' for the teacher \(257 and 259"
    ):
        shared_vocabulary(Bytes(), Bytes(more=2))
    with pytest.raises(ValueError, match=r"encode .* differently: from token 0 on"):
        shared_vocabulary(Bytes(), Bytes(backwards=True))
    other = Bytes()
    other.eos_token_id = 0
    with pytest.warns(UserWarning, match="eos_token_id is 256 for the student and 0 for the teacher"):
        shared_vocabulary(Bytes(), other)
