"""A run's folder takes up the same run alone: new, resumed, finished, extended and other runs are told apart."""

from __future__ import annotations

import errno
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from tempering.cli.main import _print_result
from tempering.data import Batches
from tempering.tasks import Classification
from tempering.training import checkpoint
from tempering.training.config import Run
from tempering.utils.files import read_json_lines
from tests.cases import each
from tests.runs import cosine, cut, flattened, go, points, stop_at, student_net, teacher_net, weights

EPOCHS = 3


def loader(seed: int = 0, *, n: int = 32, **more: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*points(n, seed=seed)), batch_size=8, **more)


def pixels(seed: int = 0, **more: Any) -> dict[str, Any]:
    """Images, and networks that flatten them."""
    x, y = points(30, seed=seed)
    images = (255 * x.sigmoid()).to(torch.uint8).view(30, 1, 2, 3)
    batches = Batches(images, y, batch_size=8, mean=(0.5,), std=(0.25,), **more)
    return {"batches": batches, "student": flattened(student_net()), "teacher": flattened(teacher_net())}


def run(out: Path | None, **more: Any) -> Run:
    length = {} if "steps" in more else {"epochs": EPOCHS}
    options: dict[str, Any] = {"batches": loader(), "out": out, "selfcheck": False} | length | more
    return go(**options)


class Halved(Classification):
    """Another task of the same settings."""


class Points(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = points(32)

    def __len__(self) -> int:
        return 32


class Transformed(Points):
    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.x[i]), self.y[i]


class Late(Dataset[Any]):
    """Differs in its last sample."""

    def __init__(self, shift: float) -> None:
        self.x, self.y = points(32)
        self.x[31] += shift

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def late(shift: float = 0.0) -> list[Any]:
    """Batches, of which the last one is shifted."""
    *first, (x, y) = cut(points(32), 8)
    return [*first, (x + shift, y)]


def relabeled(batches: DataLoader[Any]) -> DataLoader[Any]:
    x, y = batches.dataset.tensors  # pyright: ignore[reportAttributeAccessIssue]
    return DataLoader(TensorDataset(x, torch.cat((y[:-1], 1 - y[-1:]))), batch_size=8)


Options = Callable[[], dict[str, Any]]
# what differs -> (how it is called, options of the run in the folder, those of the other)
OTHERS: dict[str, tuple[str, Options, Options]] = {
    "samples of a loader": ("training data", dict, lambda: {"batches": loader(seed=4)}),
    "a list of batches": (
        "training data",
        lambda: {"batches": cut(points(32), 8)},
        lambda: {"batches": cut(points(32, seed=4), 8)},
    ),
    "length of a loader": ("training loader", lambda: {"steps": 6}, lambda: {"steps": 6, "batches": loader(n=40)}),
    "drop_last": ("training loader", lambda: {"steps": 6, **pixels()}, lambda: {"steps": 6, **pixels(drop_last=True)}),
    "augmentation": ("training loader", pixels, lambda: pixels(flip=True)),
    "images": ("data", pixels, lambda: pixels(4)),
    "transforms": (
        "training data",
        lambda: {"batches": DataLoader(Transformed(torch.sin), batch_size=8)},
        lambda: {"batches": DataLoader(Transformed(torch.cos), batch_size=8)},
    ),
    "evaluation": (
        "evaluation data",
        lambda: {"validation": loader(1)},
        lambda: {"validation": loader(1, n=40)},
    ),
    "a late batch": ("data", lambda: {"batches": late()}, lambda: {"batches": late(1.0)}),
    "late labels": ("data", lambda: {"batches": loader()}, lambda: {"batches": relabeled(loader())}),
    "a sample of a data set": (
        "data",
        lambda: {"batches": DataLoader(Late(0.0), batch_size=8)},
        lambda: {"batches": DataLoader(Late(1.0), batch_size=8)},
    ),
    "labels of a test split": ("data", lambda: {"test": loader(1)}, lambda: {"test": relabeled(loader(1))}),
    "no schedule": ("schedule", dict, lambda: {"schedule": cosine}),
    "schedule": ("schedule", lambda: {"schedule": lambda p: 1.0 - p}, lambda: {"schedule": cosine}),
    "task": ("task", dict, lambda: {"task": Halved()}),
    "weights": ("initial weights", dict, lambda: {"student": student_net(seed=9)}),
    "optimizer": (
        "optimizer",
        lambda: {"optimizer": partial(torch.optim.Adam, lr=0.01)},
        lambda: {"optimizer": partial(torch.optim.Adamax, lr=0.01)},
    ),
}


@each("what", OTHERS)
def test_another_run_is_refused_by_name(what: str, tmp_path: Path) -> None:
    words, first, second = OTHERS[what]
    run(tmp_path / "finished", **first())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "interrupted", **first(), on_step=stop_at(5), checkpoint_every=2)
    for folder in ("finished", "interrupted"):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
        with pytest.raises(
            ValueError, match=rf"holds another run: .*its {words}.* was .*, now it is .*Give another out="
        ):
            run(tmp_path / folder, **second())
        assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before


def test_a_finished_run_is_read_and_said_to_be_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = student_net()
    first = run(tmp_path, validation=loader(1), quiet=False, student=student)
    assert first.how == "new"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    for again in (student, student_net()):  # the object that was trained, or another with the same initial weights
        second = run(tmp_path, validation=loader(1), quiet=False, student=again, on_step=stop_at(0))
        said = capsys.readouterr().out
        assert "finished run, nothing was trained; validation " in said and f"(last epoch {EPOCHS}" in said
        assert second.how == "finished" and second.facts == json.loads((tmp_path / "facts.json").read_text())
        assert second.epochs == first.epochs and torch.equal(weights(second.student), weights(first.student))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, "nothing is written"
    for path in (tmp_path / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(ValueError, match="holds a finished run without checkpoints"):
        run(tmp_path, validation=loader(1))


def test_the_run_of_an_earlier_version_is_resumed_or_refused(tmp_path: Path) -> None:
    """Its key has fewer names, and its checkpoints know nothing of the records."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=stop_at(7), checkpoint_every=3)
    newest = max((tmp_path / "checkpoints").iterdir())
    state = checkpoint.load(tmp_path / "checkpoints")
    assert state is not None
    old = ("method", "teacher", "student", "data", "optimizer", "total_steps", "world", "seed", "accumulate", "clip")
    state["key"] = json.dumps({name: json.loads(state["key"])[name] for name in (*old, "precision")})
    del state["at"]["length"]
    checkpoint.save(tmp_path / "checkpoints", int(newest.name[5:]), state)
    with pytest.raises(ValueError, match="holds another run: its seed was 0, now it is 1"):
        run(tmp_path, seed=1)
    assert run(tmp_path).how == "resumed"
    run(tmp_path / "straight")
    assert left_weights(tmp_path) == left_weights(tmp_path / "straight")


def left_weights(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


# extended


def test_a_finished_run_is_extended_and_recorded_as_such(tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "extended"
    run(straight, epochs=6, validation=loader(1))
    run(out, epochs=4, validation=loader(1))
    with pytest.raises(
        ValueError, match=r"its total_steps was 16, now it is 24\..* extend=True \(--extend\) continues"
    ):
        run(out, epochs=6, validation=loader(1))
    with pytest.raises(KeyboardInterrupt):  # a call that is killed
        run(out, epochs=6, validation=loader(1), extend=True, on_step=stop_at(21))
    longer = run(out, epochs=6, validation=loader(1), extend=True)
    assert longer.how == "resumed" and longer.facts["extended"] == [{"from_steps": 16, "to_steps": 24, "epoch": 4}]
    assert longer.facts["result"]["steps"] == 24 and [line["epoch"] for line in longer.epochs] == [1, 2, 3, 4, 5, 6]
    assert left_weights(out) == left_weights(straight), "nothing of this run depends on its length"
    assert run(out, epochs=6, validation=loader(1), extend=True).how == "finished"
    with pytest.raises(ValueError, match=r"holds a run of 24 steps, and extend=True .* continues it to more; got 8\."):
        run(out, epochs=2, validation=loader(1), extend=True)
    with pytest.raises(ValueError, match="holds another run: its seed was 0"):
        run(out, epochs=8, validation=loader(1), extend=True, seed=1)


def test_only_a_finished_run_is_extended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=8, on_step=stop_at(6), checkpoint_every=2)
    with pytest.raises(ValueError, match=r"a run that is not finished, and extend=True .* total_steps 8"):
        run(tmp_path, steps=12, extend=True)
    run(tmp_path, steps=8)
    assert run(tmp_path, steps=12, extend=True).how == "extended"


# generators of random numbers


class Rolled(Points):
    """Samples that are moved by generators of the data set's own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.rng = generator

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        draw = self.rng.random()
        return self.x[i] + 0.3 * float(draw), self.y[i]


class Drawn(torch.Generator):
    def random(self) -> Tensor:
        return torch.rand((), generator=self)


GENERATED: dict[str, Callable[[], Any]] = {
    "loader": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "batch sampler": lambda: DataLoader(
        TensorDataset(*points(32)),
        batch_sampler=BatchSampler(RandomSampler(range(32), generator=torch.Generator().manual_seed(3)), 8, False),
    ),
    "numpy": lambda: DataLoader(Rolled(np.random.default_rng(3)), batch_size=8),
    "numpy's old one": lambda: DataLoader(Rolled(np.random.RandomState(3)), batch_size=8),
    "random": lambda: DataLoader(Rolled(random.Random(3)), batch_size=8),
    "torch": lambda: DataLoader(Rolled(Drawn().manual_seed(3)), batch_size=8),
}


@each("kind", GENERATED)
def test_two_runs_with_one_loader_are_equal_and_so_is_one_that_is_resumed(kind: str, tmp_path: Path) -> None:
    batches = GENERATED[kind]()
    first, second = (run(None, batches=batches) for _ in range(2))
    assert torch.equal(weights(first.student), weights(second.student))
    student = student_net()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batches=batches, student=student, on_step=stop_at(6), checkpoint_every=1)
    resumed = run(tmp_path, batches=batches, student=student)  # the object that was partly trained
    assert resumed.how == "resumed" and torch.equal(weights(first.student), weights(resumed.student))


def test_augmentation_without_a_seed_is_resumed_and_other_labels_are_not(tmp_path: Path) -> None:
    def unseeded(flip: bool = False) -> DataLoader[Any]:
        data = Rolled(np.random.default_rng())
        data.y = data.y.flip(0) if flip else data.y
        return DataLoader(data, batch_size=8)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batches=unseeded(), on_step=stop_at(6), checkpoint_every=1)
    with pytest.raises(ValueError, match="its training data"):
        run(tmp_path, batches=unseeded(flip=True))
    assert run(tmp_path, batches=unseeded()).how == "resumed"


# epochs


class Said(IterableDataset[Any]):
    """Six batches of data, and a length that is said."""

    def __init__(self, said: int) -> None:
        self.said = said

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*points(48), strict=True))


class Listed:
    """The same as a loader that is no DataLoader."""

    def __init__(self, said: int) -> None:
        self.said = said // 8

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[Any]:
        return iter(cut(points(48), 8))


@each("said, kind", [(said, kind) for said in (24, 48, 96) for kind in ("DataLoader", "Listed")])
def test_an_epoch_is_a_pass_whatever_the_loader_s_length(said: int, kind: str, tmp_path: Path) -> None:
    def batches() -> Any:
        return Listed(said) if kind == "Listed" else DataLoader(Said(said), batch_size=8)

    seen: list[float] = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1.0

    def train(out: Path | None, **more: Any) -> Run:
        return run(out, batches=batches(), epochs=2, **more)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = train(None, schedule=schedule)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, on_step=stop_at(9), checkpoint_every=1)
        resumed = train(tmp_path)
    words = rf"{kind} has the length {said // 8}, .* and epoch 1 had 6\. An epoch is one pass"
    assert len([w for w in told if re.match(words, str(w.message))]) == 2 * (said != 48), "of the two that had epoch 1"
    assert done.facts["result"]["steps"] == 12 and done.last["epoch"] == 2
    assert seen == sorted(seen) and seen[6] == 0.5 and seen[-1] < 1.0
    assert torch.equal(weights(resumed.student), weights(done.student))


def test_a_loader_without_an_end_is_refused_with_epochs() -> None:
    class Endless(Listed):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from cut(points(8), 8)

    with pytest.raises(ValueError, match=r"has the length 1, and has yielded \d+ batches .* give steps= instead"):
        run(None, batches=Endless(8), epochs=1)


# what is said


class Scripted(Classification):
    """Scores that were written beforehand."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.script = list(values)

    def score(self, student: nn.Module, batches: Any, *, teacher: Any = None) -> dict[str, float]:
        return {"accuracy": self.script.pop(0)}


@each(
    "values, said",
    [
        (
            (0.2, 0.5, 0.4),
            "validation 40.00 % (last epoch 3); validation 50.00 % (best epoch 2 by validation accuracy)",
        ),
        ((0.2, 0.3, 0.4), "validation 40.00 % (last epoch 3, also the best by validation accuracy)"),
        ((), "no scores (last epoch 3)"),
    ],
)
def test_best_and_last_are_told_apart(
    values: tuple[float, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, task=Scripted(*values), validation=loader(1) if values else None)
    _print_result(done)
    assert capsys.readouterr().out.startswith(f"KD, seed 0: {said}; ")
    result = json.loads((tmp_path / "facts.json").read_text())["result"]
    assert result["last"]["epoch"] == EPOCHS
    assert (result["best"] or {}).get("epoch") == (1 + values.index(max(values)) if values else None)


def test_a_folder_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        OSError, match=r"cannot lock .*: its file system has no file locks .* Write to a folder on a local"
    ):
        run(tmp_path)


def test_other_versions_are_said_and_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=stop_at(6), checkpoint_every=2)
    facts = json.loads((tmp_path / "facts.json").read_text())
    facts["versions"]["torch"] = "2.9.0"
    del facts["sha256"]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match=r"began under torch 2\.9\.0, so it may not end with the bits"):
        assert run(tmp_path).facts["earlier_versions"] == [facts["versions"]]


class Written:
    """Batches that something writes, and says how it went; their batches are those of another loader."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.count = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.count += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self.count = 0

    def report(self) -> dict[str, float]:
        return {"length": 7.0, "acceptance": self.count / 4}


def test_statistics_of_written_texts_are_recorded(tmp_path: Path) -> None:
    written = run(tmp_path, batches=Written(loader()), validation=loader(1))
    steps = read_json_lines(tmp_path / "steps.jsonl")
    assert [line["rollout"]["acceptance"] for line in steps] == [0.25, 0.5, 0.75, 1.0] * EPOCHS
    assert [line["rollout"] for line in written.epochs] == [{"length": 7.0, "acceptance": 1.0}] * EPOCHS
    run(tmp_path / "plain")
    assert not any("rollout" in line for line in read_json_lines(tmp_path / "plain" / "steps.jsonl"))
    with pytest.raises(ValueError, match="its training data"):
        run(tmp_path, batches=Written(loader(4)), validation=loader(1))
