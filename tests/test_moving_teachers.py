"""Teachers made of students: the mean teacher, a second student, and generations."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tempering.experiments.generations import run_generations
from tempering.methods import KD, Interactive, Mutual
from tempering.rows import Rows, total
from tempering.teachers import Ensemble, Live, MeanTeacher
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment
from tests.runs import SGD, cut, flattened, go, identical, images, left, points, stop_at, student_net, teacher_net
from tests.runs import weights as weights_of

X64 = cut(points(60, dtype=torch.float64), 20)


@pytest.mark.parametrize("ramp", [True, False])
def test_a_mean_teacher_is_its_definition(ramp: bool) -> None:
    """The loss and weights of a loop by hand, with a normalization whose statistics are averaged too."""
    teacher, student = MeanTeacher(0.7, ramp=ramp), student_net(norm=True).double()
    model, method = copy.deepcopy(student), KD(hard=0.5)
    run = go(X64, student=student, teacher=teacher, method=method, epochs=2, selfcheck=False)
    average, optimizer = copy.deepcopy(model).eval(), SGD(model.parameters())
    for n, (x, y) in enumerate(X64 * 2, start=1):
        rows = Rows(model(x), average(x).detach(), y)
        total(method(rows, n / 6), rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        d = min(0.7, 1 - 1 / (n + 1)) if ramp else 0.7
        for a, w in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            a.copy_(d * a + (1 - d) * w if a.is_floating_point() else w)
    torch.testing.assert_close(weights_of(run.student), weights_of(model), rtol=1e-9, atol=1e-12)
    assert teacher.model is not None and not teacher.model.training
    for a, b in zip(teacher.model.state_dict().values(), average.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_mean_teacher_starts_anew_in_every_run() -> None:
    teacher = MeanTeacher(0.7)
    first, second = (go(X64, student=student_net().double(), teacher=teacher, epochs=2) for _ in range(2))
    assert torch.equal(weights_of(first.student), weights_of(second.student))
    assert first.facts["selfcheck"]["checks"]["above chance"] == "the teacher is not trained yet"


def test_a_mean_teacher_of_steps_not_of_batches() -> None:
    """Two micro-batches of a step are one update."""
    runs = []
    for parts, more in (
        (cut(points(48, dtype=torch.float64), 16), {}),
        (cut(points(48, dtype=torch.float64), 8), {"accumulate": 2}),
    ):
        teacher = MeanTeacher(0.9)
        run = go(parts, student=student_net().double(), teacher=teacher, epochs=2, selfcheck=False, **more)
        assert teacher.state is not None and int(teacher.state.steps) == 6  # pyright: ignore
        runs.append((weights_of(run.student), weights_of(teacher.model)))  # pyright: ignore[reportArgumentType]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_mean_teacher_in_an_ensemble() -> None:
    """With a fixed teacher of no weight it is alone."""
    runs = []
    for make in (lambda t: t, lambda t: Ensemble([t, teacher_net(torch.float64)], weights=[1, 0])):
        teacher = MeanTeacher(0.9)
        run = go(X64, student=student_net().double(), teacher=make(teacher), epochs=2, selfcheck=False)
        runs.append((weights_of(run.student), weights_of(teacher.model)))  # pyright: ignore[reportArgumentType]
    assert identical(*runs)


def test_what_a_mean_teacher_refuses() -> None:
    with pytest.raises(ValueError, match=r"needs decay in \[0, 1\)"):
        MeanTeacher(1.0)
    with pytest.raises(RuntimeError, match="has no student yet"):
        MeanTeacher()(X64[0][0])
    with pytest.raises(ValueError, match="would be lost to rounding"):
        go(X64, student=student_net().bfloat16(), teacher=MeanTeacher(), epochs=1)
    for teacher in (MeanTeacher(), Ensemble([MeanTeacher(), teacher_net(torch.float64)])):
        with pytest.raises(ValueError, match="strategy='fsdp' shards"):
            go(X64, student=student_net().double(), teacher=teacher, epochs=1, strategy="fsdp")


def moving(kind: str) -> tuple[Any, Any]:
    """A teacher and a method."""
    if kind == "mutual":
        return flattened(student_net(norm=True, dropout=0.2, seed=9)), Mutual()
    teacher = MeanTeacher(0.9)
    return (teacher if kind == "mean" else Ensemble([teacher, flattened(teacher_net())])), KD()


@pytest.mark.parametrize("kind", ["mean", "ensemble", "mutual"])
def test_stopped_and_resumed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def run(out: Path, **more: Any) -> Any:
        teacher, method = moving(kind)
        settings = {"steps": 20, "checkpoint_every": 3, "validation": images().clean(), "selfcheck": False} | more
        student = flattened(student_net(dropout=0.3, norm=True))
        return go(images(), student=student, teacher=teacher, method=method, out=out, **settings)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_step=stop_at(11))
    assert run(tmp_path / "stopped").how == "resumed"
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))
    state = left(tmp_path / "whole")["state"]
    assert any("peer" in name for name in state["method"]) if kind == "mutual" else "teacher" in state


# two students


def test_mutual_is_its_definition() -> None:
    """Both students, by hand: the two losses, each with the other's logits as constants, and rows without a label."""
    (x, y), peer, student = (
        points(40, dtype=torch.float64),
        student_net(norm=True, seed=7).double(),
        student_net().double(),
    )
    y[:4] = -100
    by_hand = [copy.deepcopy(student), copy.deepcopy(peer)]
    parts, method = cut((x, y), 20), Mutual(soft=0.7, hard=0.4)
    run = go(parts, student=student, teacher=peer, method=method, epochs=3, selfcheck=False)
    optimizer = SGD([p for net in by_hand for p in net.parameters()])
    for part, labels in parts * 3:
        z = [net(part) for net in by_hand]
        loss = 0.0
        for own, other in (z, z[::-1]):
            logp, q = own.log_softmax(-1), other.detach().softmax(-1)
            loss = loss + 0.7 * (q * (q.log() - logp)).sum(-1).mean()
            loss = loss + 0.4 * nn.functional.cross_entropy(own, labels, reduction="none", ignore_index=-100).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(run.student), weights_of(by_hand[0]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights_of(method.peer), weights_of(by_hand[1]), rtol=1e-9, atol=1e-12)  # pyright: ignore
    assert method.peer is peer


def test_mutual_is_symmetric_and_may_be_split() -> None:
    parts = cut(points(48, dtype=torch.float64), 16)
    nets = [student_net(seed=i).double() for i in (1, 7)]

    def both(parts: Any, first: int, **more: Any) -> list[Any]:
        student, peer = copy.deepcopy(nets[first]), copy.deepcopy(nets[1 - first])
        go(parts, student=student, teacher=peer, method=Mutual(), epochs=2, selfcheck=False, **more)
        return [weights_of(student), weights_of(peer)]

    whole = both(parts, 0)
    for other in (both(parts, 1)[::-1], both(cut(points(48, dtype=torch.float64), 8), 0, accumulate=2)):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_mutual_refuses() -> None:
    for teacher in (Live(teacher_net(), precision="bf16"), Live(teacher_net(), fuse_conv_bn=True)):
        with pytest.raises(ValueError, match="a fused or a half-precision copy"):
            go(cut(points(20), 10), teacher=teacher, method=Mutual(), epochs=1)
    with pytest.raises(RuntimeError, match="has no peer"):
        Mutual().step(None)  # pyright: ignore[reportArgumentType]


# generations


def chain(folder: Path, number: int, **more: Any) -> Experiment:
    config = TrainConfig(epochs=2, seed=number, checkpoint_every=2, log_every=1, quiet=True, accelerator="cpu")
    student, teacher = student_net(seed=number), teacher_net()
    parts = cut(points(60), 20)
    return Experiment(
        student=student, teacher=teacher, train=parts, method=KD(), config=config, optimizer=SGD,
        out=folder / str(number), **more,
    )  # fmt: skip


def test_generations_teach_the_next_one_and_resume(tmp_path: Path) -> None:
    whole = run_generations(partial(chain, tmp_path / "whole"), 3)
    assert [run.facts["generation"] for run in whole] == [1, 2, 3]
    assert [run.facts["teacher"]["identity"] for run in whole[1:]] == [
        Live(copy.deepcopy(run.student), normalization="data").identity for run in whole[:-1]
    ]
    alone = go(cut(points(60), 20), student=student_net(seed=2), teacher=whole[0].student, epochs=2, seed=2)
    assert torch.equal(weights_of(alone.student), weights_of(whole[1].student))

    def broken(number: int) -> Experiment:
        return chain(tmp_path / "again", number, **({"on_step": stop_at(4)} if number == 2 else {}))

    with pytest.raises(KeyboardInterrupt):
        run_generations(broken, 3)
    again = run_generations(partial(chain, tmp_path / "again"), 3)
    assert [run.how for run in again] == ["finished", "resumed", "new"]
    assert all(torch.equal(weights_of(a.student), weights_of(b.student)) for a, b in zip(whole, again, strict=True))
    shutil.rmtree(tmp_path / "again")
    with pytest.raises(ValueError, match="generations >= 1"):
        run_generations(partial(chain, tmp_path), 0)
    with pytest.raises(ValueError, match="has the folder of an earlier one"):
        run_generations(lambda _: chain(tmp_path / "again", 1), 2)


def test_generations_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tempering.cli.main import main

    command = ["run", "digits", "--method", "kd", "--generations", "2", "--epochs", "1", "--teacher-epochs", "1"]
    command += ["--subset", "128", "--seed", "5", f"--out={tmp_path}/born", "--no-selfcheck", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "seed 5" in said and "seed 6" in said
    assert (tmp_path / "born" / "generation-2" / "student.safetensors").is_file()
    assert main(["run", "digits", "--method", "supervised", "--generations", "2", f"--out={tmp_path}/none"]) == 1


def test_a_mean_teacher_that_is_there_twice_is_updated_once() -> None:
    runs = []
    for make in (lambda t: t, lambda t: Ensemble([t, Ensemble([t, t])])):
        teacher = MeanTeacher(0.9)
        run = go(X64, student=student_net().double(), teacher=make(teacher), epochs=2, selfcheck=False)
        runs.append((weights_of(run.student), weights_of(teacher.model)))  # pyright: ignore[reportArgumentType]
    for one, twice in zip(*runs, strict=True):
        torch.testing.assert_close(one, twice, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [Mutual(), Interactive()])
def test_one_of_several_teachers_is_not_trained_alone(method: Any) -> None:
    with pytest.raises(ValueError, match="trains one network as the teacher, and Ensemble has 2"):
        go(
            X64,
            student=student_net().double(),
            teacher=Ensemble([student_net(), student_net()]),
            method=method,
            epochs=1,
        )
