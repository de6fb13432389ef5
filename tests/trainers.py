"""One step and one evaluation of the same data by the engine, the Trainer of transformers and Lightning.

``python -m tests.trainers OUT``, started twice with the variables of torchrun, runs them on two gloo processes.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tempering import distill
from tempering.data.text import TextExample, collate, pack
from tempering.methods import KD
from tempering.rollouts import OnPolicy, Sampling
from tempering.tasks import LanguageModeling
from tempering.tasks.base import Task
from tests.lazy_modules import LazyModule

fsdp = LazyModule("torch.distributed.fsdp")
gen = LazyModule("tests.test_generation")  # its models
hf = LazyModule("transformers")
LR, PAD, V, CLASSES = 0.1, 11, 12, 4


class Data(NamedTuple):
    """Samples of a training step and of an evaluation, with how they become batches.

    ``batch`` samples make a micro-batch of the step, and ``accumulate`` of those the step; ``evaluate`` is the batch
    size of the evaluation.
    """

    train: Sequence[Any]
    test: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    batch: int
    accumulate: int = 1
    evaluate: int = 2


class Result(NamedTuple):
    """What a trainer computed: the loss of the step, its gradient, and the evaluation after the step."""

    loss: float
    gradient: list[float]
    scores: dict[str, float]


def agree(got: Result, want: Result) -> None:
    """To 1e-6, all of them; the evaluation of the engine does not compute the loss of the method."""
    names = want.scores.keys() & got.scores.keys()
    assert want.scores.keys() - names <= {"loss"}
    rows = [[x.loss, *x.gradient, *(x.scores[name] for name in sorted(names))] for x in (got, want)]
    sides = [torch.tensor(row, dtype=torch.float64) for row in rows]
    torch.testing.assert_close(*sides, rtol=1e-6, atol=1e-6)


def texts(n: int, seed: int) -> list[TextExample]:
    """Texts of 3 to 12 tokens, whose first tokens are not learned."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (n,), generator=generator).tolist()
    ids = [torch.randint(V - 1, (length,), generator=generator).tolist() for length in lengths]
    return [TextExample(tuple(x), tuple(i >= len(x) // 3 for i in range(len(x)))) for x in ids]


def padded(examples: list[TextExample], *, side: str = "right", unmasked: bool = False) -> dict[str, Tensor]:
    batch = collate(examples, pad=PAD, side=side)
    return batch | {"labels": batch["input_ids"].clone()} if unmasked else batch


def joined(rows: list[dict[str, Tensor]], *, masked: bool = False) -> dict[str, Tensor]:
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return batch | {"attention_mask": (batch["input_ids"] != PAD).long()} if masked else batch


def language(layout: str) -> Data:
    """Six texts to learn and nine to score."""
    train, test = texts(6, 0), texts(9, 1)
    if layout.startswith("packed"):
        rows, scored = (pack(part, 24, pad=PAD) for part in (train, test))
        return Data(rows, scored, partial(joined, masked=layout == "packed and masked"), len(rows), 1, 1)
    batch, accumulate, evaluate = {"one by one": (1, 6, 1), "micro-batches": (2, 3, 3)}.get(layout, (6, 1, 2))
    side = "left" if layout.startswith("left") else "right"
    return Data(train, test, partial(padded, side=side, unmasked="unmasked" in layout), batch, accumulate, evaluate)


def expected(
    student: nn.Module, teacher: nn.Module, train: list[TextExample], test: list[TextExample], *, unmasked: bool = False
) -> Result:
    """By hand: every text alone, and the mean over all learned tokens of all texts of KL and cross entropy."""

    def measure(examples: list[TextExample]) -> dict[str, Tensor]:
        kept = []
        for example in examples:
            ids = torch.tensor([example.ids])
            learn = torch.tensor(example.learn)[1:] | unmasked
            z = student(input_ids=ids).logits[0, :-1][learn]
            with torch.no_grad():
                t = teacher(input_ids=ids).logits[0, :-1, : z.shape[1]][learn]
            kept.append((z, t, ids[0, 1:][learn]))
        z, t, y = (torch.cat(x) for x in zip(*kept, strict=True))
        p = (t / 4).softmax(-1)
        soft = 16 * (p * (p.log() - (z / 4).log_softmax(-1))).sum(-1)
        hard = nn.functional.cross_entropy(z, y, reduction="none")
        top = z.argmax(-1)
        hits = {"accuracy": (top == y).double().mean(), "agreement": (top == t.argmax(-1)).double().mean()}
        return {"loss": (soft + hard).mean(), "cross_entropy": hard.mean(), "perplexity": hard.mean().exp(), **hits}

    student = copy.deepcopy(student).train()
    loss = measure(train)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    with torch.no_grad():
        for p in student.parameters():
            p -= LR * p.grad  # pyright: ignore[reportOperatorIssue]
        scores = {name: float(value) for name, value in measure(test).items()}
    return Result(float(loss.detach()), gradient.tolist(), scores)


def flat(model: nn.Module) -> Tensor:
    whole: list[Any] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def moved(before: Tensor, model: nn.Module) -> list[float]:
    return ((before - flat(model)) / LR).tolist()


def loader(data: Data, part: str) -> DataLoader:
    samples, size = (data.train, data.batch) if part == "train" else (data.test, data.evaluate)
    return DataLoader(samples, batch_size=size, collate_fn=data.collate)  # pyright: ignore[reportArgumentType]


def engine(student: nn.Module, teacher: nn.Module, data: Data, task: Task, **options: Any) -> Result:
    losses, before = list[float](), flat(student)
    defaults: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=LR), "quiet": True, "selfcheck": False}
    defaults |= {"accumulate": data.accumulate, "epochs": 1, "accelerator": "cpu", "precision": "64-true"}
    run = distill(
        student,
        teacher,
        list(loader(data, "train")),
        method=KD(soft=1.0, hard=1.0, temperature=4.0),
        task=task,
        test=list(loader(data, "test")),
        on_step=lambda step, loss: losses.append(float(loss)),
        **defaults | options,
    )
    scores = dict(run.last["test"])
    return Result(losses[0], moved(before, student), scores | {"cross_entropy": scores.pop("loss")})


def transformers_trainer(student: nn.Module, teacher: nn.Module, data: Data, task: Task | None, **own: Any) -> Result:
    from tempering.integrations.huggingface import DistillMixin

    class KDTrainer(DistillMixin, hf.Trainer):
        pass

    args = hf.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=data.batch,
        gradient_accumulation_steps=data.accumulate,
        per_device_eval_batch_size=data.evaluate,
        max_steps=1,
        learning_rate=LR,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    before = flat(student)
    trainer = KDTrainer(
        student,
        args,
        train_dataset=data.train,
        data_collator=data.collate,
        teacher=teacher,
        method=KD(soft=1.0, hard=1.0, temperature=4.0),
        task=task,
        selfcheck=False,
        **own,
    )
    trainer.train()
    logged, gradient = trainer.state.log_history[0], moved(before, student)
    scores = trainer.evaluate(data.test)  # pyright: ignore[reportArgumentType]
    names = ("loss", "cross_entropy", "accuracy", "agreement", "perplexity")
    kept = {name: scores[f"eval_{name}"] for name in names if f"eval_{name}" in scores}
    return Result(logged["soft"] + logged["hard"], gradient, kept)


def lightning(
    student: nn.Module, teacher: nn.Module, data: Data, task: Task | None, own: Any = None, **options: Any
) -> Result:
    import lightning.pytorch as pl

    from tempering.integrations.lightning import DistillModule

    class Sharded(DistillModule):
        def configure_model(self) -> None:
            """Shard the student, where a strategy with a mesh of devices asks for it."""
            if self.device_mesh is not None and not isinstance(self.student, fsdp.FSDPModule):
                for block in self.student.model.layers:
                    fsdp.fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fsdp.fully_shard(self.student, mesh=self.device_mesh["data_parallel"])

    module = Sharded(
        student,
        teacher,
        method=KD(soft=1.0, hard=1.0, temperature=4.0),
        task=task,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=LR),
        selfcheck=False,
        **own or {},
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=data.accumulate, **quiet | options)
    before = flat(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers
        trainer.fit(module, loader(data, "train"), loader(data, "test"))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    scores = {name.removeprefix("val_"): value for name, value in logged.items() if name.startswith("val_")}
    return Result(logged["train_soft"] + logged["train_hard"], moved(before, student), scores)


TRAINERS: dict[str, Callable[..., Result]] = {
    "engine": engine,
    "transformers": transformers_trainer,
    "lightning": lightning,
}


def models(family: str, *, more: int = 0) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher of one family, in float64; the teacher's head has ``more`` columns."""
    make = getattr(gen, family)
    return make(8, 0, V), make(12, 1, V + more)


class Classifier(nn.Module):
    """Of points; its output is a tensor, or a mapping as that of models of transformers."""

    def __init__(self, width: int, seed: int, *, mapping: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()
        self.mapping = mapping

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x)} if self.mapping else self.net(x)


def points(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Points with labels, of which every third has none."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = x[:, :CLASSES].argmax(-1).masked_fill(torch.arange(n) % 3 == 0, -100)
    return [{"x": a, "labels": y} for a, y in zip(x, labels, strict=True)]


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def paired(samples: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(stacked(samples).values())


def generated(student: nn.Module, teacher: nn.Module, data: Data) -> Result:
    """The Trainer on the likeliest texts of the student, which are the same however they are split."""
    own = {"max_new_tokens": 4, "pad": PAD, "vocabulary": V, "sampling": Sampling(temperature=0.0)}
    rollouts = partial(OnPolicy, generated_fraction=1.0, **own)
    return transformers_trainer(student, teacher, data, LanguageModeling(), rollouts=rollouts)


def main(out: Path) -> None:
    """Run the adapters on two processes; of nine texts to score, one process gets one twice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results, half = {}, language("left")._replace(batch=1, accumulate=3)
    for name in ("transformers", "lightning"):
        student, teacher = models("llama")
        two: dict[str, Any] = {} if name == "transformers" else {"devices": 2, "strategy": "ddp"}
        results[name] = TRAINERS[name](student, teacher, half, LanguageModeling(), **two)._asdict()
    results["generated"] = generated(*models("llama"), half)._asdict()
    from lightning.pytorch.strategies import ModelParallelStrategy

    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    student, teacher = models("llama")
    result = lightning(student, teacher, half, LanguageModeling(), devices=2, strategy=sharded)
    assert isinstance(student, fsdp.FSDPModule) and any(hasattr(p, "full_tensor") for p in student.parameters())
    results["lightning, sharded"] = result._asdict()
    if not torch.distributed.get_rank():
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
