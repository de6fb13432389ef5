"""Texts that the student generates, in the Trainer of transformers: which, with which weights, and what they change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.data.text import collate
from tempering.integrations.huggingface import DistillMixin
from tempering.methods import Divergence, MiniLLM, PolicyGradient, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts import OnPolicy, RolloutServer, Sampling, SequenceLevel, Speculative, TeacherMixed
from tempering.rows import total
from tempering.tasks import LanguageModeling
from tempering.teachers import SelfTeacher, WithReference
from tests.cases import each
from tests.lazy_modules import LazyModule, needs
from tests.trainers import LR, PAD, V, models, texts

pytestmark = [needs("transformers"), needs("accelerate")]
pytestmark.append(pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"))
hf = LazyModule("transformers")
OWN: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 5, "pad": PAD, "vocabulary": V}
GREEDY = Sampling(temperature=0.0)


def trainer(path: Path, student: nn.Module, teacher: nn.Module, rollouts: Any, **options: Any) -> Any:
    """A Trainer on six texts that keeps the batches of every step and the weights that they were generated with."""

    class KDTrainer(DistillMixin, hf.Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            weights = copy.deepcopy(self.accelerator.unwrap_model(model).state_dict())
            self.seen = [*getattr(self, "seen", []), (self.state.global_step, dict(inputs), weights)]
            return super().training_step(model, inputs, *rest)

    own: dict[str, Any] = {"method": Divergence(objective="reverse_kl"), "task": LanguageModeling(), "selfcheck": False}
    own |= {name: options.pop(name) for name in ("method", "task", "linear", "eval_dataset") if name in options}
    defaults = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": LR, "optim": "sgd"}
    defaults |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True}
    args = hf.TrainingArguments(str(path), **defaults | {"dataloader_pin_memory": False} | options)
    data: dict[str, Any] = {"train_dataset": texts(6, 0), "data_collator": partial(collate, pad=PAD)}
    return KDTrainer(student, args, teacher=teacher, rollouts=rollouts, **data, **own)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "on-policy": lambda teacher: partial(OnPolicy, **OWN),
    "speculative": lambda teacher: lambda s, b: Speculative(s, teacher, b, top_k=3, **OWN),
    "reused": lambda teacher: lambda s, b: Speculative(s, teacher, b, top_k=3, reuse=True, **OWN),
    "sequence-level": lambda teacher: lambda s, b: SequenceLevel(teacher, b, **OWN),
}


def by_hand(student: nn.Module, teacher: nn.Module, method: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """The mean over the learned tokens of all batches."""
    rows = []
    task = LanguageModeling()
    for model in (student, teacher):
        task.prepare_model(model)
    for batch in batches:
        inputs = task.inputs({n: x for n, x in batch.items() if n != "teacher_outputs"})[0]
        with torch.no_grad():
            taught = teacher(inputs)
        rows += task.rows(student(inputs), taught, {n: x for n, x in batch.items() if n != "teacher_outputs"})
    sums = [total(method(r), r, normalizer=1.0) for r in rows]
    return torch.stack(sums).sum() / sum(len(r) for r in rows)


@each("kind, accumulate", [(kind, 2) for kind in KINDS] + [("on-policy", 1)])
def test_a_step_is_the_mean_over_the_generated_tokens_of_all_micro_batches(
    tmp_path: Path, kind: str, accumulate: int
) -> None:
    student, teacher = models("llama")
    method = Supervised() if kind == "sequence-level" else Divergence(objective="reverse_kl")
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "method": method}
    made = trainer(tmp_path, student, teacher, KINDS[kind](teacher), **options)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    made.train()
    assert len(made.seen) == 2 * accumulate and not any(calls)
    for step in range(2):
        parts = [(batch, weights) for number, batch, weights in made.seen if number == step]
        plain, taught = models("llama")
        plain.load_state_dict(parts[0][1])
        if kind == "on-policy":  # with the weights of this step, by its own number
            again = OnPolicy(plain, [], **OWN)
            again.epoch = 0 if accumulate == 1 else step
            given = [x for x in made.seen if x[0] == step]
            for i, (_, batch, _) in enumerate(given):
                prompts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                want = again.mixed({**prompts, "learn": batch["learn"]}, step * accumulate + i)
                assert torch.equal(want["input_ids"], batch["input_ids"])
        loss = by_hand(plain, taught, method, [batch for batch, _ in parts])
        assert made.state.log_history[step]["loss"] == pytest.approx(float(loss.detach()), abs=2e-4)
        plain.zero_grad()
        loss.backward()
        after = made.seen[accumulate][2] if step == 0 else made.model.state_dict()
        for name, p in plain.named_parameters():
            want = p.detach() - LR * (0.0 if p.grad is None else p.grad)
            torch.testing.assert_close(after[name], want, rtol=1e-6, atol=1e-7)
    stats = made.state.log_history[0]
    assert stats["rollout_length"] > 0 and (stats["rollout_acceptance"] < 1) == (kind in ("speculative", "reused"))
    if kind == "reused":
        batch = made.seen[0][1]
        assert len(calls) < 2 * accumulate * 6 and "teacher_outputs" in batch


def test_a_run_that_stopped_in_mid_epoch_goes_on_with_the_same_texts(tmp_path: Path) -> None:
    """To the bit, whatever the global random state; the weights that write are those of the checkpoint."""
    options: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "num_train_epochs": 2}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):  # step 4 of 3 a epoch
        student, teacher = models("llama")
        made = trainer(tmp_path, student, teacher, KINDS["on-policy"](teacher), **options)
        made.train(resume_from_checkpoint=checkpoint)
        runs.append(made)
    whole, resumed = runs
    assert [step for step, *_ in resumed.seen] == [4, 4] and len(whole.seen) == 10
    for (_, want, _), (_, got, _) in zip(whole.seen[8:], resumed.seen, strict=True):
        assert all(torch.equal(x, got[name]) for name, x in want.items())
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    texts_of = [batch["input_ids"].tolist() for _, batch, _ in whole.seen]
    assert len({str(ids) for ids in texts_of}) > 6, "every step writes its own"


@each("how", ["checkpointing", "bf16", "hidden states"])
def test_options_of_the_trainer_change_no_text(tmp_path: Path, how: str) -> None:
    """With gradient checkpointing the cache is used to write all the same, and checkpointing is on in training."""
    options: dict[str, dict[str, Any]] = {"checkpointing": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}
    seen = []
    for more in ({}, options.get(how, {"linear": True})):
        student, teacher = (model.float() for model in models("llama"))
        if how == "checkpointing":
            student.config.use_cache = False  # as TRL sets it
        lengths: list[tuple[bool, int]] = []
        student.model.layers[0].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs, to=lengths: to.append((m.training, kwargs["hidden_states"].shape[1])),
            with_kwargs=True,
        )
        made = trainer(tmp_path, student, teacher, partial(OnPolicy, **OWN, sampling=GREEDY), max_steps=1, **more)
        lengths.clear()  # of the trial
        made.train()
        flags = [m.gradient_checkpointing for m in student.modules() if hasattr(m, "gradient_checkpointing")]
        assert any(flags) == bool(more.get("gradient_checkpointing"))
        assert [n for training, n in lengths if not training][1:] == [1] * 5, "the cache has the other tokens"
        assert any(training for training, _ in lengths)
        seen.append((made.seen[0][1]["input_ids"], made.state.log_history[0]["loss"]))
    assert torch.equal(seen[0][0], seen[1][0]) or how == "bf16"
    assert seen[1][1] == pytest.approx(seen[0][1], rel=2e-2 if how == "bf16" else 1e-4)


@needs("peft", "needs peft: pip install 'tempering[peft]'")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_model_under_the_adapters_teaches_without_a_copy(tmp_path: Path) -> None:
    """The loss of a teacher that is a copy of it, on texts written with the adapters; only these are trained."""
    peft_tests = LazyModule("tests.test_peft")
    seen = []
    for base in (True, False):
        student = peft_tests.student(LazyModule("tests.test_generation").llama)
        copied = copy.deepcopy(student).unload()
        teacher = SelfTeacher(adapters=False) if base else copied
        made = trainer(tmp_path, student, teacher, KINDS["on-policy"](None), gradient_checkpointing=True, max_steps=3)
        before = {name: p.requires_grad for name, p in made.model.named_parameters()}
        made.train()
        assert {name: p.requires_grad for name, p in made.model.named_parameters()} == before
        assert not base or not made.teacher.models
        seen.append(made)
    for (_, a, _), (_, b, _) in zip(seen[0].seen, seen[1].seen, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    for (name, a), b in zip(seen[0].model.named_parameters(), seen[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    moved = {n for n, p in seen[0].model.named_parameters() if not torch.equal(p, seen[0].seen[0][2][n])}
    assert moved and all("lora_" in name for name in moved)
    with pytest.raises(TypeError, match="needs a PEFT student, whose adapters it turns off; Unpacked has none"):
        trainer(tmp_path, models("llama")[0], SelfTeacher(adapters=False), None)


def test_evaluation_is_on_the_data_and_leaves_the_texts_alone(tmp_path: Path) -> None:
    seen = []
    for more in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": texts(4, 1)}):
        student, teacher = models("llama")
        made = trainer(tmp_path, student, teacher, KINDS["on-policy"](teacher), **more)
        made.train()
        seen.append([batch["input_ids"] for _, batch, _ in made.seen])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    plain, taught = models("llama")
    plain.load_state_dict(made.model.state_dict())
    want = by_hand(plain, taught, made.method, [collate(texts(4, 1), pad=PAD)])
    logs = [line for line in made.state.log_history if "eval_loss" in line]
    assert logs[-1]["eval_loss"] == pytest.approx(float(want.detach()), rel=1e-6)


def test_every_process_has_its_own_seed(tmp_path: Path) -> None:
    student, teacher = models("llama")
    made = trainer(tmp_path, student, teacher, KINDS["on-policy"](teacher))
    batch, written = collate(texts(6, 0), pad=PAD), []
    for made._rollouts.rank in (0, 1):
        written.append(made._rollouts.mixed(batch, 0)["input_ids"].tolist())
    assert written[0] != written[1]


def test_what_rollouts_refuse(tmp_path: Path) -> None:
    student, teacher = models("llama")
    loader = OnPolicy(student, [], **OWN)
    for more in ({"task": loader}, {"train_dataset": loader}, {"rollouts": loader}):
        own: dict[str, Any] = {"rollouts": None, "task": LanguageModeling(), **more}
        with pytest.raises(TypeError, match=r"rollouts=partial\(OnPolicy, max_new_tokens=64, eos=2\), with train_data"):
            from_mixin(tmp_path, student, teacher, **own)
    both = Speculative(student, teacher, [])
    with pytest.raises(TypeError, match=r"lambda student, batches: Speculative\(student, teacher, batches\)"):
        from_mixin(tmp_path, student, teacher, rollouts=both)
    with pytest.raises(TypeError, match="rollouts must return an OnPolicy, Speculative or SequenceLevel; got list"):
        trainer(tmp_path, student, teacher, lambda *_: [])
    made = trainer(tmp_path, student, teacher, None)
    for name in ("packing", "padding_free"):
        setattr(made.args, name, True)
        with pytest.raises(ValueError, match="rollouts need padded texts: set packing=False"):
            made._bind_rollouts(partial(OnPolicy, **OWN), student)
        setattr(made.args, name, False)
    made.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="rollouts need the whole weights on every process, and FSDP shards them"):
        made._bind_rollouts(partial(OnPolicy, **OWN), student)


def from_mixin(path: Path, student: nn.Module, teacher: nn.Module, **own: Any) -> Any:
    class KDTrainer(DistillMixin, hf.Trainer):
        pass

    args = hf.TrainingArguments(str(path), report_to=[], use_cpu=True)
    return KDTrainer(student, args, teacher=teacher, method=Divergence(), **{"train_dataset": texts(6, 0), **own})


@each("refresh_every", [1, 2])
def test_a_served_student_writes_in_the_trainer(
    tmp_path: Path, refresh_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights of each step, or of every second; greedy texts are those that the trainer writes itself."""
    servers = LazyModule("tests.rollout_servers")
    monkeypatch.setenv("no_proxy", "*")
    student, teacher = (model.float() for model in models("llama"))
    with servers.serving(student) as server:
        engine = RolloutServer(server.url, "tiny", weights=tmp_path / "served", refresh_every=refresh_every)
        made = trainer(
            tmp_path, student, teacher, partial(OnPolicy, **OWN, sampling=GREEDY, engine=engine), max_steps=4
        )
        made.train()
    assert server.loads == 4 // refresh_every
    for step, batch, _ in made.seen:
        plain, _ = (model.float() for model in models("llama"))
        plain.load_state_dict(made.seen[step - step % refresh_every][2])
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "learn")}
        want = OnPolicy(plain, [], **OWN, sampling=GREEDY).mixed(prompts, step)
        assert torch.equal(want["input_ids"], batch["input_ids"])
    log = made.state.log_history
    assert [line["rollout_staleness"] for line in log[:4]] == [step % refresh_every for step in range(4)]
    assert 0.0 <= log[3]["rollout_parity"] < 1e-3
    with pytest.raises(ValueError, match="this trainer reads no batches ahead, and RolloutServer would generate them"):
        ahead = RolloutServer("http://localhost:1", "tiny", weights=tmp_path, staleness=1)
        trainer(tmp_path, student, teacher, partial(OnPolicy, **OWN, engine=ahead))


def test_objectives_of_sampled_tokens_run_in_the_trainer(tmp_path: Path) -> None:
    """MiniLLM on teacher-mixed texts, and a reward with a reference: the terms are logged, the reward too."""
    for method, rollouts, names in (
        (MiniLLM(), lambda s, b: TeacherMixed(s, models("llama")[1], b, **OWN), {"soft", "future"}),
        (
            PolicyGradient(reward=1.0, reference=0.1),
            partial(OnPolicy, **OWN, num_generations=2, reward=lambda texts: [float(len(t.completion)) for t in texts]),
            {"soft", "reference", "rollout_reward"},
        ),
    ):
        student, teacher = models("llama")
        wrapped = teacher if isinstance(method, MiniLLM) else WithReference(teacher, copy.deepcopy(student))
        made = trainer(tmp_path, student, wrapped, rollouts, method=method)
        made.train()
        assert names <= made.state.log_history[0].keys()
        assert len(made.seen[0][1]["input_ids"]) == (3 if isinstance(method, MiniLLM) else 6)
