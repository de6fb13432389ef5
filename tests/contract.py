"""How the contract tests make their parts and rows: every method and policy found, in all their variants.

A part is made by its ``example()``; every value of its Literal and bool arguments is tried. KD meets every policy; the
other methods that take a ``temperature`` meet three each, in turn, and between them all. The cases of one method run in
one test, which lists those that fail. Rows carry a feature map and ids, for methods that look inside.
"""

from __future__ import annotations

import collections
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from tempering.methods import METHODS, InconsistentDetection, Method, Step, StepMethod
from tempering.rows import Rows, total, upcast_to_float32
from tempering.teachers import Live
from tempering.temperature import POLICIES, Policy
from tests.cases import Test, run_cases, with_arguments
from tests.conftest import random_rows

Part = Method | Policy


def arguments(part: type[Part] | Part) -> list[str]:
    parameters = inspect.signature((part if isinstance(part, type) else type(part)).__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def remade(part: Part, **changes: Any) -> Any:
    return type(part)(**{name: copy.deepcopy(getattr(part, name)) for name in arguments(part)} | changes)


def variants(kind: type[Part]) -> Iterator[tuple[str, Any]]:
    """The example of a class and every combination of its Literal and bool arguments, with a name each."""
    hints = get_type_hints(kind.__init__)
    options = {n: get_args(h) for n, h in hints.items() if get_origin(h) is Literal}
    options |= {n: (False, True) for n, h in hints.items() if h is bool}
    if not options:
        yield kind.__name__, kind.example()
    for values in itertools.product(*options.values()) if options else ():
        chosen = dict(zip(options, values, strict=True))
        said = [n if v is True else str(v) for n, v in chosen.items() if v is not False]
        yield f"{kind.__name__}({','.join(said)})", remade(kind.example(), **chosen)


ROW_METHODS = [kind for kind in METHODS.values() if not issubclass(kind, StepMethod)]
STEP_METHODS = [kind for kind in METHODS.values() if issubclass(kind, StepMethod)]
VARIED_POLICIES = [variant for kind in POLICIES.values() for variant in variants(kind)]
MEET_ALL = {"KD"}
TEMPERED = [kind for kind in ROW_METHODS if "temperature" in arguments(kind)]
MEET_SOME = [kind for kind in TEMPERED if kind.__name__ not in MEET_ALL]
EACH = max(3, -(-len(VARIED_POLICIES) // len(MEET_SOME)))


def met(kind: type[Method]) -> list[tuple[str, Any]]:
    """The policies a method is tried with: all of them, or a few, other ones for each method."""
    if kind.__name__ in MEET_ALL:
        return VARIED_POLICIES
    first = EACH * MEET_SOME.index(kind)
    return [VARIED_POLICIES[(first + i) % len(VARIED_POLICIES)] for i in range(EACH)]


CASES = [variant for kind in ROW_METHODS for variant in variants(kind)] + [
    (f"{kind.__name__}-{name}", remade(kind.example(), temperature=copy.deepcopy(policy)))
    for kind in TEMPERED
    for name, policy in met(kind)
]


def groups(cases: list[tuple[str, Any]]) -> list[Any]:
    """The cases of each class, as parameters of a test: a method with its variants, and KD with each kind of policy."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for name, part in cases:
        kind, _, policy = name.partition("-")
        kind = f"{kind}-{policy}" if kind in MEET_ALL and policy else kind
        found.setdefault(kind.partition("(")[0], []).append((name, part))
    return [pytest.param(inside, id=kind) for kind, inside in found.items()]


def on_each(argument: str, cases: list[tuple[str, Any]], ready: Callable[[Any], Any]) -> Callable[[Test], Test]:
    """Run a test on a copy of the part of every case, made ``ready``: one test per class, which names the failures."""

    def decorate(test: Test) -> Test:
        def one(part: Any, **fixtures: Any) -> None:
            test(**{argument: ready(copied(part))}, **fixtures)

        def run(group: list[tuple[str, Any]], **fixtures: Any) -> None:
            run_cases(one, ((name, {"part": part}) for name, part in group), fixtures)

        return pytest.mark.parametrize("group", groups(cases))(
            with_arguments(test, run, without=[argument], extra=["group"])
        )

    return decorate


def block(n: int = 6, classes: int = 7, **options: Any) -> Rows:
    """Random rows that also carry ids, a feature map, (n, 4, 3, 3) on both sides, and boxes, scores and queries."""
    made = _block(n, classes, **options)
    fields = {
        name: x.clone()
        for name in ("student", "teacher", "target", "weight", "ids")
        if (x := getattr(made, name)) is not None
    }
    return Rows(**fields, features={name: (s.clone(), t.clone()) for name, (s, t) in made.features.items()})  # pyright: ignore


@functools.cache
def _block(n: int, classes: int, **options: Any) -> Rows:
    rows = random_rows(n, classes, **options)
    generator = torch.Generator().manual_seed(options.get("seed", 0) + 1)
    s, t = (torch.randn(n, 4, 3, 3, generator=generator, dtype=torch.float64).to(rows.student.dtype) for _ in "st")
    edges = torch.rand(2, n, 3, 2, generator=generator).sort(0).values
    boxes = torch.cat((edges[0], edges[1]), -1).to(rows.student.dtype)
    boxes[:, 2] = -1.0  # no third one
    boxes[1::3] = -1.0  # an image without any
    scores = torch.rand(n, 9, generator=generator).to(rows.student.dtype)
    beside = {name: (x, x.clone()) for name, x in (("boxes", boxes), ("scores", scores))}
    # six queries of two decoder layers on one side, five on the other
    logits = [torch.randn(n, 2, q, 3, generator=generator, dtype=torch.float64).to(rows.student.dtype) for q in (6, 5)]
    centers = [
        (0.1 + 0.8 * torch.rand(n, 2, q, 4, generator=generator, dtype=torch.float64)).to(rows.student.dtype)
        for q in (6, 5)
    ]
    beside |= {"query_sigmoid": (logits[0], logits[1]), "query_boxes": (centers[0], centers[1])}
    return rows.replace(features={"map": (s, t)} | beside, ids=torch.arange(n))


def in_one_pass(method: Method, situations: list[Rows]) -> list[Rows]:
    """All rows in one block where the method looks at each row by itself; else the blocks as they are."""
    if method.is_batch_dependent():
        return situations
    fields = {name: [getattr(rows, name) for rows in situations] for name in ("student", "teacher", "target", "weight")}
    joined = {name: torch.cat(values) for name, values in fields.items() if values[0] is not None}
    features = {
        name: tuple(torch.cat([rows.features[name][side] for rows in situations]) for side in (0, 1))
        for name in situations[0].features
    }
    return [Rows(**joined, features=features, ids=torch.arange(len(joined["student"])))]  # pyright: ignore


def leaves(rows: Rows) -> tuple[Rows, list[Tensor]]:
    """The same rows on fresh leaves that want a gradient: the student's logits and features."""
    student = rows.student.detach().clone().requires_grad_()
    features = {n: (s.detach().clone().requires_grad_(), t.detach()) for n, (s, t) in rows.features.items()}
    return rows.replace(student=student, features=features), [student, *(s for s, _ in features.values())]


def copied(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy`` of a module, at a fifth of the time: what cannot change is not looked at."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = made = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            value = {key: child if child is None else copied(child, memo) for key, child in value.items()}
        elif isinstance(value, nn.Module):
            value = copied(value, memo)
        elif type(value) in (dict, collections.OrderedDict, list) and not value:
            value = type(value)()
        elif type(value) not in FIXED:
            value = copy.deepcopy(value, memo)
        vars(made)[name] = value
    return made


FIXED = {type(None), bool, int, float, str, torch.dtype}


def ran(method: Method, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
    """The terms of a copy of the method, so that no call leaves a trace, at fixed random numbers."""
    torch.default_generator.manual_seed(0)
    made = copied(method)
    for policy in made.policies().values():
        policy.setup(rows)  # one that is made for a number of classes is made anew for another
    return made.to(upcast_to_float32(rows.student).dtype)(rows, progress)


def backward(
    method: Method,
    rows: Rows,
    progress: float = 1.0,
    *,
    cast: bool = False,
    at_least: float = -torch.inf,
    **whole: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Loss and its gradients in the student's logits and features, all of them finite.

    ``cast``: under autocast. ``at_least``: what no row of no term may be below.
    """
    rows, wanted = leaves(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        terms = ran(method, rows, progress)
        loss = total(terms, rows, **whole)
    assert at_least == -torch.inf or all(bool((term >= at_least).all()) for term in terms.values())
    assert loss.requires_grad and loss.shape == ()
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted]
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    return loss.detach(), gradients


def same(got: Any, want: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# methods that own their step: a batch of images, two small nets, and one step


class Watcher(nn.Sequential):
    """A net that is also a detector: it has one level, its hidden units, and its boxes' class is the image's."""

    def forward(self, input: Any) -> Any:
        if not isinstance(input, dict):
            return super().forward(input)
        return self.levels_of(input["images"]) if "only" in input else super().forward(input["images"])

    def levels_of(self, images: Tensor) -> list[Tensor]:
        return [self[2](self[1](self[0](images)))[:, :, None, None]]

    def class_loss(self, inputs: dict[str, Any]) -> Tensor:
        labels = torch.stack([target["labels"][0] for target in inputs["targets"]])
        return nn.functional.cross_entropy(super().forward(inputs["images"]), labels, reduction="none")


class Lesson:
    """A student, its teacher and one batch of (images, labels, weights), and the step that a method makes of them.

    A method of detectors gets the images in [0, 1] with a box each, and the nets' levels beside the rows.
    """

    def __init__(
        self, n: int = 6, classes: int = 5, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
    ) -> None:
        def net(hidden: int) -> nn.Module:
            made = Watcher(nn.Flatten(), nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, classes))
            with torch.no_grad():
                for p in made.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * scale)
            return made.to(torch.float64)

        generator = torch.Generator().manual_seed(seed)
        self.student, taught = net(6).to(dtype), net(8)
        self.teacher = Live(taught if dtype == torch.float64 else taught.float())
        self.images = torch.randn(n, 3, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(classes, (n,), generator=generator)
        self.weights: Tensor | None = None

    def step(self, progress: float = 1.0, method: StepMethod | None = None) -> Step:
        if isinstance(method, InconsistentDetection):
            return self._watched(progress)
        batch = {"x": self.images, "y": self.labels} | ({} if self.weights is None else {"w": self.weights})
        seen = self.images if self.images.dtype == torch.float64 else self.images.float()

        def rows(student: Tensor, teacher: Tensor | None, batch: dict[str, Tensor]) -> list[Rows]:
            return [Rows(student, student.detach() if teacher is None else teacher, batch["y"], batch.get("w"))]

        args = (self.student, self.teacher, self.images, seen, None, batch, progress, rows)
        return Step(*args, teacher_with_grad=self.teacher.forward_with_grad)

    def _watched(self, progress: float) -> Step:
        images, n = self.images.sigmoid(), len(self.images)
        box = torch.tensor([0.5, 0.0, 1.5, 2.0]).to(images.device)
        inputs = {"images": images, "targets": [{"boxes": box[None], "labels": y[None]} for y in self.labels]}

        def rows(student: Tensor, teacher: Tensor | None, batch: Any) -> list[Rows]:
            with torch.no_grad():
                taught = self.teacher.model.levels_of(upcast_to_float32(images))[0]
            levels = {"p0": (self.student.levels_of(images)[0], taught)}
            features = levels | {"boxes": ((box / 2).expand(n, 1, 4),) * 2}
            teacher = student.detach() if teacher is None else teacher
            return [Rows(student, teacher, self.labels, self.weights, features, "images")]

        shown = {"images": upcast_to_float32(images)}
        return Step(self.student, self.teacher, inputs, shown, None, inputs, progress, rows)

    def loss(self, method: StepMethod, progress: float = 1.0) -> tuple[Tensor, dict[str, Tensor], Rows]:
        """The loss, the terms and the rows of one step."""
        torch.default_generator.manual_seed(0)
        with torch.no_grad():
            method.setup(self.step(method=method).forward()[-1])
        method.to(upcast_to_float32(self.images).dtype).bind_teacher(self.teacher.model)
        step = self.step(progress, method)
        terms = dict(method.step(step))
        assert step.rows is not None
        return total(terms, step.rows), terms, step.rows

    def backward(self, method: StepMethod, progress: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients in the student's weights, all of them finite."""
        loss = self.loss(copy.deepcopy(method), progress)[0]
        assert loss.requires_grad and loss.shape == ()
        gradients = torch.autograd.grad(loss, list(self.student.parameters()))
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
        return loss.detach(), list(gradients)


# those that take any batch of images; the others have runs of their own
PLAIN_STEP_METHODS = [kind for kind in STEP_METHODS if kind is not InconsistentDetection]
STEP_CASES = [variant for kind in STEP_METHODS for variant in variants(kind)] + [
    (f"{kind.__name__}-{name}", remade(kind.example(), temperature=copy.deepcopy(policy)))
    for kind in STEP_METHODS
    if "temperature" in arguments(kind)
    for name, policy in VARIED_POLICIES[:: max(1, len(VARIED_POLICIES) // 6)]
]
