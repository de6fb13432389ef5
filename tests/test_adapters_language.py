"""Language models in the adapters: what they refuse, auxiliary losses, logs, and losses that store no logits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tempering as kd
from tempering.data.text import pack
from tempering.integrations.huggingface import DistillMixin, Labeled, Unpacked
from tempering.methods import CKD, DTKD, KD, FitNet, OnBlocks, Sum, Supervised
from tempering.rows import total
from tempering.tasks import LanguageModeling, Seq2Seq
from tests.cases import each
from tests.lazy_modules import needs
from tests.trainers import TRAINERS, Data, V, agree, expected, hf, joined, language, models, padded, texts

pytestmark = [needs("transformers"), needs("accelerate")]


def tiny(name: str, **options: Any) -> nn.Module:
    """A model of transformers of this name, in float64."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 32,
    }
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name.startswith(("T5", "Switch")):
        sizes = {
            "vocab_size": V,
            "d_model": 8,
            "d_ff": 16,
            "d_kv": 4,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": 0,
        }
        sizes |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    if name.startswith("GPT2"):
        sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(options.pop("seed", 0))
    model = getattr(transformers, name)
    return model(model.config_class(**sizes | options)).double()


def adapters() -> dict[str, Any]:
    """Each adapter as a function of the models, a method and a task."""
    from tempering.integrations.lightning import DistillModule
    from tests.trainers import transformers_trainer

    data = Data([], [], padded, 1)
    return {
        "transformers": lambda s, t, task: transformers_trainer(s, t, data, task),
        "lightning": lambda s, t, task: DistillModule(s, t, method=KD(), task=task),
        "engine": lambda s, t, task: kd.distill(s, t, [{}], method=KD(), task=task, steps=1, quiet=True),
    }


@needs("lightning")
@each(
    "name, task, text",
    [
        ("GPT2LMHeadModel", lambda: Labeled(), "GPT2LMHeadModel is a causal language model: .* tasks.LanguageModeling"),
        ("LlamaForCausalLM", lambda: Labeled(), "LlamaForCausalLM is a causal language model"),
        (
            "T5ForConditionalGeneration",
            lambda: Labeled(shift=True),
            r"is an encoder-decoder. Its task is tasks.Seq2Seq",
        ),
        ("LlamaForCausalLM", lambda: Seq2Seq(), "is not an encoder-decoder"),
        ("T5ForConditionalGeneration", lambda: Labeled(), "is an encoder-decoder, which needs .*tasks.Seq2Seq"),
        ("BertForMaskedLM", lambda: LanguageModeling(), "is a masked language model, .*Labeled"),
    ],
)
def test_tasks_of_another_kind_of_model_are_refused_by_name(name: str, task: Any, text: str) -> None:
    for adapter, make in adapters().items():
        student, teacher = tiny(name), tiny(name, seed=1)
        with pytest.raises(TypeError, match=text):
            make(student, teacher, task())
        assert all(p.requires_grad for p in student.parameters()), adapter
    with pytest.raises(TypeError, match=text):
        task().prepare_model(Unpacked(tiny(name)))


@each(
    "name",
    ["GPT2ForTokenClassification", "GPT2ForSequenceClassification", "BertForMaskedLM", "T5ForConditionalGeneration"],
)
def test_models_whose_labels_are_not_shifted_are_taken(name: str) -> None:
    Labeled(keep_labels=name.startswith("T5")).prepare_model(tiny(name))


def test_labeled_with_a_shift_is_the_language_task() -> None:
    assert type(Labeled(shift=True)) is LanguageModeling and type(Labeled()) is Labeled
    assert Labeled(shift=True, features={"a": ("b", "c")}).features == {"a": ("b", "c")}
    with pytest.raises(ValueError, match="Set one of them"):
        Labeled(shift=True, keep_labels=True)
    with pytest.raises(TypeError, match=r"derive from tasks\.LanguageModeling"):
        type("Mine", (Labeled,), {})(shift=True)


@each("masked", [True, False])
def test_packed_texts_do_not_attend_across_each_other(masked: bool) -> None:
    """Padding at the end of a packed row included; a mask that is all ones would let them."""
    data = pack(texts(6, 0), 20, pad=V - 1)
    batch = joined(data, masked=masked)
    model, task = models("llama")[0].eval(), LanguageModeling()
    task.prepare_model(model)
    (rows,) = task.rows(model(task.inputs(batch)[0]), None, batch)
    alone = [model(input_ids=torch.tensor([x.ids])).logits[0, :-1][torch.tensor(x.learn[1:])] for x in texts(6, 0)]
    got, want = (z.detach().sum(-1).sort().values for z in (rows.student, torch.cat(alone)))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_embeddings_in_place_of_tokens_are_learned_by_their_labels() -> None:
    model, task = models("llama")[0].eval(), LanguageModeling()
    task.prepare_model(model)
    batch = padded(texts(3, 0))
    inputs = {name: value for name, value in batch.items() if name != "input_ids"}
    inputs["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])  # pyright: ignore[reportCallIssue]
    (a,), (b,) = (task.rows(model(task.inputs(x)[0]), None, x) for x in (batch, inputs))
    torch.testing.assert_close(a.student, b.student)
    assert task.row_weights(batch) == task.row_weights(inputs)


# mixtures of experts

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
EXPERTS |= {"output_router_logits": True}


@needs("lightning")
@each(
    "name, options, coefficient",
    [
        ("MixtralForCausalLM", {}, 50.0),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 8, "head_dim": 4, "decoder_sparse_step": 1}, 5.0),
        ("MixtralForCausalLM", {}, 0.0),
    ],
)
def test_auxiliary_losses_of_experts_are_added(name: str, options: dict[str, Any], coefficient: float) -> None:
    """As the model itself adds them; of micro-batches, their mean weighted by rows."""

    def student() -> Any:
        return tiny(name, **EXPERTS, **options, router_aux_loss_coef=coefficient)

    for layout in ("left", "micro-batches"):
        data, plain = language(layout), student().train()
        teacher = tiny("LlamaForCausalLM", seed=1)
        parts = [data.collate(list(data.train[i : i + data.batch])) for i in range(0, 6, data.batch)]
        task, method = LanguageModeling(), KD(soft=1.0, hard=1.0, temperature=4.0)
        weights = [float(task.row_weights(part)["logits"]) for part in parts]
        for part, weight in zip(parts, weights, strict=True):
            inputs = task.inputs(part)[0]
            out = plain(**inputs)
            (rows,) = task.rows(out, teacher(**inputs).logits.detach(), part)
            loss = total(method(rows), rows) + coefficient * out.aux_loss
            (loss * weight / sum(weights)).backward()
        want = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
        for trainer, run in TRAINERS.items():
            if layout == "micro-batches" and trainer == "transformers":
                continue  # its micro-batches hold other texts, whose auxiliary losses differ
            got = run(student(), copy.deepcopy(teacher), data, LanguageModeling())
            torch.testing.assert_close(torch.tensor(got.gradient), want.float(), rtol=1e-5, atol=1e-6, msg=trainer)


def test_experts_whose_auxiliary_loss_stays_inside_the_model_are_refused() -> None:
    sparse = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model = tiny("SwitchTransformersForConditionalGeneration", **sparse)
    batch = {"input_ids": torch.randint(V, (2, 5)), "labels": torch.randint(V, (2, 4)), "output_router_logits": True}
    options: dict[str, Any] = {"method": KD(), "task": Seq2Seq(), "steps": 1, "quiet": True, "selfcheck": False}
    with pytest.raises(ValueError, match=r"Switch\w+ returns .*router_logits, and .*output_router_logits = False"):
        kd.distill(model, copy.deepcopy(model), [batch], **options)
    del batch["output_router_logits"]
    kd.distill(model, copy.deepcopy(model), [batch], **options)


# kernels


@needs("lightning")
@each(
    "trainer, layout, family, more, own",
    [
        ("transformers", "micro-batches", "llama", 8, {"linear": True}),
        ("transformers", "left", "gpt2", 0, {"linear": True}),
        ("transformers", "left", "llama", 8, {"chunks": True}),
        ("lightning", "packed", "llama", 8, {"linear": True}),
        ("lightning", "micro-batches", "gpt2", 0, {"linear": True}),
        ("lightning", "micro-batches", "llama", 8, {"chunks": True}),
    ],
)
def test_kernels_compute_the_loss_in_the_adapters(trainer: str, layout: str, family: str, more: int, own: Any) -> None:
    """From hidden states, or in chunks of rows: the loss and the gradient of the head included."""
    options: dict[str, Any] = own if trainer == "transformers" else {"own": own}
    got = TRAINERS[trainer](*models(family, more=more), language(layout), LanguageModeling(), **options)
    agree(got, expected(*models(family, more=more), texts(6, 0), texts(9, 1)))


def test_losses_from_hidden_states_follow_scale_and_cap_and_refuse_other_heads() -> None:
    from tempering.integrations.linear import HiddenForward

    batch, task, student = padded(texts(4, 0)), LanguageModeling(), nn.Identity()
    for name, options in {"CohereForCausalLM": {}, "Gemma2ForCausalLM": {"head_dim": 4}}.items():
        student, teacher = (tiny(name, seed=i, **options).float() for i in (0, 1))
        for model in (student, teacher):
            task.prepare_model(model)
        plain = task.rows(student(task.inputs(batch)[0]), teacher(task.inputs(batch)[0]).logits.detach(), batch)
        want = KD().losses(plain)[0].loss
        out, (got,) = HiddenForward(KD(), task, student).losses(batch, student, kd.teachers.Live(teacher), 1.0, {})
        torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-6)
        assert out.student.logits.shape[1] == 1, "no logits but the first"
        assert student(task.inputs(batch)[0]).logits.shape[1] > 1, "no hook is left"

    class Shifted(type(student)):  # pyright: ignore
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out["logits"] = out["logits"] * 3.0
            return out

    student.__class__ = Shifted
    with pytest.raises(TypeError, match="are not those of its output embeddings alone"):
        HiddenForward(KD(), task, student).losses(batch, student, None, 1.0, {})
    with pytest.raises(TypeError, match=r"the task is Labeled. Use tasks\.LanguageModeling"):
        HiddenForward(KD(), Labeled(), student)


# a sum that counts the labels twice


@each(
    "methods, text",
    [
        ((KD(), FitNet()), r"KD\(hard=0.1\) and FitNet\(hard=1\)"),
        ((Supervised(), OnBlocks(KD(), blocks=["logits"])), r"Supervised\(hard=1\) and KD\(hard=0.1\)"),
        ((KD(hard=0.0), FitNet()), None),
        ((OnBlocks(KD(), blocks=["a"]), OnBlocks(DTKD(), blocks=["b"])), None),
        ((CKD(), Supervised()), None),
    ],
)
def test_a_sum_says_which_methods_count_the_cross_entropy_again(methods: Any, text: str | None) -> None:
    if text is None:
        Sum(*methods)
    else:
        with pytest.warns(UserWarning, match=text):
            Sum(*methods)


def test_loggers_of_the_trainer_get_terms_temperatures_and_agreement(tmp_path: Path) -> None:
    """As TensorBoard and others: means over the rows since the last log, which add up to the loss."""

    class KDTrainer(DistillMixin, hf.Trainer):
        pass

    kept: list[dict[str, float]] = []

    class Logger(hf.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            kept.append(dict(logs))

    data, (student, teacher) = language("left"), models("gpt2")
    own: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    own |= {"max_steps": 6, "logging_steps": 3, "remove_unused_columns": False, "dataloader_pin_memory": False}
    args = hf.TrainingArguments(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, **own)
    own = {"method": Sum(KD(hard=0.0, temperature=4.0), DTKD()), "task": Labeled(shift=True), "selfcheck": False}
    own |= {"teacher": teacher, "train_dataset": data.train, "data_collator": data.collate}
    KDTrainer(student, args, callbacks=[Logger()], **own).train()
    assert len(kept) == 3, "two logs of three steps each, and the summary"
    for log in kept[:2]:
        terms = {name for name in log if name.startswith(("kd.", "dtkd."))}
        assert terms >= {"kd.soft", "dtkd.hard"} and {"T_teacher", "T_student"} <= log.keys()
        assert sum(log[name] for name in terms) == pytest.approx(log["loss"], rel=1e-5)
        assert 0.0 <= log["agreement"] <= 1.0


def test_a_missing_lightning_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tempering.integrations.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "tempering\[lightning\]"'):
        import tempering.integrations.lightning  # noqa: F401
