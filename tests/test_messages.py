"""Bad input, as a user meets it: on the command line and in ``distill``. What each part refuses is in its own tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempering as kd
from tempering.cli import main as cli
from tempering.data import Batches
from tempering.methods import DIST, DKD, DTKD, KD, TTM, Method, Supervised
from tempering.models import build
from tempering.teachers import Cached, Live, Teacher, record
from tempering.training.checkpoint import save_weights
from tempering.training.selfcheck import SelfCheckError
from tests.paths import ROOT
from tests.test_cifar import write_packed

CIFAR = ROOT / "tempering" / "recipes" / "cifar100.py"
DIGITS = ROOT / "tempering" / "recipes" / "digits.py"
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Said(Teacher):
    """A teacher that answers what it is told to."""

    identity = "said"

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.answer = answer

    def __call__(self, inputs: Any, ids: Tensor | None) -> Tensor:
        return self.answer(inputs)


def knowing(x: Tensor) -> Tensor:
    return 6.0 * x[:, :3]


def go(batches: Any = ((X, Y),), *, teacher: Any = None, student: nn.Module | None = None, **more: Any) -> Any:
    taught = Said(knowing) if teacher is None else teacher
    settings: dict[str, Any] = {"method": KD(), "steps": 2, "quiet": True} | more
    return kd.distill(nn.Linear(6, 3) if student is None else student, taught, list(batches), **settings)


def run(*args: object) -> int:
    return cli.main([str(a) for a in args])


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A thousand made-up images in the project's own format."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    write_packed(folder)
    return folder


# in distill


@pytest.mark.parametrize("selfcheck", [True, False])
def test_mismatched_classes(selfcheck: bool) -> None:
    text = r"the student has 3 classes and the teacher 4\. Give both heads the same .*models.build\(name, classes=4\)"
    with pytest.raises(ValueError, match=text):
        go(teacher=nn.Linear(6, 4), selfcheck=selfcheck)


def test_labels_out_of_range() -> None:
    with pytest.raises(SelfCheckError, match=r"label 3 is out of range for 3 classes \(the first is 0\)\. Is the"):
        go([(X, Y + 1)])
    with pytest.raises(
        ValueError, match=r"cross_entropy: label 3 is out of range .* count from 0 to 2\)\. .*start at 1"
    ):
        go([(X, Y + 1)], selfcheck=False)
    with pytest.raises(ValueError, match=r"DKD: label 7 is out of range for 3 classes"):
        go([(X, Y), (X, Y * 0 + 7)], method=DKD())  # past the batch that the self-check sees


def test_nan_in_the_teachers_logits(tmp_path: Path) -> None:
    broken = Said(lambda x: knowing(x).index_fill(0, torch.tensor([5]), torch.nan))
    with pytest.raises(SelfCheckError, match=r"teacher's logits hold NaN or infinity \(first in row 5 of the first"):
        go(teacher=broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1: the teacher's logits hold NaN or inf"):
        go(teacher=broken, selfcheck=False)
    data = Batches(torch.zeros(24, 1, 2, 3, dtype=torch.uint8), Y, mean=[0.5], std=[0.5], batch_size=8)
    with pytest.raises(ValueError, match=r"the teacher's logits contain NaN in row 0"):
        record(Said(lambda x: torch.full((len(x), 3), torch.nan)), data, tmp_path / "cache", quiet=True)


def test_a_teacher_that_requires_grad() -> None:
    net = nn.Linear(6, 3, bias=False)
    net.weight.data.copy_(6 * torch.eye(3, 6))
    text = r"the teacher's logits require grad, so the teacher would be trained\. Wrap it in teachers.Live\(model\)"
    for selfcheck in (True, False):
        with pytest.raises(ValueError, match=text):
            go(teacher=Said(lambda x: net(x) * 1.0), selfcheck=selfcheck)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ((X, Y.float()), r"needs class indices as target, an integer tensor, or soft labels .*; got torch.float32"),
        ((X, nn.functional.one_hot(Y, 3)), r"needs target of shape \(N,\) = \(24,\); got \(24, 3\)"),
        ((X, Y, Y, Y), r"needs batches of \(inputs, labels\), then ids .* got \(24,\) torch.int64 as part 3"),
        ([X], r"needs batches of \(inputs, labels\)"),
    ],
)
def test_wrong_batches(batch: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        go([batch])


def test_wrong_answers() -> None:
    with pytest.raises(
        ValueError, match=r"needs floating point logits; got student torch.float32 and teacher torch.int64"
    ):
        go(teacher=Said(lambda x: knowing(x).long()))
    with pytest.raises(
        ValueError, match=r"the teacher must return \(N, C\) logits for classification; got \(24, 3, 1\)"
    ):
        go(teacher=Said(lambda x: knowing(x)[:, :, None]))
    with pytest.raises(ValueError, match=r"the student must return \(N, C\) logits"):
        go(student=Listed())


class Listed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, input: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [super().forward(input), super().forward(input)]


@pytest.mark.parametrize("method", [Supervised(), KD(), DTKD(), DKD(), DIST(), TTM()], ids=lambda m: type(m).__name__)
def test_an_empty_batch_is_no_fault(method: Method) -> None:
    """A filter may leave a batch with no rows."""
    losses: list[float] = []
    done = go(
        [(X, Y), (X[:0], Y[:0])], method=method, steps=4, on_step=lambda step, loss: losses.append(float(loss.detach()))
    )
    assert losses[1] == losses[3] == 0.0 != losses[0]
    assert all(p.isfinite().all() for p in done.student.parameters())
    go([(X[:0], Y[:0]), (X, Y)], method=method)
    with pytest.raises(SelfCheckError, match=r"nothing can be learned here: .* is 0 on the first batch. .* no rows"):
        go([(X[:0], Y[:0])], method=method)


def test_an_empty_loader() -> None:
    with pytest.raises(ValueError, match=r"the training loader yields no batches. Is the data set empty"):
        go([])
    with pytest.raises(ValueError, match=r"the loader yields no batches"):
        go(test=[])


def test_a_cache_for_other_batches_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def images(seed: int, **augmented: Any) -> Batches:
        torch.manual_seed(seed)
        return Batches(
            torch.randint(256, (24, 1, 2, 3), dtype=torch.uint8), Y, mean=[0.5], std=[0.5], batch_size=8, **augmented
        )

    net, data = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), images(0)
    record(Live(net), data, tmp_path / "cache", quiet=True)
    cache = Cached(tmp_path / "cache")
    student = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    how: dict[str, Any] = {"method": KD(), "steps": 2, "quiet": True, "selfcheck": False}
    kd.distill(student, cache, data, **how)
    with pytest.raises(ValueError, match=r"cache contains outputs for other data: .* or record again"):
        kd.distill(student, cache, images(1), **how)
    with pytest.raises(ValueError, match=r"cache contains outputs for clean images, .* are augmented: .*clean=True\)"):
        kd.distill(student, cache, images(0, flip=True), **how)
    kd.distill(student, Cached(tmp_path / "cache", clean=True), images(0, flip=True), **how)


# on the command line


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--method=dtkdd",), "error: no method is called 'dtkdd'. Did you mean 'dtkd'?"),
        (("--method=kd(sotf=1)",), "error: KD has no argument 'sotf'. Did you mean 'soft'?"),
        (
            ("--method=kd(temperature=sharpnes)",),
            "no temperature policy is called 'sharpnes'. Did you mean 'sharpness'?",
        ),
        (("--method=dtkd(temperature=sharpness(4, solve=exactly))",), "'exactly'"),
        (("--method=kd(soft=-1)",), "error: KD needs soft >= 0 and finite; got -1."),
        (("--method=dtkd(warmup=20)",), "the share of the run (20 of 240 epochs is warmup=20/240); got 20."),
        (("--method=kd(",), "cannot be parsed"),
        (("--student=resnet8x44",), "no net is called 'resnet8x44'. Did you mean 'resnet8x4'?"),
        (("--epochs=0",), "epochs must be 1 or more; got 0."),
        (("--temperature=warm",), "no temperature policy is called 'warm'."),
    ],
)
def test_a_flag_with_a_value_that_there_is_not(
    flags: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the recipe is on scikit-learn's digits")
    assert run("run", DIGITS, "--quiet", "--teacher-epochs=1", "--out", tmp_path / "a" / "r", *flags) == 1
    said = capsys.readouterr().err
    assert text in said and said.startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--metod", "--method"), ("--teacher-weight", "--teacher-weights"), ("--sede", "--seed")],
)
def test_a_mistyped_flag_of_a_recipe_names_the_nearest(
    flag: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("run", CIFAR, "--data=nowhere", f"{flag}=1")
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"Unrecognized options: {flag}" in said and f"Perhaps you meant: {near} " in said


def test_a_data_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", CIFAR, "--data", tmp_path / "nowhere", "--quiet") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and f"{tmp_path / 'nowhere'}: it is not there" in said and "curl -LO" in said
    assert run("check", CIFAR, "--data", tmp_path) == 1
    assert "holds none of these" in capsys.readouterr().err
    assert run("report", tmp_path / "nowhere") == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_weights_of_a_teacher_that_cannot_be_used(cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = cifar.parent / "teacher.safetensors"
    how = ["--data", cifar, "--teacher", "resnet8", "--student", "resnet8", "--epochs=1", "--quiet", "--threads=1"]

    def said(path: Path = place) -> str:
        assert run("run", CIFAR, *how, "--out", cifar.parent / "r", "--teacher-weights", path) == 1
        out = capsys.readouterr().err
        assert out.startswith("error: ") and "Traceback" not in out
        return out

    assert f"there are no weights at {place}. A finished run leaves student.safetensors." in said()
    net = build("resnet8", classes=100)
    save_weights(place, net.state_dict())
    whole = place.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5], b"", b"\x80\x04 a pickle"):
        place.write_bytes(broken)
        assert f"{place} is not a valid safetensors file" in said() and not (cifar.parent / "r").exists()
    save_weights(place, build("resnet8", classes=10).state_dict())
    assert "does not hold the weights of this" in (out := said()) and "is (10, 64) and should be (100, 64)" in out
    save_weights(place, build("resnet14", classes=100).state_dict())
    assert "is not in the net" in said()
    nan = {name: value * torch.nan if value.is_floating_point() else value for name, value in net.state_dict().items()}
    save_weights(place, nan)
    assert "head.bias has values that are NaN, so its training diverged" in said()


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    from tempering.training.run_dir import lock_run_dir

    refused = pytest.raises(ValueError, match=r"another process is writing to .*run. Wait for it, or give another out=")
    with lock_run_dir(tmp_path / "run"), refused, lock_run_dir(tmp_path / "run"):
        raise AssertionError("held twice")
    with lock_run_dir(tmp_path / "run"):
        assert (tmp_path / "run").is_dir(), "given back"


@pytest.mark.parametrize("command", [("compare", "--methods=kd"), ("tune", "--method=kd", "--trials=1")])
def test_a_mistyped_flag_behind_starts_nothing(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert run(command[0], DIGITS, *command[1:], "--out", out, "--", "--epohs=1") == 1
    assert "takes no --epohs. Did you mean 'epochs'?" in capsys.readouterr().err
    assert not out.exists()


def test_a_control_that_is_no_arm_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    assert run("compare", DIGITS, "--methods=kd", "--control=dkt", "--out", out) == 1
    assert "no method is called 'dkt'" in capsys.readouterr().err
    assert not out.exists()
