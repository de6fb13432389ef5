"""Runs on the simulated device, each beside the same run on the CPU; ``test_simdevice.py`` runs them in processes.

A part returns, by path, the places at which the host read from the device, with their counts per step.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tempering
from tempering import distill, methods, tasks
from tempering.audits import AUDITS
from tempering.data import Batches
from tempering.data.synthetic_shapes import synthetic_shapes
from tempering.data.token_alignment import collate_spans, shared_tokens
from tempering.data.tokens import Tokens
from tempering.methods import DTKD, KD, Method, Swing
from tempering.rows import Rows, total, upcast_to_float32
from tempering.tasks import (
    Classification,
    Detection,
    GenerationScorer,
    LanguageModeling,
    OnPolicy,
    Seq2Seq,
    Speculative,
)
from tempering.teachers import Live, TopKTeacher, record, record_hidden, record_top_k
from tempering.testing import SimulatedTensor, simulated_device
from tempering.training.config import Run
from tests import detection_runs, test_aligned, test_seq2seq, test_served
from tests.contract import CASES, STEP_CASES, Lesson, block, copied, leaves, same
from tests.runs import stop_at
from tests.test_generation import EOS, PAD, gpt2, llama, texts

PACKAGE = Path(tempering.__file__).parent
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Reads = dict[str, float]


def register() -> None:
    """Register the device before the first backward pass, and let Fabric and Lightning find it."""
    with simulated_device():
        pass
    from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
    from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
    from lightning_fabric import strategies as fabric_strategies
    from lightning_fabric.accelerators import ACCELERATOR_REGISTRY
    from lightning_fabric.strategies import STRATEGY_REGISTRY

    class SimAccelerator(Accelerator):
        def setup_device(self, device: torch.device) -> None:
            pass

        def teardown(self) -> None:
            pass

        def get_device_stats(self, device: Any) -> dict[str, Any]:
            return {}

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("sim:0")]

        @staticmethod
        def auto_device_count() -> int:
            return 1

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def name() -> str:
            return "sim"

    for accelerators in (ACCELERATOR_REGISTRY, AcceleratorRegistry):
        accelerators.register("sim", SimAccelerator, override=True)
    for strategies, strategy in (
        (STRATEGY_REGISTRY, fabric_strategies.SingleDeviceStrategy),
        (StrategyRegistry, SingleDeviceStrategy),
    ):
        strategies.register("sim", strategy, override=True, device="sim:0")


def raw(x: Tensor) -> Tensor:
    return x.raw if isinstance(x, SimulatedTensor) else x


def moved(rows: Rows, device: str) -> Rows:
    names = ("student", "teacher", "target", "weight", "ids", "positions", "privacy_score", "task_loss")
    changed = {name: x.to(device) for name in names if (x := getattr(rows, name)) is not None}
    return rows.replace(
        features={name: (s.to(device), t.to(device)) for name, (s, t) in rows.features.items()}, **changed
    )


# methods and policies


def one_call(method: Any, rows: Rows, reads: Counter[str], device: str) -> tuple[list[Tensor], Counter[str]]:
    """Loss and gradients of a method, and the host's reads in it."""
    made = copied(method).to(upcast_to_float32(rows.student).dtype).to(device)
    rows, wanted = leaves(moved(rows, device))
    torch.default_generator.manual_seed(0)
    before = Counter(reads)
    loss = total(made(rows, 0.5), rows)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    read = reads - before
    return [
        raw(loss.detach()),
        *(raw(x).new_zeros(x.shape) if g is None else raw(g) for g, x in zip(gradients, wanted, strict=True)),
    ], read


def contract() -> dict[str, Reads]:
    """Every case of the contract: the CPU's loss and gradients.

    A method's first case is run without weights and with them, its others (with other arguments or policies) in turn.
    """
    found: dict[str, Reads] = {}
    scored = block(weighted=True)
    scored = scored.replace(positions=scored.ids, privacy_score=torch.linspace(0.0, 1.0, len(scored)))
    first = {type(part): name for name, part in reversed(CASES)}
    cases = [
        (how + name, block(weighted=bool(how)), part)
        for number, (name, part) in enumerate(CASES)
        for turn, how in enumerate(("", "weighted "))
        if turn == number % 2 or first[type(part)] == name
    ]
    for name, rows, part in [*cases, ("private Swing", scored, Swing(hide=0.8))]:
        method = copy.deepcopy(part)
        method.setup(rows)
        with simulated_device(PACKAGE) as reads:
            got, read = one_call(method, rows, reads, "sim")
        same(got, one_call(method, rows, Counter(), "cpu")[0])
        found[name] = dict(read)
    return found


# runs


@contextmanager
def device(name: str) -> Iterator[Counter[str]]:
    if name != "sim":
        yield Counter()
        return
    with simulated_device(PACKAGE) as reads:
        yield reads


def trained(name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Counter[str]], Run]:
    """The losses, the host's reads until each step, and the run, on one device."""
    losses: list[Tensor] = []
    marks: list[Counter[str]] = []
    with device(name) as reads:

        def on_step(step: int, loss: Tensor) -> None:
            losses.append(raw(loss.detach()).clone())
            marks.append(Counter(reads))

        where = {"accelerator": name, "strategy": "sim" if name == "sim" else "auto"}
        run = distill(**{"optimizer": SGD, "quiet": True, "log_every": 1000, "on_step": on_step} | where | options)
    assert all(p.device.type == name for p in run.student.parameters()), "it ran elsewhere"
    return losses, marks, run


def both(make: Callable[[], dict[str, Any]], steps: int = 5, rtol: float = 1e-4) -> Reads:
    """Train on both devices, and compare losses, scores and weights; the reads per step, where nothing is logged."""
    results = []
    per_step: Counter[str] = Counter()
    for name in ("cpu", "sim"):
        torch.manual_seed(0)
        losses, marks, run = trained(name, {"steps": steps} | make())
        if name == "sim":
            per_step = marks[-2] - marks[1]  # what is logged is read after the first
        results.append((torch.stack(losses), [raw(p.detach()) for p in run.student.parameters()], run.epochs))
    (want, weights, epochs), (got, others, theirs) = results
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(others, weights, rtol=10 * rtol, atol=rtol)
    for a, b in zip(epochs, theirs, strict=True):
        scores = [
            {k: math.log(v) if k == "perplexity" else v for k, v in x.get("test", {}).items() if isinstance(v, float)}
            for x in (a, b)
        ]
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=1e-4)
    return {place: count / (steps - 3) for place, count in sorted(per_step.items())}


def images(n: int = 5, rows: int = 8) -> tuple[nn.Module, list[Any]]:
    teacher = nn.Linear(6, 5)
    batches = [torch.randn(rows, 6) for _ in range(n)]
    with torch.no_grad():
        return teacher, [(x, teacher(x).argmax(-1), torch.arange(rows) + rows * i) for i, x in enumerate(batches)]


def classified(method: Method, **options: Any) -> dict[str, Any]:
    teacher, batches = images()
    return {
        "student": nn.Linear(6, 5),
        "teacher": teacher,
        "batches": batches,
        "method": method,
        "task": Classification(),
        "test": batches[:2],
    } | options


def classification() -> dict[str, Reads]:
    names = ("Supervised", "KD", "DKD", "DTKD", "DIST", "LSKD", "NKD")
    found = {name: both(lambda name=name: classified(getattr(methods, name)())) for name in names}
    found["accumulated"] = both(
        lambda: classified(KD(), accumulate=2, steps=4, epochs=None, max_grad_norm=1.0), steps=4
    )
    with tempfile.TemporaryDirectory() as folder:
        found["records"] = both(lambda: classified(DTKD(), out=Path(folder, str(len(list(Path(folder).iterdir()))))))
    return found


def tokens(n: int = 5, **options: Any) -> list[Any]:
    """Batches of texts of unequal lengths."""
    from tempering.data.text import collate

    made = [texts() for _ in range(n)]
    return [collate(part, pad=PAD, **options) for part in made]


def written(**options: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"method": DTKD(), "task": LanguageModeling(), "batches": tokens(), "test": tokens(2)}
    how |= {"selfcheck": False, "optimizer": partial(SGD, lr=1e-3)}  # these teachers are not above chance
    return {"student": llama(8, 0).float(), "teacher": llama(12, 1).float()} | how | options


class Embedded(nn.Module):
    """A language model that is none of transformers, which read the masks of every batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(257, width), nn.Linear(width, 257))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.layers(input_ids)


def language() -> dict[str, Reads]:
    from tempering.data.text import pack

    packed = [*pack(texts(), 32, pad=PAD)] * 5
    return {
        "padded": both(written),
        "a model of its own": both(lambda: written(student=Embedded(8), teacher=Embedded(12))),
        "left": both(lambda: written(batches=tokens(side="left"), teacher=gpt2(12, 1).float())),
        "packed": both(lambda: written(batches=packed)),
        "accumulated": both(lambda: written(accumulate=2, steps=4), steps=4),
        "top-k": both(lambda: written(teacher=TopKTeacher(Live(llama(12, 1).float()), top=5))),
        "encoder-decoder": both(translated, rtol=1e-3),
        "other tokenizer": both(aligned),
    }


def translated() -> dict[str, Any]:
    from tempering.data.pairs import Pairs

    data = Pairs(test_seq2seq.pairs() * 5, batch_size=4)
    student, teacher = test_seq2seq.t5(8, 0).float(), test_seq2seq.t5(16, 1).float()
    return written(student=student, teacher=teacher, task=Seq2Seq(), batches=data, test=data)


def aligned() -> dict[str, Any]:
    made = test_aligned.texts()
    shared = shared_tokens(test_aligned.letters(bos=True), test_aligned.words(bos=True))
    task = tasks.CrossTokenizer(shared=shared)
    student, teacher = (model.float() for model in test_aligned.models())
    batches = [collate_spans(made[:4], pad=(256, test_aligned.END))] * 5
    method = methods.HybridULD(matched=task.matched)
    return written(student=student, teacher=teacher, task=task, batches=batches, test=batches[:1], method=method)


def generation() -> dict[str, Reads]:
    """Texts of the student, alone and verified: one read per block of tokens; the batch is learned without more."""
    own: dict[str, Any] = {"max_new_tokens": 4, "eos": EOS, "pad": PAD, "generated_fraction": 1.0}

    def made(kind: str) -> dict[str, Any]:
        how = written()
        source: Any = OnPolicy(how["student"], how["batches"], **own)
        if kind == "speculative":
            source = Speculative(how["student"], how["teacher"], how["batches"], top_k=60, block=4, **own)
        return how | {"batches": source}

    def scored() -> dict[str, Any]:
        scorer = GenerationScorer(lambda a, b: float(a == b), name="equal", max_new_tokens=4)
        return written(task=LanguageModeling(scorer=scorer))

    found = {kind: both(partial(made, kind)) for kind in ("on-policy", "speculative")}
    return found | {"scored": both(scored)}


def detection() -> dict[str, Reads]:
    def made(kind: str) -> dict[str, Any]:
        data = synthetic_shapes(size=32, train=20, test=4, batch_size=4)
        student, teacher = (detection_runs.net(seed=i, bins=5, norm="group") for i in (1, 2))
        task = Detection(keep=20, class_rows=kind != "inconsistent")
        how = {"batches": data.train, "test": data.test, "optimizer": partial(torch.optim.SGD, lr=1e-3)}
        return {"student": student, "teacher": teacher, "method": detection_runs.METHODS[kind](), "task": task, **how}

    return {kind: both(partial(made, kind)) for kind in detection_runs.METHODS}


def teachers() -> dict[str, Reads]:
    """Teachers from files and behind an endpoint, and a run that is interrupted and resumed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        live, data = Live(llama(12, 1).float()), Tokens(texts() * 4, batch_size=4)
        LanguageModeling().prepare_model(live.model)
        recorded: dict[str, Any] = {"inputs": LanguageModeling().inputs, "quiet": True}
        cached = {
            "top-k": record_top_k(TopKTeacher(live, top=4), data, folder / "top-k", **recorded),
            "hidden": record_hidden(live, data, folder / "hidden", **recorded),
        }
        found = {
            kind: both(lambda teacher=teacher: written(teacher=copy.deepcopy(teacher), batches=data))
            for kind, teacher in cached.items()
        }
        _, batches = images()
        pixels = torch.cat([x for x, *_ in batches]).view(-1, 1, 2, 3).sigmoid().mul(255).byte()
        loader = Batches(pixels, torch.cat([y for _, y, _ in batches]), batch_size=8, mean=(0.5,), std=(0.5,))
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(6, 5)) for _ in "ab"]
        logits = record(Live(nets[0]), loader, folder / "logits", quiet=True)
        how = {"batches": loader, "test": loader, "selfcheck": False}
        found["logits"] = both(
            lambda: classified(DTKD(), student=copy.deepcopy(nets[1]), teacher=copy.deepcopy(logits), **how)
        )
        with test_served.serving() as server:
            server.model = llama(12, 1)
            found["served"] = both(lambda: written(teacher=test_served.served(server), method=KD()), rtol=1e-3)
        resumed(folder)
    return found


def resumed(folder: Path, name: str = "sim") -> None:
    """Interrupt a run on the device, and resume it there: the weights are those of a run in one go."""

    def run(out: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        how = classified(DTKD(), optimizer=partial(torch.optim.AdamW, lr=1e-2), epochs=2, checkpoint_every=2)
        where = {
            "accelerator": name,
            "strategy": "sim" if name == "sim" else "auto",
            "quiet": True,
            "out": folder / out,
        }
        return distill(**how | where | options).student

    with device(name):
        want = run("whole")
        with suppress(KeyboardInterrupt):
            run("parts", on_step=stop_at(6))
        got = run("parts")
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def steps() -> dict[str, Reads]:
    """Methods that own their step: the CPU's loss and gradients."""
    found: dict[str, Reads] = {}
    for name, part in STEP_CASES:
        if name.startswith("Interactive") and getattr(part, "derivative", "") == "exact":
            continue  # by torch.func, which the device does not have
        results = []
        for where in ("cpu", "sim"):
            with device(where) as reads:
                lesson, method = Lesson(), copy.deepcopy(part)
                lesson.student.to(where)
                lesson.teacher.to(where)
                lesson.images, lesson.labels = lesson.images.to(where), lesson.labels.to(where)
                before = Counter(reads)
                loss, gradients = lesson.backward(method.to(where))
                read = reads - before  # "elsewhere" are the checks of the test
                found[name] = {place: count for place, count in read.items() if not place.endswith("elsewhere")}
                results.append([raw(loss), *map(raw, gradients)])
        same(*results)
    return found


def audits() -> dict[str, Reads]:
    """Every audit that runs on images: the CPU's findings."""
    x = torch.rand(24, 3, 8, 8)
    net = partial(nn.Sequential, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    models = [net(nn.Linear(4, 3)) for _ in "ab"]
    batches = [(x[i : i + 8], models[1](x[i : i + 8]).argmax(1), torch.arange(i, i + 8)) for i in (0, 8, 16)]
    for name, audit in AUDITS.items():
        if name in ("Canaries", "Privacy"):  # of texts; of training images
            continue
        values = []
        for where in ("cpu", "sim"):
            with device(where):
                student, teacher = (copy.deepcopy(model).to(where) for model in models)
                values.append([f.value for f in audit()(student, teacher, batches)])
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5, msg=name)
    return {}


def adapters() -> dict[str, Reads]:
    """The trainers of transformers and Lightning: losses and weights are the CPU's; reads of two steps."""
    return {"lightning": trained_by(by_lightning), "transformers": trained_by(by_transformers)}


def trained_by(train: Callable[..., None]) -> Reads:
    """Train five steps, and count the reads from the third to the fourth."""
    results = []
    found: Counter[str] = Counter()
    for where in ("cpu", "sim"):
        torch.manual_seed(0)
        student, teacher = llama(8, 0).float(), llama(12, 1).float()
        marks: list[Counter[str]] = []
        with device(where) as reads:

            def mark(where: str = where, student: nn.Module = student, marks: list[Any] = marks) -> None:
                assert all(p.device.type == where for p in student.parameters()), "it ran elsewhere"
                marks.append(Counter(reads))

            train(where, student, teacher, tokens(), mark)
        found = marks[3] - marks[2]
        results.append([raw(p.detach()) for p in student.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    untrained = llama(8, 0).float().parameters()
    assert not all(torch.equal(a, b) for a, b in zip(results[0], untrained, strict=True))
    return dict(found)


def by_lightning(
    where: str, student: nn.Module, teacher: nn.Module, batches: list[Any], mark: Callable[[], None]
) -> None:
    import lightning.pytorch as pl

    from tempering.integrations.lightning import DistillModule

    class Module(DistillModule):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            mark()

    module = Module(
        student, teacher, method=DTKD(), task=LanguageModeling(), optimizer=partial(SGD, lr=1e-3), selfcheck=False
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "log_every_n_steps": 1000}
    place = {"accelerator": where, "strategy": "sim" if where == "sim" else "auto", "devices": 1}
    loaders = [DataLoader(part, batch_size=None) for part in (batches, batches[:1])]
    pl.Trainer(max_epochs=1, **place, **quiet).fit(module, *loaders)


def by_transformers(
    where: str, student: nn.Module, teacher: nn.Module, batches: list[Any], mark: Callable[[], None]
) -> None:
    import transformers
    from accelerate.state import PartialState

    from tempering.integrations.huggingface import DistillMixin

    class Arguments(transformers.TrainingArguments):
        @property
        def device(self) -> torch.device:
            _, PartialState().device = super().device, torch.device("cpu" if where == "cpu" else "sim:0")
            return PartialState().device

    class Trainer(DistillMixin, transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            mark()
            return loss

    data = [{name: x[row] for name, x in batch.items()} for batch in batches for row in range(len(batch["labels"]))]
    size = len(batches[0]["labels"])
    with tempfile.TemporaryDirectory() as folder:
        args = Arguments(
            folder,
            per_device_train_batch_size=size,
            max_steps=5,
            learning_rate=1e-3,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        own = {"teacher": teacher, "method": DTKD(), "task": LanguageModeling(), "selfcheck": False}
        Trainer(student, args, train_dataset=data, **own).train()


def planted() -> dict[str, str]:
    """What is said of a method that forgets the device, and of one that asks for a number."""

    class Forgets(KD):
        def forward(self, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
            return {"soft": torch.ones(len(rows)) * rows.student.sum(1)}

    class Asks(KD):
        def forward(self, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
            return {"soft": rows.student.sum(1) * float(rows.student.max())}

    with simulated_device(within=Path(__file__).parent) as reads:
        rows = moved(block(), "sim")
        reads.clear()
        try:
            Forgets()(rows)
            error = ""
        except RuntimeError as raised:
            error = str(raised)
        Asks()(rows)
    return {"error": error, **{place: str(count) for place, count in reads.items()}}


def rules() -> dict[str, int]:
    """Small cases of the device itself; the counts of its reads."""
    with simulated_device(within=Path(__file__).parent) as reads:
        assert torch.accelerator.is_available() and torch.sim.is_available()
        x = torch.arange(6.0, device="sim").reshape(2, 3)
        assert x.device == torch.device("sim:0") and x.stride() == (3, 1)
        x[0] += torch.tensor(1.0)  # a number on the CPU, and a view in place
        assert torch.equal(raw(x), torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]))
        generator = torch.Generator(device="sim").manual_seed(3)
        drawn = torch.rand(4, generator=generator, device="sim")
        assert torch.equal(raw(drawn), torch.rand(4, generator=torch.Generator().manual_seed(3)))
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: torch.ones(3)[torch.tensor([1], device="sim")],
            lambda: x.index_select(0, torch.tensor([1])),
            lambda: x.numpy(),
        ):
            try:
                wrong()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("a device would refuse it")
        tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        tied[1].weight = tied[0].weight
        assert tied.to("sim")[1].weight is tied[0].weight
        before = Counter(reads)
        torch.ones(3).to("sim", non_blocking=True).sum() / 2
        assert reads == before, "nothing is waited for"
        torch.tensor([1, 2], device="sim"), x.sum().item(), x[x > 1], x.nonzero(), x.cpu()
        counted = reads - before
    assert not torch.accelerator.is_available()
    return {place.rpartition(" ")[0]: count for place, count in counted.items()}


PATHS = (contract, classification, language, generation, detection, teachers, steps, audits, adapters)
PARTS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (*PATHS, planted, rules)}


def main(name: str) -> None:

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    register()
    with redirect_stdout(sys.stderr):
        found = PARTS[name]()
    json.dump(found, sys.stdout)
