"""distill(): what a step is, how it is split, what is chosen, stopped, logged and refused."""

from __future__ import annotations

import copy
import csv
import json
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tempering
from tempering.kernels.chunked import MEMORY
from tempering.methods import DIST, DTKD, KD, Method, Sum, Supervised
from tempering.objectives import kl
from tempering.rows import Rows, total
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.temperature import Cosine, Static
from tempering.training import checks
from tempering.training.distill import distill
from tests.runs import (
    ADAMW,
    CLASSES,
    DIMS,
    SGD,
    Learned,
    Weighted,
    cosine,
    cut,
    go,
    points,
    stop_at,
    student_net,
    teacher_net,
    weighted,
    weights,
)

SPLITS = [(64,), (32, 32), (7, 50, 3, 4), (1, 1, 61, 1)]


def same_start(method: type[Method]) -> Method:
    torch.manual_seed(3)
    return method()


def after(split: tuple[int, ...], dtype: torch.dtype, method: type[Method], **more: Any) -> Tensor:
    """The student's and the method's parameters after 8 steps of 64 weighted rows, split like that."""
    made = same_start(method)
    precision = "64-true" if dtype == torch.float64 else "32-true"
    wanted = {"task": Weighted(), "precision": precision, "accumulate": len(split), "selfcheck": False} | more
    batches = cut(weighted(256, dtype=dtype), *split)
    run = go(batches, teacher=teacher_net(dtype), method=made, epochs=2, **wanted)
    assert run.facts["result"]["steps"] == 8
    return torch.cat((weights(run.student), weights(made) if any(True for _ in made.parameters()) else torch.zeros(0)))


# the batch split


@pytest.mark.parametrize("method", [KD, DTKD, Learned], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "more", [{}, {"optimizer": ADAMW, "max_grad_norm": 0.1, "schedule": cosine}], ids=["sgd", "adamw"]
)
def test_parameters_do_not_depend_on_the_split(method: type[Method], more: dict[str, Any]) -> None:
    """Unequal micro-batches, weights from 0 to 9, rows without a label, and micro-batches of a single row."""
    torch.manual_seed(3)
    whole = after(SPLITS[0], torch.float64, method, **more)
    assert not torch.allclose(whole[:117], weights(student_net())[:117], atol=1e-2), "it trained"
    for split in SPLITS[1:]:
        torch.testing.assert_close(after(split, torch.float64, method, **more), whole, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_in_float32_it_is_rounding_alone(split: tuple[int, ...]) -> None:
    whole = after(SPLITS[0], torch.float32, KD)
    torch.testing.assert_close(after(split, torch.float32, KD), whole, rtol=0.0, atol=2e-6)


# chunks


@pytest.mark.parametrize("method", [KD, DTKD, Learned], ids=lambda m: m.__name__)
@pytest.mark.parametrize("split", [SPLITS[0], SPLITS[2]], ids=str)
def test_chunks_train_as_the_plain_loss(
    method: type[Method], split: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = after(split, torch.float64, method, chunks=False)
    monkeypatch.setitem(MEMORY, "cpu", 8 * 8 * CLASSES * 9)  # nine rows per chunk
    torch.testing.assert_close(after(split, torch.float64, method, chunks=True), plain, rtol=0.0, atol=1e-12)


def test_many_rows_are_taken_in_chunks_and_the_records_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def paths(name: str, **more: Any) -> list[Any]:
        run = go(cut(points(64), 64), steps=2, out=tmp_path / name, **more)
        assert run.folder is not None
        return [json.loads(line).get("path") for line in (run.folder / "steps.jsonl").read_text().splitlines()]

    assert paths("few") == [None, None]
    monkeypatch.setattr(checks, "MIN_LOGITS", 64 * CLASSES)
    assert [(p["chunks"], p["rows"], p["compiled"]) for p in paths("many")] == [(1, 64, "")] * 2
    assert paths("asked", chunks=False) == [None, None]
    assert paths("relational", method=DIST()) == [None, None]
    with pytest.raises(ValueError, match=r"^DIST compares rows"):
        paths("wanted", method=DIST(), chunks=True)


def test_a_short_last_group_is_its_own_mean() -> None:
    """10 batches of 8 in steps of 4: two of 32 rows and one of 16."""
    parts = points(80, dtype=torch.float64)
    settings: dict[str, Any] = {"teacher": teacher_net(torch.float64), "precision": "64-true", "epochs": 2}
    split = go(cut(parts, 8), accumulate=4, **settings)
    whole = go(cut(parts, 32), **settings)
    assert split.facts["result"]["steps"] == whole.facts["result"]["steps"] == 6
    torch.testing.assert_close(weights(split.student), weights(whole.student), rtol=0.0, atol=1e-12)


def test_a_step_of_no_weight_moves_nothing() -> None:
    x, y, weight = weighted(16)
    student = student_net()
    plain = torch.optim.SGD
    run = go([(x, y, 0 * weight)], student=student, task=Weighted(), steps=2, selfcheck=False, optimizer=plain)
    assert torch.equal(weights(run.student), weights(student_net()))


@pytest.mark.parametrize(
    "method", [DIST(), KD(temperature=Cosine()), Sum(KD(hard=0.0), DIST())], ids=["one", "policy", "sum"]
)
def test_methods_that_compare_rows_are_not_split(method: Method) -> None:
    name = type(method).__name__
    with pytest.raises(ValueError, match=rf"^{name} compares rows .* accumulate=2 would change it\. Use accumulate=1"):
        go(cut(points(32), 8), method=method, accumulate=2, steps=1)
    assert go(cut(points(32), 8), method=method, steps=2).facts["status"] == "done"


def test_one_step_is_what_it_says() -> None:
    """A step by hand: KD's divergence and cross entropy, the mean over rows, plain gradient descent."""
    x, y = points(20)
    run = go([(x, y)], steps=1, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    student, teacher = student_net(), teacher_net().eval()
    rows = Rows(student(x), teacher(x).detach(), y)
    temperatures = Static(4.0)(rows)
    loss = 0.9 * kl(rows, temperatures).mean() + 0.1 * nn.functional.cross_entropy(rows.student, y)
    loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.5 * p.grad  # pyright: ignore[reportOptionalOperand]
    torch.testing.assert_close(weights(run.student), weights(student), rtol=0.0, atol=1e-7)
    assert torch.isclose(total(KD()(rows), rows), loss)


# choosing and stopping


class Scripted(Classification):
    """Scores that were written beforehand."""

    def __init__(self, *values: float, higher: bool = True) -> None:
        super().__init__()
        self.values, self.higher, self.weights = list(values), higher, []

    def score(self, student: nn.Module, batches: Any, *, teacher: Any = None) -> dict[str, float]:
        self.weights.append(weights(student))
        return {"chosen": self.values.pop(0)}

    def headline(self) -> tuple[str, bool]:
        return "chosen", self.higher


def scored(task: Classification, out: Path, **more: Any) -> Any:
    wanted = {"epochs": 5, "validation": cut(points(8, seed=4), 8), "skip_checks": ["scores"]} | more
    return go(cut(points(32), 8), task=task, out=out, **wanted)


@pytest.mark.parametrize("higher", [True, False])
def test_best_and_last_are_both_kept(higher: bool, tmp_path: Path) -> None:
    sign = 1.0 if higher else -1.0
    task = Scripted(*(sign * v for v in (0.2, 0.7, 0.4, 0.7, 0.5)), higher=higher)
    run = scored(task, tmp_path)
    assert run.best["epoch"] == 2 and run.last["epoch"] == 5
    assert run.facts["best_by"] == "validation/chosen"
    assert [line["epoch"] for line in run.epochs] == [1, 2, 3, 4, 5]
    for name, place in (("best", 1), ("student", 4)):
        net = student_net()
        net.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        assert torch.equal(weights(net), task.weights[place])
    assert torch.equal(weights(run.student), task.weights[4])


def test_early_stop(tmp_path: Path) -> None:
    run = scored(Scripted(0.2, 0.7, 0.6, 0.65, 0.9), tmp_path, patience=2)
    assert run.facts["result"]["stopped_early"] and run.facts["result"]["steps"] == 16
    assert run.last["epoch"] == 4 and run.best["epoch"] == 2
    again = scored(Scripted(), tmp_path, patience=2)
    assert again.facts["result"]["steps"] == 16, "a run that was stopped stays so"


def test_patience_counts_from_the_best() -> None:
    with pytest.raises(ValueError, match=r"patience= needs a score to stop by, and there is no .*: give validation="):
        go(cut(points(16), 8), epochs=1, patience=1)
    with pytest.raises(ValueError, match=r"patience must be 1 or more; got 0\."):
        go(cut(points(16), 8), epochs=1, patience=0)


def test_evaluate_every(tmp_path: Path) -> None:
    run = scored(Scripted(0.1, 0.2, 0.3), tmp_path, evaluate_every=2)
    assert [line["epoch"] for line in run.epochs] == [2, 4, 5], "the last one always"


def test_the_test_split_chooses_where_there_is_no_validation() -> None:
    held = cut(points(40, seed=8), 20)
    run = go(cut(points(32), 8), epochs=2, test=held)
    assert run.facts["best_by"] == "test/accuracy" and set(run.last) == {"epoch", "test"}
    both = go(cut(points(32), 8), epochs=2, test=held, validation=held)
    assert both.facts["best_by"] == "validation/accuracy" and set(both.last) == {"epoch", "validation", "test"}
    assert both.last["test"] == run.last["test"] == both.last["validation"]
    neither = go(cut(points(32), 8), epochs=1)
    assert neither.facts["best_by"] is None and neither.best is None and neither.last == {"epoch": 1}


def test_it_learns_what_the_teacher_knows() -> None:
    held = cut(points(200, seed=11), 100)
    run = go(cut(points(512), 32), epochs=15, validation=held)
    assert run.best["validation"]["accuracy"] > 0.9 and run.best["validation"]["agreement"] > 0.9
    assert run.epochs[-1]["loss"] < 0.5 * run.epochs[0]["loss"]


# the step


def test_the_schedule_sees_the_share_that_is_done() -> None:
    seen: list[float] = []
    run = go(cut(points(32), 8), steps=8, schedule=lambda p: seen.append(p) or 1.0 - p, log_every=1, method=Learned())
    assert seen == [i / 8 for i in range(8)]
    assert run.facts["optimizer"][0]["lr"] == 0.1, "the record holds the rate before the schedule"


def test_lr_and_progress_are_logged(tmp_path: Path) -> None:
    go(cut(points(32), 8), steps=8, schedule=lambda p: 1.0 - p, out=tmp_path, log_every=3)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 7, 8]
    assert [line["progress"] for line in lines] == [1 / 8, 4 / 8, 7 / 8, 1.0]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.0625, 0.025, 0.0125])
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2]
    assert all(set(line["terms"]) == {"soft", "hard"} and line["T_teacher"]["mean"] == 4.0 for line in lines)


@pytest.mark.parametrize("method", [KD, Learned])
def test_clip_is_the_norm_of_all_gradients(method: type[Method]) -> None:
    """With plain gradient descent at rate 1 a step is as long as the clipped gradient."""

    def moved(clip: float | None) -> Tensor:
        made = same_start(method)
        student = student_net()
        batch = (points(16)[0], torch.zeros(16, dtype=torch.long))
        made.setup(Rows(student(batch[0]).detach(), torch.zeros(16, CLASSES)))
        before = torch.cat((weights(student), *(p.detach().double().flatten() for p in made.parameters())))
        run = go(
            [batch], student=student, method=made, steps=1, max_grad_norm=clip, selfcheck=False,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        )  # fmt: skip
        return torch.cat((weights(run.student), *(p.detach().double().flatten() for p in made.parameters()))) - before

    free = moved(None)
    assert float(free.norm()) > 0.1
    torch.testing.assert_close(moved(0.05), free * (0.05 / float(free.norm())), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved(100.0), free, rtol=0.0, atol=0.0)


def test_on_step_is_told_every_loss() -> None:
    told: list[tuple[int, float]] = []
    go(cut(points(32), 8), steps=6, on_step=lambda number, loss: told.append((number, float(loss))), log_every=100)
    assert [number for number, _ in told] == list(range(6))
    assert all(loss > 0 for _, loss in told) and told[-1][1] < told[0][1]


# precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true", "32-true"])
def test_precisions(precision: str) -> None:
    run = go(cut(points(64), 16), precision=precision, epochs=6)
    held = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in run.student.parameters()} == {held}
    assert run.epochs[-1]["loss"] < run.epochs[0]["loss"]


def test_in_float64_the_loss_is_float64() -> None:
    told: list[torch.dtype] = []
    task = Seeing()
    go(
        cut(points(16, dtype=torch.float64), 8), teacher=teacher_net(torch.float64), task=task, precision="64-true",
        steps=1, on_step=lambda number, loss: told.append(loss.dtype),
    )  # fmt: skip
    assert told == [torch.float64] and task.dtypes == {torch.float64}


class Seeing(Classification):
    """Remembers what the rows were."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        self.dtypes |= {student.dtype, teacher.dtype}
        return super().rows(student, teacher, batch)


class Overflows(nn.Linear):
    """A net whose gradient is now and then infinite, as fp16's is."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.requires_grad and self.training and bool(x[0, 0] > 0.0):
            out.register_hook(lambda grad: grad * torch.inf)
        return out


def test_fp16_skips_a_step_that_overflows_also_with_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by the plugin that a GPU gets."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu")])
    monkeypatch.setattr("tempering.training.trainer.fabric_for", lambda **_: fabric)
    torch.manual_seed(2)
    net = Overflows(DIMS, CLASSES)
    batches = cut(points(64), 8)
    skipped = [bool(x[0, 0] > 0.0) for x, _ in batches]
    assert any(skipped) and not all(skipped)
    seen: list[Tensor] = []
    settings: dict[str, Any] = {"max_grad_norm": 0.1, "selfcheck": False, "epochs": 1}
    go(batches, student=net, on_step=lambda number, loss: seen.append(weights(net)), **settings)
    moves = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moves == [not s for s in skipped[1:]] and bool(torch.isfinite(seen[-1]).all())


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of 32-true, .*; got 'bf16'\. bf16 is 'bf16-mixed'\."):
        go(cut(points(16), 8), steps=1, precision="bf16")
    with pytest.raises(ValueError, match=r"precision='16-mixed' needs a GPU; on a CPU use 'bf16-mixed' or '32-true'\."):
        go(cut(points(16), 8), steps=1, precision="16-mixed")


# whole runs that are compiled are in tests/test_kernels.py, beside what else is


def test_where_graphs_may_be_replayed_every_answer_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay writes where the last one wrote; a stand-in does the same, and says which mode it got."""
    held, modes, steps = [torch.zeros(8, CLASSES)], [], []

    def replaying(model: nn.Module, mode: str | None) -> nn.Module:
        modes.append(mode)
        model.register_forward_hook(lambda module, given, out: held[0].copy_(out.detach()) + 0.0 * out)
        return model

    monkeypatch.setattr(torch, "compile", replaying)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    go(cut(points(32), 8), steps=4, compile="reduce-overhead", selfcheck=False)
    assert modes == ["reduce-overhead"] and len(steps) == 4

    def overwriting(model: nn.Module, mode: str | None) -> nn.Module:
        model.register_forward_hook(lambda module, given, out: held[0].copy_(out))
        return model

    monkeypatch.setattr(torch, "compile", overwriting)
    first, second = (
        Live(nn.Sequential(nn.Identity()), compile="reduce-overhead")(x)
        for x in torch.eye(8)[:2, None, :5].expand(2, 8, 5)
    )
    assert first[0, 0] == 1.0 and second[0, 1] == 1.0 and first[0, 1] == 0.0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile must be .*'reduce-overhead'.*; got 'graphs'"):
        go(cut(points(16), 8), steps=1, compile="graphs")
    with pytest.raises(ValueError, match=r"compile must be .*; got 'graphs'"):
        Live(nn.Identity(), compile="graphs")


# loggers


def test_csv_logger(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "loggers": ["csv"], "out": tmp_path, "checkpoint_every": 2}
    settings |= {"validation": cut(points(16, seed=3), 16)}
    with pytest.raises(KeyboardInterrupt):
        go(cut(points(32), 8), on_step=stop_at(5), **settings)
    go(cut(points(32), 8), **settings)
    files = [(tmp_path / "logs" / name / "metrics.csv").read_text().splitlines() for name in ("csv", "csv-2")]
    steps = [[int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] for file in files]
    assert steps == [[1, 2, 3, 4, 5], [5, 6, 7, 8]], "what was written before the stop stays"
    columns = {"train/loss", "train/lr", "train/soft", "train/T_student", "validation/accuracy", "step"}
    assert columns <= set(files[1][0].split(","))


def test_tensorboard_logger(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its dependencies
        go(cut(points(32), 8), steps=4, loggers=["tensorboard"], out=tmp_path, validation=cut(points(8), 8))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
        events.Reload()
    assert {"train/loss", "train/lr", "validation/accuracy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_loggers_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"loggers are tensorboard, csv, wandb, mlflow, trackio or objects .*; got 'neptune'"
    ):
        go(cut(points(16), 8), steps=1, loggers=["neptune"], out=tmp_path)
    with pytest.raises(ValueError, match=r"the logger 'csv' needs a folder to write to: give out=FOLDER"):
        go(cut(points(16), 8), steps=1, loggers=["csv"])


# the teacher


def test_the_teacher_is_not_trained() -> None:
    teacher, optimizers = teacher_net(), []
    before = copy.deepcopy(dict(teacher.state_dict()))
    student = student_net()
    go(
        cut(points(64), 16), student=student, teacher=teacher, steps=6,
        optimizer=lambda groups: optimizers.append(SGD(groups)) or optimizers[0],
    )  # fmt: skip
    held = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in student.parameters()}
    assert not held & {id(p) for p in teacher.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters()), "given back as it was"


def test_a_teacher_that_somebody_puts_in_training_mode_goes_back() -> None:
    teacher = teacher_net()  # with batch normalization
    before = copy.deepcopy(dict(teacher.state_dict()))
    with pytest.warns(UserWarning, match="the teacher Sequential was in training mode"):
        run = go(cut(points(64), 16), teacher=teacher, steps=6, on_step=lambda number, loss: teacher.train() and None)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    calm = go(cut(points(64), 16), steps=6)
    assert torch.equal(weights(run.student), weights(calm.student))


def test_teachers_refused() -> None:
    with pytest.raises(TypeError, match=r"teacher must be a module, a Teacher or None; got str"):
        go(cut(points(16), 8), steps=1, teacher="resnet")
    with pytest.raises(
        ValueError, match=r"KD needs a teacher, and teacher is None\. To train .* use methods\.Supervised"
    ):
        go(cut(points(16), 8), steps=1, teacher=None)
    net = student_net()
    for teacher in (net, net[0], nn.Sequential(net)):
        with pytest.raises(ValueError, match=r"the teacher is a part of the student, or .*copy\.deepcopy\(model\)"):
            go(cut(points(16), 8), steps=1, student=net, teacher=teacher)
        net.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no parameter that requires grad: there is nothing to train"):
        go(cut(points(16), 8), steps=1, student=net.requires_grad_(False))


def test_alone() -> None:
    run = go(cut(points(64), 16), teacher=None, method=Supervised(), epochs=4, validation=cut(points(32, seed=2), 32))
    assert run.facts["teacher"] is None and "agreement" not in run.last["validation"]
    assert run.epochs[-1]["loss"] < run.epochs[0]["loss"]


# what stops a run


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    batches = cut(points(64), 8)
    batches[5] = (batches[5][0] * torch.nan, batches[5][1])
    with pytest.raises(FloatingPointError) as caught:
        go(batches, steps=8, out=tmp_path, checkpoint_every=2)
    said = str(caught.value)
    assert said.startswith(
        "the loss is nan at step 6: the student and the teacher's logits hold NaN or infinity, and so do the inputs of "
    )
    assert "Try a lower learning rate, max_grad_norm=1.0, or precision='32-true'." in said
    assert said.endswith(f"The last checkpoint under {tmp_path} is from before.")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["status"] == "failed" and facts["error"].startswith("FloatingPointError: the loss is nan at step 6")
    kept = load_file(tmp_path / "checkpoints" / "step-00000004" / "tensors.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in kept.values() if t.is_floating_point())
    with pytest.raises(FloatingPointError, match=r"^the loss is inf .*models' logits are finite; terms \{'soft': inf"):
        go(cut(points(16), 8), method=Diverging(), steps=3, selfcheck=False)


class Diverging(Method):
    """Infinite from the start."""

    paper = "none: a test's"

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {"soft": rows.student.square().sum(-1) * torch.inf}


class Unsized(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*points(20), strict=True))


def test_loaders_refused() -> None:
    empty = r"the training loader yields no batches\. Is the data set empty, or smaller than a batch\?"
    x, y = points(5)
    for batches in ([], DataLoader(TensorDataset(x, y), batch_size=8, drop_last=True)):
        with pytest.raises(ValueError, match=empty):
            go(batches, epochs=1)
        with pytest.raises(ValueError, match=empty):
            go(batches, steps=3)
        with pytest.raises(ValueError, match=empty):
            go(batches, steps=3, selfcheck=False)
    with pytest.raises(ValueError, match=r"^batches is an iterator, .* iterated over only once and not resumed\."):
        go(iter(cut(points(16), 8)), steps=1)
    with pytest.raises(ValueError, match=r"^validation is an iterator, which can be iterated over only once"):
        go(cut(points(16), 8), steps=1, validation=iter(cut(points(16), 8)))
    with pytest.raises(ValueError, match=r"there is nothing to score: the loader yields no batches"):
        go(cut(points(16), 8), epochs=1, validation=[])


def test_a_loader_without_a_length() -> None:
    loader = DataLoader(Unsized(), batch_size=8)
    with pytest.raises(ValueError, match=r"DataLoader has no length, so an epoch has none\. Give steps= instead of"):
        go(loader, epochs=1)
    run = go(loader, steps=7)
    assert run.facts["result"]["steps"] == 7 and [line["epoch"] for line in run.epochs] == [1, 2, 3]


def test_settings_refused() -> None:
    with pytest.raises(ValueError, match=r"give either steps= or epochs=; got steps=None, epochs=None"):
        go(cut(points(16), 8))
    with pytest.raises(ValueError, match=r"give either steps= or epochs=; got steps=1, epochs=1"):
        go(cut(points(16), 8), steps=1, epochs=1)
    for name in ("steps", "evaluate_every", "accumulate", "log_every", "checkpoint_every", "keep"):
        with pytest.raises(ValueError, match=rf"{name} must be 1 or more; got 0\."):
            go(cut(points(16), 8), **{"steps": 1, name: 0})
    with pytest.raises(ValueError, match=r"max_grad_norm must be > 0; got 0\. None does not clip"):
        go(cut(points(16), 8), steps=1, max_grad_norm=0)


def test_a_run_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = distill(
        student_net(), teacher_net(), cut(points(32), 8), method=KD(), epochs=2, quiet=True, accelerator="cpu"
    )
    assert run.folder is None and not list(tmp_path.iterdir())
    assert run.facts["status"] == "done" and len(run.epochs) == 2
    assert tempering.distill is distill and run.facts["settings"]["total_steps"] == 8
