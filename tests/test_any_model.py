"""Batches, outputs, optimizers and normalizations of other people: understood, or refused with what to write."""

from __future__ import annotations

import collections
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from tempering import distill
from tempering.data import Batches
from tempering.data.batches import labeled_batch
from tempering.methods import AT, CWD, DKD, DTKD, KD, FitNet, Sum, Supervised
from tempering.methods.base import Method
from tempering.rows import Rows, total
from tempering.tasks import Classification
from tempering.teachers import Ensemble, Live
from tempering.temperature import Sharpness, Static
from tests.cases import each

torch.manual_seed(0)
X, Y = torch.randn(32, 8), torch.arange(32) % 4
X = X + 2.0 * nn.functional.one_hot(Y, 8)
IDS, WEIGHTS, PATHS = torch.arange(32), torch.rand(32), [f"{i}.png" for i in range(32)]


class Sample(NamedTuple):
    """A batch as some loaders yield it."""

    image: Tensor
    label: Tensor
    path: list[str]


class Other(NamedTuple):
    """Fields whose names say nothing."""

    a: Tensor
    b: Tensor


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def trained() -> nn.Module:
    teacher = net(1)
    distill(teacher, None, [(X, Y)], method=Supervised(), steps=40, quiet=True)
    return teacher


def run(batches: list[Any], **options: Any) -> list[Tensor]:
    """The weights of a student after two epochs."""
    student = net()
    options = {"method": KD(), "epochs": 2, "test": batches, "quiet": True} | options
    distill(student, trained(), batches, **options)
    return list(student.state_dict().values())


def batch_forms() -> dict[str, Any]:
    """Batches with the same inputs and labels, name -> (batch, ids, weight)."""
    encoding = collections.UserDict(x=X, labels=Y)
    return {
        "named tuple": (Sample(X, Y, PATHS), None, None),
        "other named tuple": (Other(X, Y), None, None),
        "list": ([X, Y], None, None),
        "paths": ((X, Y, PATHS), None, None),
        "ids": ((X, Y, IDS), IDS, None),
        "ids and paths": ((X, Y, PATHS, IDS.int()), IDS.int(), None),
        "ones": ((X, Y, torch.ones(32)), None, torch.ones(32)),
        "dict": ({"image": X, "label": Y}, None, None),
        "dict of everything": (
            {"x": X, "y": Y, "id": IDS, "weight": torch.ones(32), "path": PATHS},
            IDS,
            torch.ones(32),
        ),
        "user dict": (encoding, None, None),
    }


@each("name", batch_forms())
def test_batches_of_other_forms_train_as_pairs_do(name: str) -> None:
    batch, ids, weight = batch_forms()[name]
    parts = labeled_batch(batch)
    for got, want in zip(parts, (X, Y, ids, weight), strict=True):
        assert got is None if want is None else torch.equal(got, want)
    for got, want in zip(run([batch]), run([(X, Y)]), strict=True):
        torch.testing.assert_close(got, want)


def test_weights_are_weights_of_samples_and_never_ids() -> None:
    """A sample of weight 2 counts as two; one of weight 0 does not count, whatever the split of the step."""
    task, twice = Classification(), torch.cat((torch.ones(16), torch.full((8,), 2.0), torch.zeros(8)))
    rows = task.rows(net()(X), None, (X, Y, twice))[0]
    whole = torch.cat((torch.arange(24), torch.arange(16, 24)))
    repeated = task.rows(net().eval()(X[whole]), None, (X[whole], Y[whole]))[0]
    weighted = task.rows(net().eval()(X), None, {"x": X, "y": Y, "weight": twice})[0]
    assert rows.ids is None and torch.equal(rows.weight, twice) and task.row_weights((X, Y, twice))["logits"] == 32.0
    torch.testing.assert_close(total(KD()(weighted), weighted), total(KD()(repeated), repeated))
    halves = [(X[i : i + 16], Y[i : i + 16], twice[i : i + 16]) for i in (0, 16)]

    class Plain(nn.Sequential):
        """Without batch normalization, which sees the split."""

    def weights(batches: list[Any], accumulate: int) -> Tensor:
        torch.manual_seed(0)
        student = Plain(nn.Linear(8, 4))
        distill(student, trained(), batches, method=KD(), steps=3, accumulate=accumulate, quiet=True)
        return student[0].weight.detach()

    torch.testing.assert_close(weights(halves, 2), weights([(X, Y, twice)], 1))


@each(
    "batch, text",
    [
        ({"image": X, "class": Y}, r"got dict with 'image', 'class'\. For a DataLoader: loader\.collate_fn = "),
        ((X, Y, torch.ones(32, 2)), r"got \(32, 2\) torch\.float32 as part 2.*or leave the part out"),
        ((X, Y, IDS, IDS), r"got \(32,\) torch\.int64 as part 3"),
        ((X,), "got 1 parts"),
        ({"label": Y, "path": PATHS}, "finds no tensor|finds no inputs"),
        (X, "got Tensor"),
    ],
)
def test_batches_that_are_not_understood_are_refused_before_training(batch: Any, text: str) -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match=text):
        run([batch], on_step=lambda step, loss: seen.append(step))
    assert not seen


# outputs


class Returns(nn.Module):
    """Return the logits in some container, in one mode or in both."""

    def __init__(self, wrap: Any, mode: str = "both") -> None:
        super().__init__()
        self.net, self.wrap, self.mode = net(), wrap, mode

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return self.wrap(z) if self.mode in ("both", "train" if self.training else "eval") else z


Inception = collections.namedtuple("Inception", ["logits", "aux_logits"])
UNDERSTOOD = {
    "tuple of one": lambda z: (z,),
    "dict": lambda z: {"logits": z, "features": z[:, :2]},
    "ordered dict": lambda z: collections.OrderedDict(out=z, aux=z * 2),
    "named tuple": lambda z: Inception(z, z * 2),
}


@each("name, mode", [(name, mode) for name in UNDERSTOOD for mode in ("both", "train")])
def test_outputs_in_containers(name: str, mode: str) -> None:
    student, teacher = Returns(UNDERSTOOD[name], mode), Returns(UNDERSTOOD[name])
    teacher.net = trained()  # pyright: ignore[reportAttributeAccessIssue]
    distill(student, teacher, [(X, Y)], method=KD(), epochs=2, test=[(X, Y)], quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(student.net.state_dict().values(), run([(X, Y)]), strict=True))
    source = Ensemble([teacher, trained()])
    torch.testing.assert_close(source(X), teacher.net.eval()(X))


@each(
    "wrap, text",
    [
        (lambda z: (z, z), r"tuple with 0: \(32, 4\), 1: \(32, 4\).*register_forward_hook\(lambda .*output\[0\]"),
        (lambda z: {"a": z, "b": z}, r"dict with 'a': \(32, 4\).*output\['a'\]"),
        (lambda z: {"out": z[..., None, None]}, r"\(32, 4, 1, 1\)\. Of pixels, use tasks.Segmentation"),
        (lambda z: None, "got NoneType"),
    ],
)
def test_outputs_that_are_not_understood_are_refused_with_the_line_that_serves(wrap: Any, text: str) -> None:
    student = Returns(wrap)
    with pytest.raises(ValueError, match=text):
        distill(student, trained(), [(X, Y)], method=KD(), epochs=1, quiet=True)
    if "register" in text:
        first = 0 if "output[0]" in text.replace("\\", "") else "a"
        student.register_forward_hook(
            lambda module, args, output: output if isinstance(output, torch.Tensor) else output[first]
        )
        distill(student, trained(), [(X, Y)], method=KD(), epochs=1, quiet=True)


# methods, optimizers, schedules


@each(
    "call, text",
    [
        (lambda: KD(alpha=0.9), r"KD has no argument 'alpha'\. Its alpha is soft= here\. Write KD\(soft=\.\.\., hard"),
        (lambda: DKD(alpha=1.0, beta=8.0), "Its alpha is target= here"),
        (lambda: DKD(beta=8.0), "Its beta is non_target= here"),
        (lambda: FitNet(layers=["layer3"]), r"Its layers is names= here.*Classification\(features="),
        (lambda: KD(T=4), "Its T is temperature= here"),
        (lambda: KD(4), r"takes its arguments by name; got 4\. Write KD\("),
        (lambda: DTKD(softt=1.0), r"DTKD has no argument 'softt'\. Write DTKD\("),
        (lambda: Static(T=4), "Static has no argument 'T'"),
        (lambda: Sharpness(temperature=4.0), "Its temperature is tau= here"),
        (lambda: Sum(KD(), method=DKD()), "Sum has no argument 'method'"),
    ],
)
def test_arguments_of_other_libraries_are_named(call: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


@each("method", ["kd", "KD", KD])
def test_a_method_may_be_given_by_name(method: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(run([(X, Y)], method=method), run([(X, Y)]), strict=True))


def test_other_methods_are_refused() -> None:
    for method, error, text in (
        ("kdd", ValueError, "no method is called 'kdd'. Did you mean"),
        ("kd(soft=4)", ValueError, r"is no name of a method\. Write the call, such as method=methods\.KD\(soft=0\.9\)"),
        (
            "kd-matched",
            ValueError,
            r"Presets, such as kd-matched, .*experiments\.presets\.method_of",
        ),
        ("ctkd", ValueError, r"Presets, such as kd-matched, .*experiments\.presets\.method_of"),
        (4.0, TypeError, r"method must be a Method, such as methods\.DTKD\(\); got float"),
    ):
        with pytest.raises(error, match=text):
            run([(X, Y)], method=method)


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@each("lr", [np.float32(0.05), np.float64(0.05), torch.tensor(0.05), torch.tensor(0.05, dtype=torch.float64)])
def test_learning_rates_of_other_types(lr: Any, tmp_path: Any) -> None:
    got = run([(X, Y)], optimizer=partial(torch.optim.AdamW, lr=lr), out=tmp_path / "run", log_every=1)
    want = run([(X, Y)], optimizer=partial(torch.optim.AdamW, lr=float(lr)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_optimizer_may_be_an_instance_or_a_name() -> None:
    task = Classification(features={"map": ("0", "0")})
    student, other = net(), net()
    optimizer = SGD(student.parameters())
    distill(student, trained(), [(X, Y)], method=KD(), epochs=2, optimizer=optimizer, quiet=True)
    want = run([(X, Y)], optimizer=SGD)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), want, strict=True))
    named = run([(X, Y)], optimizer="AdamW")
    plain = run([(X, Y)], optimizer=torch.optim.AdamW)
    assert all(torch.equal(a, b) for a, b in zip(named, plain, strict=True))
    for wrong, error, text in (
        (SGD(other.parameters()), ValueError, "parameters that are not the student's"),
        (torch.optim.LBFGS, ValueError, "LBFGS evaluates the loss several times"),
        (partial(torch.optim.LBFGS, lr=1.0), ValueError, r"Use SGD or AdamW: Write optimizer=partial\("),
        ("adamx", ValueError, "no optimizer 'adamx'"),
        (lambda groups: groups, TypeError, "got function, which returned list"),
        (0.1, TypeError, "must make a torch optimizer; got float"),
    ):
        with pytest.raises(error, match=text):
            run([(X, Y)], optimizer=wrong, task=task)


@each(
    "make",
    [
        partial(CosineAnnealingLR, T_max=6),
        partial(CosineAnnealingLR, T_max=4, eta_min=0.01),
        partial(StepLR, step_size=2),
        partial(LambdaLR, lr_lambda=lambda step: 1.0 / (1 + step)),
        partial(OneCycleLR, max_lr=0.1, total_steps=6, cycle_momentum=False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_a_scheduler_of_torch_is_stepped_once_a_step(make: Any) -> None:
    """As a factory and as an instance: the rates are those of a hand-written loop."""
    student, seen = net(), list[float]()
    optimizer = SGD(student.parameters(), lr=0.05)
    mine = SGD(net().parameters(), lr=0.05)
    scheduler, want = make(mine), []
    for _ in range(6):
        want.append(mine.param_groups[0]["lr"])
        mine.step()
        scheduler.step()
    for given in ({"optimizer": SGD, "schedule": make}, {"optimizer": optimizer, "schedule": make(optimizer)}):
        seen.clear()
        made: list[Any] = []
        if callable(given["optimizer"]):
            given["optimizer"] = lambda groups, made=made: made.append(SGD(groups, lr=0.05)) or made[0]
        else:
            made.append(optimizer)
        rates = lambda step, loss, made=made: seen.append(made[0].param_groups[0]["lr"])  # noqa: E731
        distill(student, trained(), [(X, Y)], method=KD(), steps=6, quiet=True, on_step=rates, **given)
        torch.testing.assert_close(seen, want)


@each(
    "schedule, error, text",
    [
        (ReduceLROnPlateau, ValueError, "needs the scores of a run"),
        (partial(OneCycleLR, max_lr=0.1, total_steps=3), ValueError, "changes the momentum too"),
        (partial(OneCycleLR, max_lr=0.1, total_steps=1, cycle_momentum=False), ValueError, "ends before the run of 3"),
        (
            lambda optimizer: StepLR(optimizer, 2),
            TypeError,
            r"schedule\(0\) fails with .*schedule=lambda prog",
        ),
        (lambda progress: "half", TypeError, "must return a number; got str"),
        ("cosin", ValueError, "cosine"),
    ],
)
def test_other_schedules_are_refused(schedule: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        run([(X, Y)], schedule=schedule, steps=3, epochs=None)


# rows of pixels


def dense(images: int, size: int, weight: bool, seed: int = 0) -> Rows:
    """Rows of pixels with the features of their images, of the same and of half the size."""
    torch.manual_seed(seed)
    pixels = images * size * size
    w = (torch.rand(images, size * size) > 0.5).float()
    w[0] = 0.0
    return Rows(
        torch.randn(pixels, 3, requires_grad=True),
        torch.randn(pixels, 3),
        torch.randint(0, 3, (pixels,)),
        w.flatten() if weight else None,
        {
            "a": (torch.randn(images, 2, size, size), torch.randn(images, 2, size, size)),
            "b": (torch.randn(images, 2, size, size), torch.randn(images, 2, size // 2, size // 2)),
        },
    )


def cut(rows: Rows, images: slice, per: int) -> Rows:
    part = slice(images.start * per, images.stop * per)
    return rows.replace(
        student=rows.student[part], teacher=rows.teacher[part], target=rows.target[part],  # pyright: ignore
        weight=None if rows.weight is None else rows.weight[part],
        features={n: (s[images], t[images]) for n, (s, t) in rows.features.items()},
    )  # fmt: skip


@each("kind, weight", [(kind, weight) for kind in (AT, FitNet, CWD) for weight in (False, True)])
def test_features_of_images_beside_rows_of_pixels(kind: type[Method], weight: bool) -> None:
    """The term of an image is that of the image alone, weighted by its pixels, and no split changes the sum."""
    rows = dense(4, 4, weight)
    method = kind(names=["a", "b"]) if kind is not FitNet else kind(names=["a"])
    method.setup(rows)
    method.eval()  # FitNet's normalization sees the batch in training mode
    whole = total(method(rows), rows)
    parts = [cut(rows, slice(i, i + 1), 16) for i in range(4)]
    want = sum(total(method(part), part, normalizer=rows.total_weight) for part in parts)
    torch.testing.assert_close(whole, want)
    feature = method(rows)["feature"].view(4, 16)
    assert (feature == feature[:, :1]).all() and not (weight and feature[0].any())
    images = Rows(rows.student[:4], rows.teacher[:4], rows.target[:4], features=rows.features)
    kept = slice(1, None) if weight else slice(None)
    torch.testing.assert_close(feature[kept, 0], method(images)["feature"][kept])


class Segmentation(Classification):
    """Rows are pixels."""

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        teacher = student.detach() if teacher is None else teacher
        student, teacher = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (student, teacher))
        return [Rows(student, teacher, batch[1].flatten())]

    def row_weights(self, batch: Any) -> dict[str, Any]:
        return {"logits": float(batch[1].numel())}


@each("kind", [AT, FitNet, CWD])
def test_a_run_over_pixels_with_features(kind: type[Method]) -> None:
    def conv(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1))

    torch.manual_seed(0)
    x, student, teacher = torch.randn(7, 1, 4, 4), conv(2), conv(4)
    data = [(x, teacher(x).argmax(1))]
    task = Segmentation(features={"map": ("0", "0")})
    distill(student, teacher, data, method=kind(names=["map"]), task=task, steps=2, quiet=True)


def test_features_of_another_number_of_samples_are_refused() -> None:
    rows = dense(4, 4, weight=False)
    rows = rows.replace(features={"a": (torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))})
    with pytest.raises(ValueError, match=r"features have 3 samples, and Rows.* has 64 rows"):
        AT()(rows)


# the teacher's own normalization


def images() -> Batches:
    torch.manual_seed(0)
    pixels, labels = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    return Batches(pixels, labels, batch_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


OWN = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Processor:
    """As an image processor of transformers."""

    image_mean, image_std, do_normalize = list(OWN[0]), list(OWN[1]), True


def with_config(model: nn.Module) -> nn.Module:
    vars(model)["pretrained_cfg"] = {"mean": OWN[0], "std": OWN[1], "architecture": "x"}
    return model


@each("normalization", [OWN, "own", Processor(), {"mean": OWN[0], "std": OWN[1]}])
def test_a_teacher_sees_images_with_its_own_normalization(normalization: Any) -> None:
    data, model = images(), with_config(conv())
    teacher = Live(model, normalization=normalization)
    with pytest.raises(ValueError, match=r"does not say how its images are normalized: give data_normalization="):
        teacher(next(iter(data))[0])
    teacher.bind_data(data)
    pixels = data.images[:16].float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in OWN)
    torch.testing.assert_close(teacher(next(iter(data))[0]), model((pixels - mean) / std), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        Live(model, normalization=normalization, data_normalization=((0.0,) * 3, (1.0,) * 3))(pixels),
        model((pixels - mean) / std),
    )
    assert teacher.identity != Live(model).identity == Live(model, normalization="data").identity
    distill(conv(1), teacher, data, method=KD(), steps=2, quiet=True, selfcheck=False)


def test_a_normalization_other_than_the_data_is_said() -> None:
    data = images()
    with pytest.warns(UserWarning, match=r"config of the teacher Sequential has mean \(0\.485.*normalization='own'"):
        distill(conv(1), with_config(conv()), data, method=KD(), steps=1, quiet=True, selfcheck=False)
    for teacher in (conv(), Live(with_config(conv()), normalization="data")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            distill(conv(1), teacher, data, method=KD(), steps=1, quiet=True, selfcheck=False)
    with pytest.raises(ValueError, match=r"found no mean and std for normalization='own'"):
        Live(conv(), normalization="own")
    with pytest.raises(ValueError, match="has 1 channels, and the data's 3"):
        Live(conv(), normalization=((0.5,), (0.5,))).bind_data(data)
    with pytest.raises(ValueError, match="std > 0 per channel"):
        Live(conv(), normalization=((0.5,), (0.0,)))
