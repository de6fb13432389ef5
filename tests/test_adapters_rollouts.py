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

from tempering.data.text import TextExample, collate
from tempering.integrations.huggingface import DistillMixin
from tempering.methods import Divergence, Supervised  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts import OnPolicy, Sampling, SequenceLevel, Speculative
from tempering.rows import total
from tempering.tasks import LanguageModeling
from tempering.utils.state import random_state, set_random_state
from tests.cases import each
from tests.lazy_modules import LazyModule, needs
from tests.trainers import LR, PAD, V, models, texts

pytestmark = [needs("transformers"), needs("accelerate")]
hf = LazyModule("transformers")
OWN: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 5, "pad": PAD, "vocabulary": V}
GREEDY = Sampling(temperature=0.0)


def trainer(path: Path, student: nn.Module, teacher: nn.Module, rollouts: Any, **options: Any) -> Any:
    """A Trainer on six texts that keeps the batches of every step and the weights that they were generated with."""

    class KDTrainer(DistillMixin, hf.Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            weights = copy.deepcopy(self.accelerator.unwrap_model(model).state_dict())
            assert model.training, "generated in eval mode, and trained in training mode"
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
