"""What every method promises, for all that are found in their folder, present and future: see tests/contract.py."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tempering.methods import METHODS, Method, RegressionKD, StepMethod
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.temperature import POLICIES, Policy, Temperatures
from tempering.temperature.curriculum import Curriculum
from tests.cases import each
from tests.contract import (
    CASES,
    MEET_ALL,
    VARIED_POLICIES,
    arguments,
    backward,
    block,
    in_one_pass,
    leaves,
    on_each,
    ran,
    same,
)

# these warnings are tested elsewhere; here rows that fall back, and temperatures at a bound, are wanted
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)"),
    pytest.mark.filterwarnings(r"ignore:Curriculum's temperature is at a bound"),
]

NON_NEGATIVE = [(name, part) for name, part in CASES if part.non_negative]
ATTACHED = [
    (n, part) for n, part in CASES if any(getattr(p, "differentiable", False) for p in part.policies().values())
]


def prepared(method: Method) -> Method:
    method.setup(block())
    return method


every_method = on_each("method", CASES, prepared)


def is_hard(term: str) -> bool:
    return term == "hard" or term.endswith(".hard")


def shift_invariant(method: Method) -> bool:
    inside = [m for m in method.modules() if isinstance(m, Method | Policy)]
    return all(m.shift_invariant for m in inside)


def test_all_are_found() -> None:
    assert {"KD", "DKD", "DTKD", "Sum", "Supervised"} <= set(METHODS)
    assert {"Static", "Sharpness", "Standardized"} <= set(POLICIES)
    assert len(CASES) >= 3 * len(VARIED_POLICIES) >= 3 * 12
    met_by = {name.partition("-")[2] for name, _ in CASES if name.partition("-")[0] not in MEET_ALL}
    assert met_by >= {name for name, _ in VARIED_POLICIES}, "every policy meets another method too"


@every_method
def test_terms_are_a_value_a_row(method: Method) -> None:
    rows = block(weighted=True)
    for progress in (0.0, 0.01, 1.0):
        terms = ran(method, rows, progress)
        assert terms and all(isinstance(name, str) for name in terms)
        assert all(t.shape == (len(rows),) and t.dtype in (torch.float32, torch.float64) for t in terms.values())
        assert all(t.isfinite().all() for t in terms.values())


@every_method
def test_weights_weigh_the_terms_of_their_names(method: Method) -> None:
    rows = block()
    terms = ran(method, rows)
    for name in set(arguments(method)) & set(terms):
        method = copy.deepcopy(method)
        setattr(method, name, 2.0 * getattr(method, name))
        terms[name] = 2.0 * terms[name]
    same(ran(method, rows), terms)
    if "warmup" in arguments(method):
        for progress, rise in ((0.25, 0.5), (0.75, 1.0)):
            method.warmup = 0.0  # pyright: ignore[reportAttributeAccessIssue]
            risen = {n: term if is_hard(n) else rise * term for n, term in ran(method, rows, progress).items()}
            method.warmup = 0.5  # pyright: ignore[reportAttributeAccessIssue]
            same(ran(method, rows, progress), risen)


@every_method
def test_zero_at_agreement(method: Method) -> None:
    rows = block()
    agreeing = rows.replace(student=rows.teacher, features={n: (t, t) for n, (_, t) in rows.features.items()})
    agreeing, wanted = leaves(agreeing)
    soft = {name: term for name, term in ran(method, agreeing).items() if not is_hard(name)}
    if not method.zero_when_equal:
        assert any(bool(term.abs().max() > 1e-6) for term in soft.values()), "it says it is not zero at agreement"
        return
    for name, term in soft.items():
        assert bool((term.abs() <= 1e-12).all()), name
    if soft:
        gradients = torch.autograd.grad(total(soft, agreeing), wanted, allow_unused=True)
        elsewhere = 1.0 + max(g.abs().max() for g in backward(method, rows)[1])
        assert all(g is None or bool((g.abs() <= 1e-5 * elsewhere).all()) for g in gradients), "it is a minimum"


@on_each("method", NON_NEGATIVE, prepared)
def test_never_negative(method: Method) -> None:
    scales = (1e-6, 1e-2, 3.0, 50.0)
    double = [block(16, scale=scale) for scale in scales]
    double += [rows.replace(student=rows.teacher + 1e-7 * rows.student) for rows in double]
    single = [block(16, scale=scale, dtype=torch.float32) for scale in scales]
    for made in (*in_one_pass(method, double), *in_one_pass(method, single)):
        backward(method, made, at_least=0.0)


@every_method
def test_a_constant_added_to_the_logits(method: Method) -> None:
    rows = block()
    loss, gradients = backward(method, rows)
    by = torch.linspace(-9.0, 9.0, len(rows), dtype=torch.float64).unsqueeze(1)
    moved = [rows.replace(student=rows.student + by), rows.replace(teacher=rows.teacher - by)]
    if shift_invariant(method):
        for made in moved:
            same(backward(method, made), (loss, gradients), 1e-8, 1e-10)
    else:
        assert any(not torch.isclose(backward(method, made)[0], loss, rtol=1e-6) for made in moved)


@every_method
@each("weighted", [False, True], ids=["", "weighted"])
def test_batch_split(method: Method, weighted: bool) -> None:
    def whole_and_parts(seed: int) -> tuple[Any, Any]:
        rows = block(8, weighted=weighted, seed=seed)
        parts = [
            backward(method, rows.select(p), 0.3, normalizer=rows.total_weight) for p in (slice(0, 1), slice(1, 8))
        ]
        together = sum(part[0] for part in parts), [torch.cat(g) for g in zip(*(p[1] for p in parts), strict=True)]
        return backward(method, rows, 0.3), together

    if not method.is_batch_dependent():
        same(*reversed(whole_and_parts(0)))
        return
    found = (whole_and_parts(seed) for seed in range(20))
    differ = any(not torch.isclose(parts[0], whole[0], rtol=1e-9) for whole, parts in found)
    assert differ, "it says that it compares rows with each other"


@every_method
def test_rows_of_weight_zero_may_hold_anything(method: Method) -> None:
    """NaN and infinity in a row without weight: the others' loss and gradients are what they are without it."""
    rows = block(weighted=True)
    assert rows.weight is not None
    rows.weight[2] = 0.0
    loss, gradients = backward(method, rows)
    broken = rows.replace(student=rows.student.clone(), teacher=rows.teacher.clone())
    broken.student[2], broken.teacher[2] = torch.nan, torch.inf
    found, others = backward(method, broken)
    same(found, loss)
    for got, want in zip(others, gradients, strict=True):
        same(got, want)
        assert not got[2].any()


@every_method
def test_rows_of_weight_zero_take_no_part(method: Method) -> None:
    rows = block(weighted=True)
    loss, gradients = backward(method, rows)
    places, others = torch.tensor([1, 2, 4, 5, 6, 8]), torch.tensor([0, 3, 7])
    filled = block(9, weighted=True, seed=5, scale=1.0)
    for x in (filled.student, filled.teacher, *(x for pair in filled.features.values() for x in pair)):
        x[others] = 1e4 * x[others].sign()
    garbage = {"student": rows.student, "teacher": rows.teacher, "target": rows.target, "weight": rows.weight}
    for name, real in garbage.items():
        getattr(filled, name)[places] = real
    for name, pair in rows.features.items():
        for ours, theirs in zip(filled.features[name], pair, strict=True):
            ours[places] = theirs
    assert filled.target is not None and filled.weight is not None and filled.ids is not None
    filled.target[others], filled.weight[others] = IGNORE_INDEX, 0.0
    filled.ids[places], filled.ids[others] = torch.arange(6), 7
    padded_loss, padded = backward(method, filled)
    same(padded_loss, loss)
    same([g[places] for g in padded], gradients)
    assert all(bool((g[others] == 0).all()) for g in padded)


@every_method
@each("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(method: Method, dtype: torch.dtype) -> None:
    rows = block(dtype=torch.float64)
    hot = 1e4 * torch.eye(7, dtype=torch.float64)[torch.arange(6)]
    situations = []
    for student, teacher in (
        (1e4 * rows.student.sign(), 1e4 * rows.teacher.sign()),
        (hot, -hot),
        (-hot, hot.flip(1)),
        (hot, hot),
        (hot, rows.teacher),
        (rows.student, hot),
    ):
        features = {n: (100 * s.to(dtype), -100 * t.to(dtype)) for n, (s, t) in rows.features.items()}
        situations.append(rows.replace(student=student.to(dtype), teacher=teacher.to(dtype), features=features))
    for made in in_one_pass(method, situations):
        # a gradient in float16 needs a loss scaler, here one that scales down: T^2 of such logits is 1e8
        backward(method, made, **({"normalizer": 1e7} if dtype == torch.float16 else {}))


@every_method
def test_constant_rows(method: Method) -> None:
    situations = []
    for sides, value in itertools.product((("student",), ("teacher",), ("student", "teacher")), (0.0, 5.0, -3e3)):
        rows = block()
        flat = torch.full_like(rows.student, value)
        s, t = rows.features["map"]
        still = torch.full_like(s, value / 1e3)
        maps = {"map": (still if "student" in sides else s, still if "teacher" in sides else t)}
        situations.append(rows.replace(**dict.fromkeys(sides, flat), features={**rows.features, **maps}))
    for made in in_one_pass(method, situations):
        backward(method, made)
        assert all(p.last is None or bool((p.last.student > 0).all()) for p in method.policies().values())


@every_method
def test_one_class(method: Method) -> None:
    rows = block(classes=1)
    backward(method, rows)
    agreeing = rows.replace(features={n: (t, t) for n, (_, t) in rows.features.items()})
    if method.zero_when_equal and method.shift_invariant:  # whatever its logit, one class is certain on both sides
        assert all(bool((term.abs() < 1e-12).all()) for term in ran(method, agreeing).values())


@every_method
@each("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(method: Method, dtype: torch.dtype) -> None:
    half = block(dtype=dtype)
    features = {n: (s.float(), t.float()) for n, (s, t) in half.features.items()}
    single = half.replace(student=half.student.float(), teacher=half.teacher.float(), features=features)
    loss, gradients = backward(method, half)
    want, exact = backward(method, single)
    same(loss, want, 0.0, 0.0)
    for got, g in zip(gradients, exact, strict=True):
        assert got.dtype == dtype
        # each use of the logits rounds its share of their gradient before the shares are added
        same(got.float(), g, 0.0, 4 * torch.finfo(dtype).eps * float(g.abs().max()))


@every_method
def test_autocast_changes_nothing(method: Method) -> None:
    rows = block(dtype=torch.float32)
    same(backward(method, rows, cast=True), backward(method, rows), 0.0, 0.0)


@every_method
def test_all_rows_masked(method: Method) -> None:
    rows = block().replace(weight=torch.zeros(6, dtype=torch.float64))
    loss, gradients = backward(method, rows)
    assert float(loss) == 0.0 and all(not g.any() for g in gradients)


@every_method
def test_no_rows(method: Method) -> None:
    for rows in (block(0), block(0, weighted=True)):
        loss, _ = backward(method, rows)
        assert float(loss) == 0.0


@every_method
def test_masked_classes_are_as_if_not_there(method: Method) -> None:
    if isinstance(method, RegressionKD):
        return  # numbers, not classes
    rows = block(8, 9)
    kept, gone = torch.tensor([0, 1, 3, 4, 6, 7, 8]), torch.tensor([2, 5])
    fewer = rows.replace(
        student=rows.student[:, kept], teacher=rows.teacher[:, kept], target=torch.arange(8, dtype=torch.int64) % 7
    )
    assert fewer.target is not None
    masked = rows.replace(
        student=rows.student.index_fill(1, gone, -torch.inf),
        teacher=rows.teacher.index_fill(1, gone, -torch.inf),
        target=kept[fewer.target],
    )
    loss, (logits, *features) = backward(method, masked)
    assert not logits[:, gone].any()
    if not any(p.by_class for p in method.policies().values()):  # which has other weights for fewer classes
        same((loss, [logits[:, kept], *features]), backward(method, fewer))


@every_method
def test_each_row_may_mask_its_own_classes(method: Method) -> None:
    if isinstance(method, RegressionKD):
        return  # numbers, not classes
    rows = block(8, 5)
    masks = torch.tensor([0, 1, 2, 4, 8, 16, 23, 31]).unsqueeze(1).bitwise_and(2 ** torch.arange(5)) > 0
    target = (~masks).int().argmax(1).masked_fill(masks.all(1), IGNORE_INDEX)
    masked = rows.replace(
        student=rows.student.masked_fill(masks, -torch.inf),
        teacher=rows.teacher.masked_fill(masks, -torch.inf),
        target=target,
    )
    _, (logits, *_) = backward(method, masked)
    assert not logits[masks].any()
    _, (blind, *_) = backward(method, masked.replace(target=target.clamp_min(0)))
    assert not blind[-1].any(), "a row without classes sends no gradient, whatever its label"


@every_method
def test_rows_without_a_label(method: Method) -> None:
    rows = block()
    target = torch.tensor([0, IGNORE_INDEX, 2, -1, 4, IGNORE_INDEX])
    some, unlabeled = rows.replace(target=target), target < 0
    backward(method, some)
    terms = ran(method, some)
    hard = [term for name, term in terms.items() if is_hard(name)]
    assert all(bool((term[unlabeled] == 0).all()) and bool((term[~unlabeled] > 0).all()) for term in hard)
    if method.needs_labels:
        assert all(bool((term[unlabeled] == 0).all()) for term in terms.values())
    backward(method, rows.replace(target=torch.full_like(target, IGNORE_INDEX)))
    if hard or method.needs_labels:
        with pytest.raises(ValueError, match=r"needs labels, but Rows\(name='logits'\) has target=None"):
            ran(method, rows.replace(target=None))
    else:
        backward(method, rows.replace(target=None))


class Held(Policy):
    """The temperatures another policy found on the first rows it saw, with no slope."""

    paper = "none: holds another policy's answer"

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.tau, self.found, self.inner = policy.tau, [], [policy]

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        if not self.found:
            self.found.append(self.inner[0](rows, progress).detached())
        return self.found[0]


def slopes_agree(method: Method) -> bool:
    start, wanted = leaves(block(4, 5))

    def loss(student: Tensor, feature: Tensor) -> Tensor:
        rows = start.replace(student=student, features={**start.features, "map": (feature, start.features["map"][1])})
        return total(ran(method, rows), rows)

    return torch.autograd.gradcheck(loss, tuple(wanted[:2]), fast_mode=True)


@every_method
def test_gradient_at_held_temperatures(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    # adaptive_kl's weight is held too
    monkeypatch.setattr("tempering.objectives.head_share", lambda p, q, head: torch.full_like(p[:, 0], 0.3))
    method.setup(block(4, 5))
    for path, found in method.policies().items():
        owner = method.get_submodule(path.rpartition(".")[0])
        setattr(owner, path.rpartition(".")[2], Held(found))
    with torch.no_grad():
        method(block(4, 5), 1.0)
    assert slopes_agree(method)


@on_each("method", ATTACHED, prepared)
def test_gradient_through_attached_temperatures(method: Method) -> None:
    for p in method.policies().values():
        if isinstance(p, Curriculum):  # whose gradient is, else, meant not to be that of the loss
            p.lambda_first = p.lambda_last = 1.0
    assert slopes_agree(method)


@every_method
def test_a_call_depends_on_nothing_that_was_logged(method: Method) -> None:
    rows = block()
    want = backward(method, rows)
    for found in method.policies().values():
        found.last = Temperatures(torch.tensor([[1e9]]), torch.tensor([[1e-9]]))
    same(backward(method, rows), want, 0.0, 0.0)


@every_method
def test_state_survives_saving(method: Method) -> None:
    rows = block()
    want = backward(method, rows)
    method(rows, 1.0)
    blank = copy.deepcopy(method)
    with torch.no_grad():
        for x in blank.state_dict().values():
            x.zero_()
    assert not blank.load_state_dict(copy.deepcopy(method.state_dict())).missing_keys
    same(backward(blank, rows), backward(method, rows), 0.0, 0.0)
    if not method.state_dict():
        same(backward(method, rows), want, 0.0, 0.0)


def test_a_method_that_owns_its_step_says_so() -> None:
    class Owner(StepMethod):
        def step(self, step: Any) -> dict[str, Tensor]:
            return {}

    owners = [kind.example() for kind in METHODS.values() if issubclass(kind, StepMethod)]
    for owner in [Owner(), *owners]:
        with pytest.raises(TypeError, match=r"owns its step: call .step\(...\), or run it by tempering.distill"):
            owner(block(), 1.0)
