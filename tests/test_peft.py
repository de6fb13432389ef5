"""Students of peft: adapters alone are trained, by the engine, by the Trainer and through a frozen head; and TRL's."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tempering as kd
from tempering.data.text import collate
from tempering.data.tokens import Tokens
from tempering.integrations.huggingface import DistillMixin, Labeled
from tempering.kernels import linear_loss
from tempering.methods import DTKD, Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rows import Rows, total
from tempering.tasks import LanguageModeling
from tests.lazy_modules import LazyModule, needs
from tests.test_generation import PAD, gpt2, llama, loss_of, texts

peft = LazyModule("peft")
# peft asks transformers by an old name
pytestmark = [
    needs("peft", "needs peft: pip install 'tempering[peft]'"),
    needs("transformers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
ADAM = partial(torch.optim.Adam, lr=3e-2)


def student(family: Any = gpt2, *, targets: tuple[str, ...] = (), seed: int = 0) -> Any:
    """A model with small adapters that already do something."""
    names = list(targets or (("c_attn",) if family is gpt2 else ("q_proj",)))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=family is gpt2
    )
    made = peft.get_peft_model(family(8, seed), config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return made


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("family", [gpt2, llama])
def test_padding_on_either_side_changes_nothing(family: Any) -> None:
    """Positions reach the model behind the adapters, whose own forward does not name them."""
    made, examples = student(family), texts()
    teacher, method = family(12, 1), Divergence(objective="jsd", hard=0.5)
    want = loss_of(made, teacher, [collate(examples, pad=PAD)], method)
    got = loss_of(made, teacher, [collate(examples, pad=PAD, side="left")], method)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert 0 < len(want[1]) < sum(1 for _ in made.parameters()), "the adapters alone have a gradient"


def test_a_run_trains_the_adapters_is_killed_and_goes_on(tmp_path: Path) -> None:
    data, task, teacher = Tokens(texts(), batch_size=2, pad=PAD), LanguageModeling(), gpt2(12, 1)
    how: dict[str, Any] = {
        "method": DTKD(),
        "task": task,
        "optimizer": ADAM,
        "epochs": 4,
        "quiet": True,
        "skip_checks": ["above chance"],
    }
    straight = student()
    before, first = frozen(straight), copy.deepcopy(straight.state_dict())
    kd.distill(straight, teacher, data, out=tmp_path / "straight", **how)
    assert all(torch.equal(p, before[n]) for n, p in straight.named_parameters() if n in before)
    moved = [n for n, p in straight.named_parameters() if not torch.equal(p, first[n])]
    assert moved and all("lora_" in name for name in moved)

    class Killed(Exception):
        pass

    def kill(step: int, loss: Tensor) -> None:
        if step == 7:
            raise Killed

    twice = student()
    with pytest.raises(Killed):
        kd.distill(twice, teacher, data, out=tmp_path / "twice", on_step=kill, **how)
    twice = student()
    kd.distill(twice, teacher, data, out=tmp_path / "twice", **how)
    for (name, a), b in zip(straight.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b), name
    saved = load_file(tmp_path / "twice" / "student.safetensors")
    again = student(seed=3)
    again.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), twice.state_dict().values(), strict=True))
    twice.save_pretrained(tmp_path / "adapter")
    whole = peft.PeftModel.from_pretrained(gpt2(8, 0), tmp_path / "adapter").double()
    batch = collate(texts(), pad=PAD)
    torch.testing.assert_close(whole(**batch).logits, twice(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_from_hidden_states() -> None:
    """The loss from hidden states is that of the logits, and no room is made for the head's slope."""
    made, teacher = student(llama), llama(12, 1)
    batch = {"input_ids": texts_ids()}
    head, taught = made.get_output_embeddings(), teacher.lm_head.weight.detach()
    with torch.no_grad():
        ht = teacher.model(**batch).last_hidden_state.flatten(0, 1)
    target = batch["input_ids"].roll(-1, 1).flatten()
    slopes = []
    for fused in (True, False):
        made.zero_grad()
        hs = made.get_base_model().model(**batch).last_hidden_state.flatten(0, 1)
        if fused:
            loss = linear_loss(DTKD(), hs, head, ht, taught, target=target, memory=4096).loss
        else:
            rows = Rows(head(hs), ht @ taught.T, target)
            loss = total(DTKD()(rows), rows)
        loss.backward()
        slopes.append([loss.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
        assert head.weight.grad is None
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-11)
    assert len(slopes[0]) == 3


def texts_ids() -> Tensor:
    return torch.randint(250, (3, 9), generator=torch.Generator().manual_seed(0))


def test_a_head_with_an_adapter_is_refused_with_what_to_do() -> None:
    made = student(llama, targets=("lm_head",))
    head = made.get_output_embeddings()
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"an nn.Linear or its weight \(C, H\); got .*Linear"):
        linear_loss(DTKD(), x, head, x, torch.randn(257, 8, dtype=torch.float64))


def sentences(n: int = 24) -> list[dict[str, list[int]]]:
    """Of uneven length, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + i % 6 for i in range(n)]
    return [{"input_ids": torch.randint(250, (k,), generator=generator).tolist()} for k in lengths]


def settings(kind: Any, path: Path, **more: Any) -> Any:
    own = {"max_steps": 6, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    own |= {"save_strategy": "no", "dataloader_pin_memory": False, "logging_strategy": "no", "bf16": False}
    own |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "remove_unused_columns": False}
    return kind(str(path), **own | more)


def test_the_trainer_of_transformers_trains_and_saves_the_adapters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class KDTrainer(DistillMixin, transformers.Trainer):
        pass

    made, task = student().float(), Labeled(shift=True)
    before = frozen(made)
    args = settings(transformers.TrainingArguments, tmp_path, save_strategy="steps", save_steps=6)
    data = [{"input_ids": x, "labels": x} for x in texts_ids().repeat(4, 1)]
    own = {"teacher": gpt2(12, 1).float(), "method": DTKD(), "task": task, "selfcheck": False}  # it knows nothing
    trainer = KDTrainer(made, args, train_dataset=data, **own)
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters() if n in before)
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own default
def test_the_trainer_of_trl(tmp_path: Path) -> None:
    """SFTTrainer with an adapter: its data and collator, our loss; the loss of a step is that of the whole step."""
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'tempering[trl]'")
    datasets = pytest.importorskip("datasets")

    class KDTrainer(DistillMixin, trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            loss = super().training_step(model, inputs, *rest)
            losses.setdefault(self.state.global_step, []).append(float(loss))
            return loss

    teacher, data, found = gpt2(12, 1).float(), datasets.Dataset.from_list(sentences()), []
    for batch, accumulate in ((8, 1), (2, 4)):
        losses: dict[int, list[float]] = {}
        made = student().float()
        before, start = frozen(made), copy.deepcopy(made.state_dict())
        own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "eos_token": None}
        args = settings(trl.SFTConfig, tmp_path, gradient_checkpointing=False, optim="sgd", **own)
        trainer = KDTrainer(
            made,
            args,
            train_dataset=data,
            processing_class=tokenizer(),
            teacher=teacher,
            method=DTKD(),
            task=Labeled(shift=True),
            selfcheck=False,
        )
        trainer.train()
        assert all(torch.equal(p, before[n]) for n, p in made.named_parameters() if n in before)
        assert any(not torch.equal(p, start[n]) for n, p in made.named_parameters())
        found.append([sum(parts) for parts in losses.values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert len(found[0]) == 6


def tokenizer() -> Any:
    """Of single bytes, for its padding; the data come as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({**{f"<{i}>": i for i in range(256)}, "<end>": PAD}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<end>", eos_token="<end>")
