"""TRL's SFTTrainer with our loss: its data, its metrics, and what it would ignore."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tempering.integrations.huggingface import DistillMixin
from tempering.methods import KD
from tempering.rollouts import OnPolicy
from tempering.tasks import LanguageModeling
from tests.cases import each
from tests.lazy_modules import LazyModule, needs
from tests.test_adapters_language import EXPERTS, tiny

pytestmark = [needs("trl", "needs trl: pip install 'tempering[trl]'"), needs("datasets")]
# TRL's own defaults
pytestmark.append(pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"))
pytestmark.append(pytest.mark.filterwarnings("ignore:.return_outputs=True.:FutureWarning"))
peft_tests = LazyModule("tests.test_peft")  # its tokenizer
trl, datasets = LazyModule("trl"), LazyModule("datasets")
V = 257


def sft(
    path: Path, student: nn.Module, teacher: nn.Module, *, accumulate: int = 1, rollouts: Any = None, **options: Any
) -> Any:
    """A trainer of one step on eight texts, and the class that it derives from."""

    class KDTrainer(DistillMixin, trl.SFTTrainer):
        pass

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (8,), generator=generator).tolist()
    data = [{"input_ids": torch.randint(250, (k,), generator=generator).tolist()} for k in lengths]
    own = {"max_steps": 1, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False}
    own |= {"save_strategy": "no", "dataloader_pin_memory": False, "logging_steps": 1, "eos_token": None}
    own |= {"optim": "sgd", "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    own |= {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    args = trl.SFTConfig(str(path), **own | {"per_device_eval_batch_size": 3, "max_grad_norm": 0.0} | options)
    sets: dict[str, Any] = {name: datasets.Dataset.from_list(data) for name in ("train_dataset", "eval_dataset")}
    tokenizer = peft_tests.tokenizer()
    plain = trl.SFTTrainer(copy.deepcopy(student), copy.deepcopy(args), processing_class=tokenizer, **sets)
    task = LanguageModeling()
    method = KD(soft=1.0, hard=1.0, temperature=2.0)
    own = {"teacher": teacher, "method": method, "task": task, "selfcheck": False, "rollouts": rollouts}
    return plain, KDTrainer(student, args, processing_class=tokenizer, **sets, **own)


@each("accumulate, experts", [(1, False), (2, False), (1, True)])
def test_metrics_of_trl_stay_beside_terms_and_temperatures(tmp_path: Path, accumulate: int, experts: bool) -> None:
    name = "MixtralForCausalLM" if experts else "LlamaForCausalLM"
    options = EXPERTS if experts else {}
    student = tiny(name, vocab_size=V, **options).float()
    teacher = tiny("LlamaForCausalLM", vocab_size=V, seed=1).float()
    plain, ours = sft(tmp_path, student, teacher, accumulate=accumulate)
    for trainer in (plain, ours):
        trainer.train()
    theirs, log = plain.state.log_history[0], ours.state.log_history[0]
    names = {"entropy", "mean_token_accuracy", "num_tokens"} | ({"aux_loss"} if experts else set())
    assert names <= theirs.keys()
    for metric in names:
        assert log[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric
    assert log.keys() >= {"soft", "hard", "T_teacher", "T_student", "agreement"}
    assert log["T_teacher"] == pytest.approx(2.0)
    parts = log["soft"] + log["hard"] + (log["auxiliary"] if experts else 0.0)
    assert log["loss"] == pytest.approx(parts, rel=1e-6)
    if experts:
        assert log["auxiliary"] == pytest.approx(0.001 * log["aux_loss"], rel=1e-5)
    scores = ours.evaluate()
    assert scores.keys() >= {"eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_agreement"}


def test_packed_texts_of_trl_have_the_loss_of_padded_ones(tmp_path: Path) -> None:
    def log(**options: Any) -> dict[str, float]:
        student, teacher = (tiny("LlamaForCausalLM", vocab_size=V, seed=i).float() for i in (0, 1))
        trainer = sft(tmp_path, student, teacher, **options)[1]
        trainer.train()
        return trainer.state.log_history[0]

    want, got = log(), log(padding_free=True, max_length=None)
    for name in ("loss", "soft", "hard", "agreement", "entropy"):
        assert got[name] == pytest.approx(want[name], rel=1e-5), name


def test_another_loss_type_is_refused(tmp_path: Path) -> None:
    student, teacher = (tiny("LlamaForCausalLM", vocab_size=V, seed=i).float() for i in (0, 1))
    with pytest.raises(ValueError, match=r"loss_type='dft' would have no effect. Leave it out"):
        sft(tmp_path, student, teacher, loss_type="dft")
    sft(tmp_path, student, teacher, loss_type="nll")


def test_texts_are_generated_in_trl(tmp_path: Path) -> None:
    """Their tokens have no labels: the soft term is the whole loss, and TRL's scores of labels are not logged."""
    student, teacher = (tiny("LlamaForCausalLM", vocab_size=V, seed=i).float() for i in (0, 1))
    own = partial(OnPolicy, generated_fraction=1.0, max_new_tokens=4, prompt_length=2, vocabulary=V)
    trainer = sft(tmp_path, student, teacher, accumulate=2, rollouts=own)[1]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["soft"], rel=1e-6) and log["loss"] > 0 and log["hard"] == 0
    assert log["rollout_length"] == 4 and log["num_tokens"] == 8 * (2 + 4)
    assert not {"entropy", "mean_token_accuracy"} & log.keys()
    with pytest.raises(ValueError, match="rollouts need padded texts: set packing=False and padding_free=False"):
        sft(tmp_path, student, teacher, rollouts=own, padding_free=True, max_length=None)
