"""What every policy promises, and what every method and policy says of itself: see tests/contract.py."""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.methods import DKD, DTKD, KD, METHODS, Method, Sum, Supervised
from tempering.rows import Rows
from tempering.temperature import POLICIES, AdaptivePolicy, Policy, Sharpness, Static
from tests.contract import VARIED_POLICIES, Part, arguments, block, leaves, on_each, remade, same

# its warning is tested in test_sharpness; here rows that fall back are wanted
pytestmark = pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)")


def prepared(policy: Policy) -> Policy:
    policy.setup(block())
    return policy


every_policy = on_each("policy", VARIED_POLICIES, prepared)


@every_policy
def test_temperatures(policy: Policy) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        rows = block(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            cast = copy.deepcopy(policy)(rows)
        T = copy.deepcopy(policy)(rows)
        for side, again in zip(T, cast, strict=True):
            if side is None or again is None:
                assert side is again
                continue
            assert side.shape in ((6, 1), (1, 1)) and bool((side > 0).all()) and side.isfinite().all()
            assert side.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            same(again, side, 0.0, 0.0)
        assert T.scale.shape in ((6,), (1,)) and bool((T.scale > 0).all())


@every_policy
def test_temperatures_carry_no_gradient_unless_asked(policy: Policy) -> None:
    rows, _ = leaves(block())
    inside = [m for m in policy.modules() if isinstance(m, Policy)]
    learns = any(getattr(m, "differentiable", False) for m in inside) or any(
        p.requires_grad for p in policy.parameters()
    )
    T = policy(rows)
    assert any(side is not None and side.requires_grad for side in T) == bool(learns)
    assert policy.last is not None and not any(side is not None and side.requires_grad for side in policy.last)


@every_policy
def test_what_a_row_s_temperature_depends_on(policy: Policy) -> None:
    def found(rows: Rows, part: Any = slice(None)) -> list[Tensor]:
        torch.default_generator.manual_seed(0)
        T = copy.deepcopy(policy)(rows, 0.3).detached()
        return [side.expand(len(rows), 1)[part] for side in T if side is not None]

    def agree(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(one, other, strict=True))

    part = torch.tensor([4, 1])
    blocks = (block(seed=seed) for seed in range(20 if policy.relational else 1))
    assert policy.relational != all(agree(found(rows.select(part)), found(rows, part)) for rows in blocks)
    rows = block()
    by = torch.linspace(-9.0, 9.0, len(rows), dtype=torch.float64).unsqueeze(1)
    moved = found(rows.replace(student=rows.student + by, teacher=rows.teacher - 2 * by))
    assert policy.shift_invariant == agree(moved, found(rows))


@every_policy
def test_what_a_policy_reports(policy: Policy) -> None:
    policy(block())
    assert all(isinstance(name, str) and count.shape == () for name, count in policy.report().items())
    for empty in (block(0), block(0, weighted=True)):
        assert policy(empty).student.shape in ((0, 1), (1, 1))


@pytest.mark.parametrize("kind", [*METHODS.values(), *POLICIES.values()], ids=lambda kind: kind.__name__)
def test_says_where_it_is_from_and_keeps_its_arguments(kind: type[Part]) -> None:
    cited = r"arXiv:\d{4}\.\d{4,5}"
    assert re.fullmatch(rf"none: .+|{cited}(; {cited})*", kind.paper), kind.paper
    doc = inspect.getdoc(kind) or ""
    assert "Reference" in doc and all(source in doc for source in re.findall(cited, kind.paper))
    part = kind.example()
    assert isinstance(part, kind) and isinstance(part, nn.Module)
    assert all(hasattr(part, name) for name in arguments(part))
    said = part.hyperparameters()
    assert json.loads(json.dumps(said)) and (not arguments(part) or list(said) == arguments(part))
    parameters = inspect.signature(kind.__init__).parameters.values()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)
    assert not issubclass(kind, AdaptivePolicy) or callable(kind.update)


@pytest.mark.parametrize("kind", METHODS.values(), ids=lambda kind: kind.__name__)
def test_slips_in_a_constructor_are_named(kind: type[Method]) -> None:
    part, names = kind.example(), arguments(kind)
    for name in {"soft", "hard", "dynamic", "target", "non_target", "feature"} & set(names):
        for bad in (-0.5, float("nan"), float("inf"), None):
            words = rf"^{kind.__name__} needs {name} (>= 0 and finite|to be a (finite )?number); got {bad}"
            with pytest.raises((ValueError, TypeError), match=words):
                remade(part, **{name: bad})
    if "warmup" in names:
        with pytest.raises(ValueError, match=r"needs warmup in \[0, 1\], the share of the run .*; got 20.0"):
            remade(part, warmup=20.0)
    if "temperature" in names:
        with pytest.raises(
            TypeError, match=rf"^{kind.__name__} needs a temperature policy; got '2'.*\.Static\(4\.0\)\."
        ):
            remade(part, temperature="2")
        if kind.__name__ in ("DTKD", "CSKD", "Swing"):  # a number could be a fixed temperature, or their policy's tau
            with pytest.raises(
                TypeError, match=rf"^{kind.__name__} needs a temperature policy; got 2.*\.Static\(2\)\."
            ):
                remade(part, temperature=2)
        else:
            temperature = remade(part, temperature=2).temperature
            assert isinstance(temperature, Static) and temperature.tau == 2.0
    if names:
        with pytest.raises(TypeError, match="takes its arguments by name"):
            kind(*(getattr(part, name) for name in names))


def test_sum() -> None:
    with pytest.warns(UserWarning, match="counts the cross entropy of the labels more than once"):
        both = Sum(KD(hard=0.0), DKD(hard=2.0), KD(soft=0.5), Supervised())
    rows = block()
    terms = both(rows)
    assert list(terms) == [
        "kd.soft",
        "dkd.target",
        "dkd.non_target",
        "dkd.hard",
        "kd2.soft",
        "kd2.hard",
        "supervised.hard",
    ]
    same(terms["dkd.non_target"], DKD()(rows)["non_target"])
    same(terms["kd2.soft"], KD(soft=0.5)(rows)["soft"])
    assert set(both.policies()) == {f"methods.{name}.temperature" for name in ("kd", "dkd", "kd2")}
    assert both.param_groups() == [] and not both.is_batch_dependent()
    said: dict[str, Any] = both.hyperparameters()
    assert said["kd2"]["soft"] == 0.5 and said["dkd"]["temperature"] == {"name": "Static", "tau": 4.0}
    dynamic = Sum(DTKD(hard=0.0), DKD(temperature=Sharpness(4.0)))(rows)
    same(dynamic["dkd.target"], DKD(temperature=Sharpness(4.0))(rows)["target"])
    with pytest.raises(ValueError, match=r"Sum needs at least one method, such as Sum\(KD\(hard=0.0\), DKD\(\)\)"):
        Sum()
    with pytest.raises(TypeError, match=r"Sum adds methods over rows; got \['Static'\]"):
        Sum(KD(), Static(4.0))  # pyright: ignore[reportArgumentType]
