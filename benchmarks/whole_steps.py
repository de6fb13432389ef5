"""Whole steps beside the trainers of today: language models, completions that the student writes, images, evaluation.

Legs of a few steps in turn, in one process; a leg's first step, which warms up, and its set-up are not timed. Peers
compute the same divergence on the same data with the same optimizer. The start-up part counts the CPU seconds of a
fresh interpreter until its first step is done, with texts of 32 tokens. Peers are imported from where ``make bench``
puts them, or left out: those for images from a folder of their own, as transformers imports torchvision where it is.

Usage:
    python benchmarks/whole_steps.py [--rounds 5] [--steps 3] [--parts language,images] [--images DIR] [--tiny]
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, Marks, Sheet, Variant, arguments, in_turn, installed, legs_in_turn
from torch import Tensor, nn

Leg = Callable[[int], float]
END, BYTES = 256, 257
SGD = partial(torch.optim.SGD, lr=0.05)


class Texts:
    """Models, and texts of a prompt and a completion, all of the same length.

    Tokens are bytes, of a vocabulary with as many entries as those of today.
    """

    def __init__(self, *, vocabulary: int, prompt: int, completion: int, batch: int, sizes: tuple[int, int]) -> None:
        self.vocabulary, self.prompt, self.completion, self.batch = vocabulary, prompt, completion, batch
        self.student, self.teacher = (self.model(width, seed) for seed, width in enumerate(sizes))
        self.folder = tempfile.mkdtemp()

    def model(self, width: int, seed: int) -> nn.Module:
        """A Llama with random weights, whose texts do not end before their length."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": END}
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        return LlamaForCausalLM(LlamaConfig(vocab_size=self.vocabulary, **sizes, **heads, **ends)).eval()

    def ids(self, rows: int) -> list[list[int]]:
        """Printable bytes."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(97, 123, (rows, self.prompt + self.completion), generator=generator).tolist()

    def tokenizer(self) -> Any:
        """Of bytes."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        order = [chr(i) for i in range(97, 123)]
        places = {x: 97 + i for i, x in enumerate(order)}
        rest = iter(i for i in range(256) if not 97 <= i < 123)
        vocabulary = {x: places[x] if x in places else next(rest) for x in letters}
        made = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        made.decoder = decoders.ByteLevel()  # pyright: ignore
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<end>", eos_token="<end>")

    def dataset(self, rows: int) -> Any:
        """Of Hugging Face."""
        from datasets import Dataset

        return Dataset.from_list([{"input_ids": x, "prompt": bytes(x[: self.prompt]).decode()} for x in self.ids(rows)])

    def collate(self, samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch, with what TRL's collator adds."""
        ids = torch.tensor([x["input_ids"] for x in samples])
        labels, prompts = ids.clone(), ids[:, : self.prompt]
        labels[:, : self.prompt] = -100
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return made | {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}

    def plain(self, samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        return {k: x for k, x in self.collate(samples).items() if "prompt" not in k}

    def tokens(self, rows: int) -> Any:
        """A loader of ours."""
        from tempering.data import Tokens
        from tempering.data.text import make_prompt_example

        made = [make_prompt_example(x[: self.prompt], x[self.prompt :]) for x in self.ids(rows)]
        return Tokens(made, batch_size=self.batch, pad=END, side="left", shuffle=False)


def options(texts: Texts, steps: int) -> dict[str, Any]:
    """Of every Trainer: nothing logged, saved or clipped."""
    sizes = {"max_steps": steps, "per_device_train_batch_size": texts.batch, "per_device_eval_batch_size": texts.batch}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    plain = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    where = {"use_cpu": not torch.cuda.is_available(), "bf16": False, "remove_unused_columns": False}
    return {"output_dir": texts.folder, "dataloader_pin_memory": False, **sizes, **quiet, **plain, **where}


def run(trainer: Any, steps: int) -> float:
    """Train, and return the seconds of the steps after the first."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    marks = Marks(steps)

    class Marked(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks(state.global_step - 1)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Marked())
    trainer.train()
    return marks.seconds


def gkd(texts: Texts, steps: int, *, on_policy: bool) -> Any:
    """TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    own = {"lmbda": 1.0 if on_policy else 0.0, "beta": 0.5, "temperature": 1.0, "max_new_tokens": texts.completion}
    args = GKDConfig(**options(texts, steps + 1), **own, gradient_checkpointing=False, eos_token=None)
    sets = {name: texts.dataset((steps + 1) * texts.batch) for name in ("train_dataset", "eval_dataset")}
    models = {"model": copy.deepcopy(texts.student), "teacher_model": texts.teacher}
    return GKDTrainer(**models, args=args, data_collator=texts.collate, processing_class=texts.tokenizer(), **sets)


def stable(texts: Texts, steps: int, *, on_policy: bool) -> Any:
    """TRL's DistillationTrainer; it always writes, so without it the completions are handed to it."""
    from trl import DistillationConfig, DistillationTrainer  # pyright: ignore

    class Given(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return [x[texts.prompt :] for x in texts.ids(len(prompt_ids))]

    own = {"beta": 0.5, "temperature": 1.0, "max_completion_length": texts.completion, "gradient_checkpointing": False}
    args = DistillationConfig(**options(texts, steps + 1), **own)
    sets = {"train_dataset": texts.dataset((steps + 1) * texts.batch).select_columns("prompt")}
    models = {"model": copy.deepcopy(texts.student), "teacher_model": copy.deepcopy(texts.teacher)}
    made = DistillationTrainer if on_policy else Given
    return made(**models, args=args, processing_class=texts.tokenizer(), **sets)


def adapter(texts: Texts, steps: int, *, linear: bool = False, selfcheck: bool = False) -> Any:
    """Ours in the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    from tempering.integrations.huggingface import DistillMixin
    from tempering.methods import Divergence
    from tempering.tasks import LanguageModeling

    class Ours(DistillMixin, Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass

    own: dict[str, Any] = {"teacher": texts.teacher, "method": Divergence(objective="jsd"), "task": LanguageModeling()}
    sets = {name: texts.dataset((steps + 1) * texts.batch) for name in ("train_dataset", "eval_dataset")}
    args = TrainingArguments(**options(texts, steps + 1))
    own |= {"linear": linear, "selfcheck": selfcheck, "data_collator": texts.plain, **sets}
    return Ours(model=copy.deepcopy(texts.student), args=args, **own)


def engine(texts: Texts, steps: int, *, on_policy: bool = False, selfcheck: bool = False) -> float:
    """Ours by ``distill``."""
    from tempering import distill
    from tempering.methods import Divergence
    from tempering.rollouts import OnPolicy
    from tempering.tasks import LanguageModeling

    marks, student, loader = Marks(steps), copy.deepcopy(texts.student), texts.tokens((steps + 1) * texts.batch)
    if on_policy:
        loader = OnPolicy(student, loader, generated_fraction=1.0, max_new_tokens=texts.completion, pad=END)
    how: dict[str, Any] = {"method": Divergence(objective="jsd"), "task": LanguageModeling(), "optimizer": SGD}
    how |= {"steps": steps + 1, "selfcheck": selfcheck, "quiet": True, "log_every": 10**6, "on_step": marks}
    distill(student, texts.teacher, loader, **how)
    return marks.seconds


def of_trainer(make: Callable[..., Any], texts: Texts, **own: Any) -> Leg:
    """A leg of a Trainer."""
    return lambda steps: run(make(texts, steps, **own), steps)


def said(note: str = "") -> str:
    """How busy the machine is."""
    return "; ".join(filter(None, [note, f"load {os.getloadavg()[0]:.1f}"]))


def versions(legs: Mapping[str, Any]) -> dict[str, str]:
    """What to say of every arm: the version of a peer, and the load beside the first."""
    notes: dict[str, str] = {}
    for name in legs:
        package = {"TRL": "trl", "timm": "timm"}.get(name.split()[0].rstrip(","))
        notes[name] = f"{package} {metadata.version(package)}" if package else ""
    first = next(iter(legs))
    return notes | {first: said(notes[first])}


def paces(taken: Mapping[str, list[float]], count: int, what: str) -> dict[str, str]:
    """What to say of every arm, with its median pace first; ``count`` things were done in each time."""
    notes = versions(taken)
    for name, values in taken.items():
        pace = f"{count / sorted(values)[len(values) // 2]:.0f} {what}"
        notes[name] = "; ".join(filter(None, [pace, notes[name]]))
    return notes


def texts_of(args: Any, *, batch: int, tiny: tuple[int, int], full: tuple[int, int]) -> Texts:
    """Texts of these lengths of prompt and completion, and models to match."""
    prompt, completion = tiny if args.tiny else full
    sizes, V = ((16, 32), 300) if args.tiny else ((128, 256), 32_000)
    return Texts(vocabulary=V, prompt=prompt, completion=completion, batch=batch, sizes=sizes)


def language(sheet: Sheet, args: Any) -> None:
    """Texts of 512 tokens of which 448 are learned; the divergence of every one over 32,000 classes."""
    texts = texts_of(args, batch=1, tiny=(4, 8), full=(64, 448))
    legs: dict[str, Leg] = {}
    if installed("trl"):
        legs["TRL, GKDTrainer"] = of_trainer(gkd, texts, on_policy=False)
        legs["TRL, DistillationTrainer, completions given"] = of_trainer(stable, texts, on_policy=False)
    legs["ours, Trainer"] = of_trainer(adapter, texts)
    legs["ours, Trainer, linear=True"] = of_trainer(adapter, texts, linear=True)
    legs["ours, distill"] = partial(engine, texts)
    taken = legs_in_turn(legs, steps=args.steps, rounds=args.rounds, warm=0)
    sheet.add(
        f"a step, Llama, JSD: {texts.batch} x {texts.prompt + texts.completion} tokens, V={texts.vocabulary}",
        taken,
        notes=versions(legs),
        per=args.steps,
    )

    evaluated: dict[str, Variant] = {}
    if installed("trl"):
        evaluated["TRL, GKDTrainer"] = gkd(texts, args.steps, on_policy=False).evaluate
    evaluated["ours, Trainer"] = adapter(texts, args.steps).evaluate
    evaluated["ours, Evaluator"] = scored(texts, args.steps)
    notes = versions(evaluated)
    notes["ours, Trainer"] = notes["ours, Evaluator"] = "accuracy, agreement, cross entropy and perplexity too"
    sheet.add(
        f"evaluation of {(args.steps + 1) * texts.batch} texts", in_turn(evaluated, rounds=args.rounds), notes=notes
    )


def scored(texts: Texts, steps: int) -> Variant:
    """Ours, as ``distill`` evaluates."""
    from tempering.tasks import LanguageModeling
    from tempering.teachers import Live
    from tempering.training.evaluator import Evaluator

    loader, teacher = texts.tokens((steps + 1) * texts.batch), Live(texts.teacher)
    device = torch.device("cpu")
    own: dict[str, Any] = {"device": device, "cache_teacher": False, "patience": None}
    evaluator = Evaluator(LanguageModeling(), {"validation": loader}, teacher, **own)
    return partial(evaluator.score, texts.student)


def writing(sheet: Sheet, args: Any) -> None:
    """Completions that the student writes, and the step on them."""
    texts = texts_of(args, batch=2 if args.tiny else 4, tiny=(4, 6), full=(32, 64))
    legs: dict[str, Leg] = {}
    if installed("trl"):
        legs["TRL, GKDTrainer, lmbda=1"] = of_trainer(gkd, texts, on_policy=True)
        legs["TRL, DistillationTrainer"] = of_trainer(stable, texts, on_policy=True)
    legs["ours, distill, OnPolicy"] = partial(engine, texts, on_policy=True)
    taken = legs_in_turn(legs, steps=args.steps, rounds=args.rounds, warm=0)
    per = args.steps * texts.batch * texts.completion
    title = f"on-policy, a token: {texts.batch} x {texts.completion}, V={texts.vocabulary}"
    sheet.add(title, taken, notes=paces(taken, per, "tokens/s"), per=per)


def images(sheet: Sheet, args: Any) -> None:
    """CIFAR's nets and sizes, from images in memory to weights; and scores of a split."""
    from tempering import distill
    from tempering.data import Batches
    from tempering.methods import KD
    from tempering.models import build
    from tempering.tasks import Classification
    from tempering.teachers import Live
    from tempering.training.evaluator import Evaluator

    n = 4 if args.tiny else 64
    names = ("resnet8", "resnet8") if args.tiny else ("resnet8x4", "resnet32x4")
    student, teacher = (build(name, classes=100) for name in names)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, ((args.steps + 1) * n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (len(pixels),), generator=generator)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    own: dict[str, Any] = {"batch_size": n, "mean": mean, "std": std}

    def ours(steps: int, taught: Any) -> float:
        marks = Marks(steps)
        loader = Batches(pixels, labels, shuffle=True, crop=4, flip=True, **own)
        how: dict[str, Any] = {"method": KD(soft=0.9, hard=0.1, temperature=4.0), "optimizer": SGD, "steps": steps + 1}
        how |= {"selfcheck": False, "quiet": True, "log_every": 10**6, "on_step": marks}
        distill(copy.deepcopy(student), taught, loader, **how)
        return marks.seconds

    legs: dict[str, Leg] = {}
    evaluated: dict[str, Variant] = {}
    sys.path.append(str(args.images))
    if installed("timm"):
        from peers import timm_loader, timm_step, timm_validate

        def theirs(steps: int) -> float:
            marks, net = Marks(steps), copy.deepcopy(student).train()
            step = timm_step(net, copy.deepcopy(teacher), SGD(net.parameters()))
            loader = timm_loader(pixels, labels, mean=mean, std=std, batch_size=n, training=True)
            for i, batch in enumerate(loader):
                step(*batch)
                marks(i)
            return marks.seconds

        legs["timm, train.py with logit distillation"] = theirs
        given = timm_loader(pixels, labels, mean=mean, std=std, batch_size=n, training=False)
        evaluated["timm, validate"] = partial(timm_validate, student, given)
    legs["ours, distill"] = partial(ours, taught=teacher)
    legs["ours, teacher folded, channels last"] = partial(
        ours, taught=Live(copy.deepcopy(teacher), channels_last=True, fuse_conv_bn=True)
    )
    taken = legs_in_turn(legs, steps=args.steps, rounds=args.rounds, warm=0)
    notes = paces(taken, args.steps * n, "images/s")
    sheet.add(f"a step, {names[1]} -> {names[0]}, KD: {n} images", taken, notes=notes, per=args.steps)
    split = Batches(pixels, labels, **own)
    how: dict[str, Any] = {"device": torch.device("cpu"), "cache_teacher": False, "patience": None}
    evaluated["ours, Evaluator"] = partial(Evaluator(Classification(), {"test": split}, None, **how).score, student)
    sheet.add(f"evaluation of {len(pixels)} images", in_turn(evaluated, rounds=args.rounds), notes=versions(evaluated))


def small() -> Texts:
    """Texts for a first step."""
    return Texts(vocabulary=300, prompt=8, completion=24, batch=2, sizes=(16, 32))


FIRST: dict[str, Callable[[], Any]] = {
    "TRL, GKDTrainer": lambda: run(gkd(small(), 0, on_policy=False), 0),
    "ours, Trainer, self-check": lambda: run(adapter(small(), 0, selfcheck=True), 0),
    "ours, distill": lambda: engine(small(), 0),
    "ours, distill, self-check": lambda: engine(small(), 0, selfcheck=True),
    "tempering run digits": lambda: digits(),
}


def digits() -> None:
    """Until the first step of the recipe is done."""
    from tempering.cli.main import main
    from tempering.training.trainer import Trainer

    step = Trainer._step

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        step(self, *args, **kwargs)
        _leave()

    Trainer._step = once  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["tempering", "run", "digits", "--out", f"{folder}/run"]
        main()


calls = 0


def _count() -> None:
    """Count the calls of methods, which a self-check makes."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def note(module: nn.Module, _: Any) -> None:
        global calls
        made = sys.modules.get("tempering.methods.base")
        calls += made is not None and isinstance(module, made.Method)

    register_module_forward_pre_hook(note)


def _leave() -> None:
    print(f"\n{time.process_time():.3f} {calls}", flush=True)
    os._exit(0)


def starting(sheet: Sheet, args: Any) -> None:
    """A fresh interpreter until its first step."""
    names = [name for name in FIRST if installed("trl") or not name.startswith("TRL")]
    names = names[-2:-1] if args.tiny else names
    taken: dict[str, list[float]] = {name: [] for name in names}
    notes = versions(taken)
    for round_ in range(args.rounds):
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, "--first", name], capture_output=True, text=True, check=True
            )
            took, found = done.stdout.split()[-2:]
            taken[name].append(float(took))
            if not round_ and found != "0":
                notes[name] = "; ".join(filter(None, [notes[name], f"{found} calls of the method"]))
    sheet.add("a fresh interpreter to its first step", taken, notes=notes)


PARTS = {"language": language, "writing": writing, "images": images, "starting": starting}


def main() -> None:
    """Time the parts."""
    parser = arguments(__doc__, rounds=5, steps=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="of the file; the others stay as they were")
    parser.add_argument("--images", type=Path, default=ROOT / "build" / "peers" / "images", help="where timm is")
    parser.add_argument("--first", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first:
        torch.set_num_threads(1)
        _count()
        FIRST[args.first]()
        _leave()
    args.steps = 1 if args.tiny else args.steps
    sheet = Sheet("whole_steps", args)
    for part in args.parts.split(","):
        PARTS[part](sheet, args)
    if args.parts != parser.get_default("parts"):
        sheet.keep({str(line["case"]) for line in sheet.lines})
    print(sheet.write())


if __name__ == "__main__":
    main()
