"""Several teachers: equal to a plain definition, to a single one that has all the weight, and named where one fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempering as kd
from tempering.data.text import collate
from tempering.integrations.common import check
from tempering.methods import KD, FitNet
from tempering.rows import Rows, total
from tempering.tasks import Binary, Classification, LanguageModeling, MultiLabel, Regression, validation_weights
from tempering.teachers import Ensemble, InBatch, Live, Routed, Teacher, TopKTeacher, record
from tempering.teachers.base import Columns
from tempering.teachers.combined import AsModule
from tempering.training.selfcheck import SelfCheckError
from tests.runs import CLASSES, DIMS, cut, flattened, go, identical, images, left, points, stop_at, student_net
from tests.runs import teacher_net as first_net
from tests.runs import weights as weights_of
from tests.test_served import PAD, TOP, local, served, server, texts  # noqa: F401

MEANS = ("logits", "probabilities", "log_probabilities")
WEIGHTS = (None, [3.0, 1.0, 0.5], "confidence")


def other_net(dtype: torch.dtype = torch.float32, *, noise: float = 0.2) -> nn.Module:
    """Nearly the first one, so that its classes are right too."""
    net = first_net(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        net[0].weight += noise * torch.randn(CLASSES, DIMS, generator=generator, dtype=torch.float64).to(dtype)
    return net


def three() -> list[nn.Module]:
    return [first_net(torch.float64), other_net(torch.float64), other_net(torch.float64, noise=0.3)]


def plain(outputs: list[Tensor], weights: Any, mean: str) -> Tensor:
    """The mean, row by row and in loops."""
    rows = []
    for z in zip(*outputs, strict=True):
        p = [x.softmax(-1) for x in z]
        w = [1.0] * len(z) if weights is None else weights
        if weights == "confidence":
            w = [1.0 / -sum(q * q.log() for q in x) for x in p]
        w = [x / sum(w) for x in w]
        if mean == "probabilities":
            rows.append(sum(a * b for a, b in zip(w, p, strict=True)).log())
        else:
            parts = z if mean == "logits" else [q.log() for q in p]
            rows.append(sum(a * b for a, b in zip(w, parts, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("mean", MEANS)
def test_an_ensemble_is_its_definition(mean: Any, weights: Any) -> None:
    """With its loss, the student's gradient, and the gradient to the inputs; in any order of rows and teachers."""
    nets, student = three(), student_net().double()
    x, y = points(24, dtype=torch.float64)
    x.requires_grad_()
    teacher, ours = Ensemble(nets, weights=weights, mean=mean), copy.deepcopy(student)
    said, wanted = teacher(x, None), plain([net(x) for net in nets], weights, mean)
    torch.testing.assert_close(said, wanted.detach(), rtol=1e-10, atol=1e-12)
    assert not said.requires_grad
    slopes = [torch.autograd.grad(z.square().sum(), x)[0] for z in (teacher.forward_with_grad(x, None), wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-10)
    y[:3] = -100
    for net, z in ((ours, said), (student, wanted.detach())):
        rows = Rows(net(x.detach()), z, y)
        total(KD(hard=0.5)(rows), rows).backward()
    torch.testing.assert_close(*([p.grad for p in net.parameters()] for net in (ours, student)), rtol=1e-9, atol=1e-12)
    turned = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(x[turned], None), said[turned])
    order = None if weights is None else weights if isinstance(weights, str) else weights[::-1]
    torch.testing.assert_close(Ensemble(nets[::-1], weights=order, mean=mean)(x, None), said)


@pytest.mark.parametrize("weights", [[3.0, 1.0], "confidence"], ids=str)
@pytest.mark.parametrize("mean", MEANS)
def test_an_ensemble_of_pixels_is_that_of_its_rows(mean: Any, weights: Any) -> None:
    outputs = list(torch.randn(2, 3, 5, 4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    said = Ensemble([Fixed(z) for z in outputs], weights=weights, mean=mean)(outputs[0], None)
    wanted = plain([z.permute(0, 2, 3, 1).flatten(0, 2) for z in outputs], weights, mean)
    torch.testing.assert_close(said.permute(0, 2, 3, 1).flatten(0, 2), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", [MultiLabel(), Binary(), Regression()], ids=lambda task: type(task).__name__)
def test_a_mean_over_classes_is_refused_where_there_are_none(task: Any) -> None:
    nets = [nn.Linear(DIMS, 1), nn.Linear(DIMS, 1)]
    for options in ({"mean": "probabilities"}, {"weights": "confidence"}):
        for teacher in (Ensemble(nets, **options), Routed([Ensemble(nets, **options), nets[0]], by=domains(60))):
            with pytest.raises(ValueError, match=f"softmax over classes, and the task predicts {task.predicts}"):
                go(cut(points(20), 10), student=nn.Linear(DIMS, 1), teacher=teacher, task=task, epochs=1)
        kd.tasks.base.with_columns(task, Ensemble(nets, weights=[1, 0], mean="probabilities"))


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("number", [0, 2])
def test_one_teacher_with_all_the_weight_is_that_teacher(mean: Any, number: int) -> None:
    """To the bit, and the others do not run."""
    nets, (x, y) = three(), points(20, dtype=torch.float64)
    weights = [float(i == number) for i in range(3)]
    for i, net in enumerate(nets):
        if i != number:
            net.register_forward_hook(lambda *_: pytest.fail("it runs"))
    teacher = Ensemble(nets, weights=weights, mean=mean)
    assert torch.equal(teacher(x, None), Live(nets[number])(x, None)) and teacher.model is nets[number]
    runs = [go([(x, y)], teacher=t, student=student_net().double(), epochs=3) for t in (teacher, nets[number])]
    assert torch.equal(*(weights_of(run.student) for run in runs))


def test_masked_classes_and_certain_teachers_have_finite_weights() -> None:
    z = torch.tensor([[0.0, 1.0, -torch.inf], [200.0, 0.0, -torch.inf]], dtype=torch.float64)
    nets = [Fixed(z), Fixed(z.flip(0))]
    for mean in MEANS:
        out = Ensemble(nets, weights="confidence", mean=mean)(z, None)
        assert out[:, :2].isfinite().all() and torch.isneginf(out[:, 2]).all()
    sure = Ensemble([Fixed(z[:1]), Fixed(z[1:])], weights="confidence")(z, None)
    torch.testing.assert_close(sure[:, :2], z[1:, :2], rtol=1e-6, atol=1e-6)


class Fixed(nn.Module):
    """The same outputs, whatever the inputs."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, inputs: Any) -> Any:
        return self.output


def test_validation_weights() -> None:
    nets, (x, y) = [first_net(), other_net(noise=2.0)], points(50)
    y[:5] = -100
    kept = y >= 0
    accuracy = [float((net.eval()(x).argmax(-1) == y)[kept].float().mean()) for net in nets]
    loss = [float(nn.functional.cross_entropy(net(x).detach()[kept], y[kept])) for net in nets]
    for by, wanted in (("accuracy", accuracy), ("loss", [math.exp(-value) for value in loss])):
        got = validation_weights(nets, cut((x, y), 20), by=by)
        assert got == pytest.approx([w / sum(wanted) for w in wanted], rel=1e-6) and got[0] > got[1]
    with pytest.raises(ValueError, match="'accuracy' or 'loss'"):
        validation_weights(nets, cut((x, y), 20), by="f1")  # pyright: ignore[reportArgumentType]


# routed


def domains(n: int) -> Tensor:
    return torch.randint(2, (n,), generator=torch.Generator().manual_seed(4))


def batches(kind: str, n: int = 60, **changes: Any) -> list[Any]:
    """Batches of points, with an id and a domain each."""
    x, y = points(n)
    ids, domain = torch.arange(n), domains(n)
    parts = list(zip(*(v.split(20) for v in (x, y, ids, domain)), strict=True))
    if kind == "ids":
        return [part[:3] for part in parts]
    names = ("x", "labels", "ids", "domain")
    named = [dict(zip(names, part, strict=True)) for part in parts]
    return [b | {"domain": ["ab"[i] for i in b["domain"]]} if kind == "names" else b for b in named]


RULES: dict[str, Any] = {
    "ids": domains(60),
    "numbers": "domain",
    "names": "domain",
    "function": lambda inputs, ids: domains(60)[ids],
}


@pytest.mark.parametrize("rule", RULES)
def test_only_the_picked_teacher_runs_on_a_sample(rule: str) -> None:
    nets: dict[str, nn.Module] = {"a": first_net(), "b": other_net()}
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}
    teacher = Routed(nets, by=RULES[rule])
    data = batches("ids" if rule == "function" else rule)
    task = kd.tasks.base.with_columns(Classification(), teacher)
    for name, net in nets.items():
        net.register_forward_hook(lambda _, args, out, name=name: seen[name].append(args[0]))
    said = torch.cat([teacher(*task.inputs(batch)[1:]) for batch in data])
    (x, _), domain = points(60), domains(60)
    assert torch.equal(torch.cat(seen["a"]), x[domain == 0]) and torch.equal(torch.cat(seen["b"]), x[domain == 1])
    wanted = torch.where(domain[:, None] == 0, nets["a"](x), nets["b"](x))
    torch.testing.assert_close(said, wanted)
    assert isinstance(task.inputs(data[0])[0], Tensor), "the student does not see the column"
    run = go(data, teacher=teacher, epochs=2, validation=data)
    alone = go([(x[i : i + 20], points(60)[1][i : i + 20]) for i in (0, 20, 40)], teacher=Fixed3(wanted), epochs=2)
    torch.testing.assert_close(weights_of(run.student), weights_of(alone.student))
    assert "a: ok" in run.facts["selfcheck"]["checks"]["above chance"]


class Fixed3(Teacher):
    """Stored outputs of three batches, in turn; the self-check reads the first ones."""

    identity = "stored"

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs

    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        x = points(60)[0]
        return self.outputs[(x[:, None] == inputs).all(-1).nonzero()[:, 0]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_teacher_of_all_samples_is_that_teacher(number: int) -> None:
    nets = [first_net(), other_net()]
    routed = Routed(nets, by=torch.full((60,), number))
    data = batches("ids")
    assert torch.equal(routed(data[0][0], data[0][2]), Live(nets[number])(data[0][0]))
    runs = [go(data, teacher=t, epochs=3) for t in (routed, nets[number])]
    assert torch.equal(*(weights_of(run.student) for run in runs))


def test_inputs_in_containers_are_divided() -> None:
    class Sums(nn.Module):
        def forward(self, inputs: Any) -> Tensor:
            assert isinstance(inputs, Mapping) and len(inputs["texts"]) == len(inputs["x"]) == len(inputs["pair"][1])
            return inputs["x"] + inputs["pair"][1]

    x = torch.randn(4, 3)
    inputs = {"x": x, "pair": (x, 2 * x), "texts": ["a", "b", "c", "d"], "scale": torch.tensor(2.0)}
    torch.testing.assert_close(Routed([Sums(), Sums()], by=torch.tensor([1, 0, 0, 1]))(inputs, torch.arange(4)), 3 * x)
    patches = {**inputs, "patches": torch.randn(7, 3)}
    with pytest.raises(ValueError, match=r"one of the inputs is \(7, 3\): its first dimension must be the samples"):
        Routed([Sums(), Sums()], by=torch.tensor([1, 0, 0, 1]))(patches, torch.arange(4))


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    nets, data = {"a": first_net(), "b": other_net()}, batches("names")
    odd = [{**batch, "domain": ["law" if i == 3 else "a" for i in range(20)]} for batch in data]
    with pytest.raises(
        ValueError, match=r"no teacher 'law', which sample 3 of the batch needs; .*'a' \(0\), 'b' \(1\)"
    ):
        go(odd, teacher=Routed(nets, by="domain"), epochs=1)
    with pytest.raises(ValueError, match="reads the column 'topic' of the batch, which it does not have"):
        go(data, teacher=Routed(nets, by="topic"), epochs=1)
    with pytest.raises(ValueError, match="by sample id, and the batch has none"):
        Routed(nets, by=domains(60))(points(4)[0], None)
    with pytest.raises(ValueError, match="has no teacher 2"):
        Routed(nets, by=torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="Ensemble needs a module or a teacher for 'b'; got NoneType"):
        Ensemble({"a": first_net(), "b": None})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"teacher 'b' \(Live\) returned \(\d+, 4\)"):
        go(data, teacher=Routed({"a": first_net(), "b": nn.Linear(DIMS, 4)}, by="domain"), epochs=1)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ConnectionError("no route to host")

    for teacher in (
        Ensemble({"a": first_net(), "served": Broken()}),
        Routed({"served": Broken()}, by=lambda x, _: [0] * 20),
    ):
        with pytest.raises(ConnectionError) as caught:
            teacher(points(20)[0], None)
        assert "teacher 'served' (Live)" in caught.value.__notes__[0]
    shifted = first_net()
    with torch.no_grad():
        shifted[0].weight.copy_(shifted[0].weight.roll(1, 0))
        shifted[0].bias.copy_(shifted[0].bias.roll(1, 0))
    shifted[1].running_mean = shifted[1].running_mean.roll(1, 0)
    many = batches("ids", 600)
    for teacher in (
        Ensemble({"a": first_net(), "wrong": shifted}, weights=[0.95, 0.05]),
        Routed({"a": first_net(), "wrong": shifted}, by=(torch.arange(600) % 3 == 0).long()),
    ):
        with pytest.raises(SelfCheckError, match="the teacher 'wrong' is right on"):
            go(many, teacher=teacher, epochs=1)
    with pytest.raises(ValueError, match="features"):
        task = Classification(features={"0": ("0", "0")})
        go(data, teacher=Routed(nets, by="domain"), method=FitNet(), task=task, epochs=1)


# caches, normalizations, remote


def cached_pair(tmp_path: Path) -> tuple[Any, list[nn.Module], Any]:
    nets, data = [flattened(first_net()), flattened(other_net())], images(name="images")
    return data.clean(), nets, record(Live(nets[1]), data, tmp_path / "one", precision="fp32", quiet=True)


def test_live_and_cached_teachers_mix(tmp_path: Path) -> None:
    data, nets, cached = cached_pair(tmp_path)
    live, ids = Live(nets[0]), torch.arange(60)
    x = data.gather(ids)[0]
    for make in (lambda t: Ensemble(t, mean="probabilities"), lambda t: Routed(t, by=domains(60))):
        torch.testing.assert_close(make([live, cached])(x, ids), make(nets)(x, ids))
    run = go(data, student=flattened(student_net()), teacher=Ensemble([live, cached]), epochs=2)
    other = go(data, student=flattened(student_net()), teacher=Ensemble(nets), epochs=2)
    torch.testing.assert_close(weights_of(run.student), weights_of(other.student))
    with pytest.raises(ValueError, match=r"teacher '1': .* contains outputs for other data"):
        go(_others(), student=flattened(student_net()), teacher=Ensemble([live, cached]), epochs=1)
    cached.fallback = Live(nets[1])
    on_others = Ensemble([live, cached]).for_batches(_others())
    assert on_others is not None and on_others.parts["1"] is cached.fallback


def _others() -> Any:
    from tempering.data import Batches

    x, y = points(60, seed=5)
    return Batches((255 * x.sigmoid()).to(torch.uint8).view(60, 1, 2, 3), y, batch_size=8, mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("kind", ["ensemble", "routed"])
def test_an_ensemble_is_recorded(kind: str, tmp_path: Path) -> None:
    nets, data = [flattened(first_net()), flattened(other_net())], images().clean()
    teacher = Ensemble(nets, weights="confidence") if kind == "ensemble" else Routed(nets, by=domains(60))
    cached = record(teacher, data, tmp_path / "cache", precision="fp32", quiet=True)
    ids = torch.arange(60)
    torch.testing.assert_close(cached(None, ids), teacher(data.gather(ids)[0], ids))
    other = Ensemble(nets) if kind == "ensemble" else Routed(nets, by=1 - domains(60))
    with pytest.raises(ValueError, match="another recording"):
        record(other, data, tmp_path / "cache", precision="fp32", quiet=True)


def test_each_teacher_has_its_own_normalization() -> None:
    nets, data = [flattened(first_net()), flattened(other_net())], images().clean()
    statistics = ((0.2,), (0.5,))
    teacher = Ensemble({"data's": nets[0], "own": Live(nets[1], normalization=statistics)})
    teacher.bind_data(data)
    x = data.gather(torch.arange(8))[0]
    wanted = (nets[0](x) + nets[1]((x * 0.25 + 0.5 - 0.2) / 0.5)) / 2
    torch.testing.assert_close(teacher(x, None), wanted)
    with pytest.raises(ValueError) as caught:
        teacher.bind_data([])
        Ensemble({"data's": nets[0], "own": Live(nets[1], normalization=statistics)}).bind_data([])
    assert "'own' (Live)" in caught.value.__notes__[0]


def test_live_and_remote_teachers_are_routed(server: Any) -> None:  # noqa: F811
    """Rows of the likeliest tokens, of different numbers of them, with padding."""
    live, task = local(server)
    batch = collate(texts()[:4], pad=PAD) | {"domain": ["remote", "live", "live", "remote"]}
    teacher = Routed({"live": TopKTeacher(live, top=TOP + 2), "remote": served(server)}, by="domain")
    own = kd.tasks.base.with_columns(task, teacher)
    student_in, teacher_in, ids = own.inputs(batch)
    assert "domain" not in student_in
    out, z = teacher(teacher_in, ids), torch.randn(4, batch["input_ids"].shape[1], server.model.config.vocab_size)
    rows = own.rows(z, out, batch)[0]
    _, shape, _ = task.row_fields(batch)
    alone = {name: part(teacher_in.inputs, ids) for name, part in teacher.parts.items()}
    for name, wanted in alone.items():
        other = task.rows(z, wanted, batch)[0]
        text = task._positions(batch)[0] // shape[1]
        mine = torch.tensor([batch["domain"][i] == name for i in text])
        loss = [KD(temperature=1)(r)["soft"][mine] for r in (rows, other)]
        torch.testing.assert_close(*loss)
    with pytest.raises(ValueError, match=r"'remote' \(RemoteTeacher\) returned Sparse.*TopKTeacher\(teacher, top="):
        Routed({"live": live, "remote": served(server)}, by="domain")(teacher_in, ids)
    with pytest.raises(ValueError, match=r"'remote' \(RemoteTeacher\) returned Sparse"):
        Ensemble({"live": live, "remote": served(server)})(teacher_in.inputs, ids)
    student, method = copy.deepcopy(server.model).requires_grad_(True), KD(temperature=1)
    checks = kd.distill(
        student,
        teacher,
        [batch],
        method=method,
        task=LanguageModeling(),
        epochs=1,
        quiet=True,
        skip_checks=["above chance"],
    )
    assert checks.facts["result"]["steps"] == 1


# runs


@pytest.mark.parametrize("kind", ["ensemble", "routed"])
def test_stopped_and_resumed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def run(out: Path, **more: Any) -> Any:
        nets = [flattened(first_net()), flattened(other_net())]
        teacher = Ensemble(nets, weights="confidence") if kind == "ensemble" else Routed(nets, by=domains(60))
        settings = {
            "steps": 20,
            "checkpoint_every": 3,
            "validation": images().clean(),
            "out": out,
            "selfcheck": False,
        } | more
        return go(images(), student=flattened(student_net(dropout=0.3)), teacher=teacher, **settings)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_step=stop_at(11))
    assert run(tmp_path / "stopped").how == "resumed"
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))
    nets = [flattened(first_net()), flattened(other_net())]
    with pytest.raises(ValueError, match="teacher"):
        go(
            images(),
            student=flattened(student_net(dropout=0.3)),
            teacher=Ensemble(nets),
            steps=20,
            out=tmp_path / "whole",
        )


def test_audits_run_the_ensemble() -> None:
    nets, (x, _) = [first_net(), other_net()], points(8)
    model, inputs = AsModule(Ensemble(nets)), x.clone().requires_grad_()
    torch.testing.assert_close(model(x), (nets[0](x) + nets[1](x)) / 2)
    assert torch.autograd.grad(model(inputs).sum(), inputs)[0].abs().sum() > 0
    assert sum(1 for _ in model.parameters()) == sum(1 for net in nets for _ in net.parameters())
    assert not model.training or all(not net.training for net in nets)


def test_a_student_that_is_one_of_the_teachers_is_refused() -> None:
    student = first_net()
    with pytest.raises(ValueError, match="shares weights with the student"):
        go([points(20)], student=student, teacher=Ensemble([other_net(), student]), epochs=1)


@pytest.mark.parametrize("weights", [["a", "b"], {"a": 1.0, "b": 1.0}, 0.7, [1.0], [math.nan, 1.0]])
def test_what_is_no_weight_per_teacher_is_named(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"needs weights=\[...\], a number >= 0 for each of the 2 teachers"):
        Ensemble({"a": first_net(), "b": other_net()}, weights=weights)


def test_numbers_that_are_not_places_are_no_names() -> None:
    with pytest.raises(ValueError, match=r"needs texts as the names of teachers; got 1. .*give a list"):
        Routed({1: first_net(), 2: other_net()}, by="domain")  # pyright: ignore[reportArgumentType]
    x = points(4)[0]
    for by, number in ((0, 0), (1, 1)):
        routed = Routed({0: first_net(), 1: other_net()}, by=lambda x, _, by=by: [by] * len(x))  # pyright: ignore
        assert torch.equal(routed(x, None), Live([first_net(), other_net()][number])(x))


def test_a_route_has_one_teacher_per_sample() -> None:
    nets, (x, _) = [first_net(), other_net()], points(6)
    for number in (3, 7):
        routed = Routed(nets, by=lambda x, _, n=number: torch.zeros(n, dtype=torch.long))
        for inputs in (x, {"x": x}, Columns(x, {})):
            with pytest.raises(ValueError, match=rf"by= gives {number} for a batch of 6 samples"):
                routed(inputs, None)
    assert Routed(nets, by=lambda x, _: x[:, 0].long())(x[:0], None).shape == (0, CLASSES)


@pytest.mark.parametrize("kind", ["ensemble", "routed", "columns"])
def test_stored_and_live_teachers_mix(kind: str) -> None:
    nets = [first_net(), other_net()]

    def make(first: Any) -> Any:
        parts = [first, nets[1]]
        return Ensemble(parts) if kind == "ensemble" else Routed(parts, by=by)

    by: Any = (
        (lambda x, _: (next(iter(x.values())) if isinstance(x, dict) else x)[:, 0] > 0) if kind == "routed" else "of"
    )
    batches = [{"inputs": x, "labels": y, "of": torch.arange(len(x)) % 2} for x, y in cut(points(60), 20)]
    if kind != "columns":
        batches = [{name: x for name, x in batch.items() if name != "of"} for batch in batches]
    stored = [{**batch, "teacher_outputs": Live(nets[0])(batch["inputs"])} for batch in batches]
    runs = [go(data, teacher=make(t), epochs=2) for data, t in ((stored, InBatch()), (batches, nets[0]))]
    torch.testing.assert_close(*(weights_of(run.student) for run in runs), rtol=1e-6, atol=1e-7)


def test_class_weights_leave_the_columns_of_a_teacher() -> None:
    weights = {"class_weights": (1.0, 2.0, 3.0, 1.0, 0.5), "method": KD(hard=0.5), "selfcheck": False, "epochs": 2}
    plain = cut(points(60), 20)
    stored = [{"inputs": x, "labels": y, "teacher_outputs": Live(first_net())(x)} for x, y in plain]
    named = [{"inputs": x, "labels": y, "of": ["a"] * len(x)} for x, y in plain]
    teachers = [(plain, first_net()), (stored, InBatch()), (named, Routed({"a": first_net()}, by="of"))]
    want, *others = [weights_of(go(data, teacher=teacher, **weights).student) for data, teacher in teachers]
    assert all(torch.equal(want, other) for other in others)
    assert not torch.equal(want, weights_of(go(plain, **{**weights, "class_weights": None}).student))


def test_stored_outputs_among_several_are_not_mixed(tmp_path: Path) -> None:
    stored = [{"inputs": x, "labels": y, "teacher_outputs": Live(first_net())(x)} for x, y in cut(points(40), 20)]
    for data, part, name in ((images(), cached_pair(tmp_path)[2], "Cached"), (stored, InBatch(), "InBatch")):
        with pytest.raises(ValueError, match=f"mixup= mix images, and {name} has the teacher's outputs"):
            teacher = Ensemble([flattened(first_net()), part])
            go(data, student=flattened(student_net()), teacher=teacher, mixup=0.4, epochs=1)
    with pytest.raises(ValueError, match="Routed reads the column 'of' of one sample"):
        named = [{"inputs": x, "labels": y, "of": ["a"] * len(x)} for x, y in cut(points(40), 20)]
        go(named, teacher=Routed({"a": first_net()}, by="of"), mixup=0.4, epochs=1)


def test_stored_outputs_of_another_number_of_rows_are_named() -> None:
    stored = [{"inputs": x, "labels": y, "teacher_outputs": torch.zeros(5, CLASSES)} for x, y in cut(points(40), 20)]
    with pytest.raises(ValueError, match="logits of 20 samples and the teacher of 5"):
        go(stored, teacher=InBatch(), epochs=1)


class Spoiled(nn.Module):
    """A teacher with NaN in the rows whose first value is above a bound, such as one of half precision."""

    def __init__(self, bound: float, net: nn.Module) -> None:
        super().__init__()
        self.bound, self.net = bound, net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).masked_fill(x[:, :1] > self.bound, math.nan)


def test_the_teacher_whose_logits_are_nan_is_named() -> None:
    """By the self-check of the engine and of other trainers, and in a later step."""
    (x, y), sound = points(40), first_net()
    x, y = x[order := x[:, 0].argsort()], y[order]
    batches, late = cut((x, y), 20), float(x[30, 0])
    for bound, error, when in ((-9.0, SelfCheckError, "of the first batch"), (late, FloatingPointError, "at step 2")):
        spoiled = Spoiled(bound, other_net())
        inner = Ensemble([sound, spoiled])
        for teacher, name in (
            (Ensemble({"math": sound, "code": spoiled}), "'code'"),
            (Ensemble([spoiled, spoiled]), "'0', '1'"),
            (Routed([sound, spoiled], by=lambda x, _: torch.arange(len(x)) % 2), "'1'"),
            (
                Routed({"math": sound, "code": inner}, by=lambda x, _: ["math"] * 5 + ["code"] * (len(x) - 5)),
                "'code/1'",
            ),
        ):
            text = f"hold NaN or infinity.*those of the teacher {name}"
            with pytest.raises(error, match=text) as caught:
                go(batches, teacher=teacher, epochs=1, skip_checks=["above chance"])
            assert when in str(caught.value)
    teacher, (student, texts_) = Ensemble([sound, Spoiled(-9.0, other_net())]), (student_net(), batches[0])
    parts = {"student": student, "teacher": teacher, "method": KD(), "task": Classification(), "features": None}
    with pytest.raises(SelfCheckError, match="those of the teacher '1'"):
        check(texts_, tuple, {}, loader=batches, **parts)
    assert Ensemble([sound, other_net()]).nonfinite_parts(x, None) == sound_only(sound, x) == []


def sound_only(model: nn.Module, x: Tensor) -> list[str]:
    """Minus infinity masks, and a cache has NaN where it stores nothing."""
    masked = Live(Fixed(torch.zeros(len(x), CLASSES).index_fill(1, torch.tensor([0]), -math.inf)))
    return Ensemble([Live(model), masked]).nonfinite_parts(x, None)
