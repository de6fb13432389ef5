"""Methods and policies from text: what can be written, what is refused, and what a preset is."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random

import pytest
import torch

from tempering.experiments.presets import (
    PRESETS,
    Preset,
    method_of,
    preset_from,
    presets_from,
    slug,
    split,
    with_controls,
)
from tempering.experiments.spec import method_from, policy_from
from tempering.methods import METHODS
from tempering.methods.logits.dkd import DKD
from tempering.methods.logits.dtkd import DTKD
from tempering.methods.logits.kd import KD
from tempering.rows import Rows, total
from tempering.temperature import POLICIES
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static


def test_a_name_alone_is_the_method_with_its_defaults() -> None:
    for name, kind in METHODS.items():
        if kind.example.__func__ is KD.example.__func__:  # those whose constructor needs nothing
            made = method_from(name.lower())
            assert type(made) is kind
            assert made.hyperparameters() == kind().hyperparameters()


def test_names_of_methods_and_policies_are_apart() -> None:
    """A bare word can stand for either, so none may stand for both."""
    assert not {name.lower() for name in METHODS} & {name.lower() for name in POLICIES}


def test_arguments_are_numbers_words_lists_and_parts() -> None:
    made = method_from("KD(soft = 4, hard=2*0.5, warmup=20/240)")
    assert (made.soft, made.hard, made.warmup) == (4, 1.0, 20 / 240)
    made = method_from("dtkd(dynamic=1, temperature=sharpness(2.5, solve=published, differentiable=True))")
    policy = made.temperature
    assert isinstance(policy, Sharpness)
    assert (made.dynamic, policy.tau, policy.solve, policy.differentiable) == (1, 2.5, "published", True)
    assert method_from("dtkd(temperature=sharpness(4, differentiable=true))").temperature.differentiable is True
    assert isinstance(method_from("dtkd(temperature=static)").temperature, Static)
    assert method_from('dtkd(temperature=sharpness(4, solve="std"))').temperature.solve == "std"
    assert method_from("at(names=(a, b))").names == ("a", "b")
    # a word that Python keeps for itself
    assert method_from("kd(temperature=curriculum(form=global, low=2))").temperature.form == "global"


def test_methods_add_up() -> None:
    made = method_from("sum(kd(hard=0), dkd, dkd(non_target=0, hard=0))")
    assert [type(m) for m in made.methods.values()] == [KD, DKD, DKD]
    assert made.hyperparameters()["dkd2"]["non_target"] == 0


def test_the_temperature_can_be_replaced() -> None:
    made = method_from("kd(soft=2, temperature=static(9))", "sharpness(4, solve=std)")
    assert isinstance(made.temperature, Sharpness)
    assert (made.soft, made.temperature.solve) == (2, "std")
    assert policy_from("static(2)").tau == 2


def test_a_method_from_text_trains() -> None:
    student = torch.randn(8, 5, requires_grad=True)
    rows = Rows(student, torch.randn(8, 5), torch.arange(8) % 5)
    loss = total(method_from("sum(dtkd(dynamic=1), dkd(hard=0))")(rows, 0.5), rows)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kdd", "no method is called 'kdd'. Did you mean 'kd'?"),
        ("dkt", "no method is called 'dkt'. Did you mean 'dtkd'?"),
        ("dtdk", "no method is called 'dtdk'. Did you mean 'dtkd'?"),
        ("ptk", "no method is called 'ptk'. Did you mean 'pkt'?"),
        ("qqq", "no method is called 'qqq'. There are: "),
        ("kd(sfot=4)", "KD has no argument 'sfot'. Did you mean 'soft'? It takes: soft, hard, warmup, temperature."),
        ("kd(4)", "KD takes 0 unnamed arguments; got 1 in 'kd(4)'. Name them, as in soft=..."),
        ("sharpness(4)", "no method is called 'sharpness'."),
        ("kd(temperature=sharpnes)", "no temperature policy is called 'sharpnes'. Did you mean 'sharpness'?"),
        ("kd(temperature=dkd)", "no temperature policy is called 'dkd'."),
        ("dtkd(temperature=4)", "DTKD needs a temperature policy; got 4."),
        ("kd(soft=abc)", "KD needs soft to be a finite number; got 'abc'."),
        ("kd(soft=1/0)", "1 / 0 in 'kd(soft=1/0)' divides by zero."),
        ("kd(soft='a'+1)", "'a' in \"kd(soft='a'+1)\" is not a number."),
        ("kd(soft=9**9)", "9 ** 9 in 'kd(soft=9**9)' is neither a number, a word, a list of them"),
        ("kd(soft=[x for x in y])", "is neither a number, a word, a list of them, nor a method or a policy."),
        ("kd(**a)", "KD has no argument '**'."),
        ("kd(", "'kd(' cannot be parsed"),
        ("kd.forward", "'kd.forward' is neither a name nor a call of one. Write it as in 'dtkd(soft=0.5"),
        ("__import__('os').system('true')", "is neither a name nor a call of one."),
        ("kd(soft=__import__('os'))", "no method or temperature policy is called '__import__'."),
        ("lambda: 1", "is neither a name nor a call of one."),
        ("(" * 300 + ")" * 300, "cannot be parsed"),
        ("sum", "Sum needs at least one method"),
        ("kd(soft=4, soft=5)", "gives KD the argument 'soft' twice"),
        ("dtkd(temperature=sharpness(4, solve=max, solve=std))", "gives Sharpness the argument 'solve' twice"),
        ("kd(soft=" + "+".join("1" * 600) + ")", "is nested more than 100 levels deep"),
        ("sum(" * 101 + "kd" + ")" * 101, "is nested more than 100 levels deep"),
        (f"kd(soft=1{'0' * 400}/3)", "is too large for a number"),
        (f"kd(soft=1{'0' * 400})", "is too large for a number"),
        ("kd(soft=1e999)", "1e309 is too large for a number"),
        ("kd(soft=1e300*1e300)", "1e+300 * 1e+300 is too large for a number"),
        ("crd(samples=99999999999)", "CRD(samples=99999999999, size=128) needs 102,400.0 GB of memory"),
        ("crd(samples=64, size=99999999999)", "needs 51,200.0 GB of memory"),
        ("interactive(every=1.5)", "Interactive needs every to be an integer; got 1.5."),
        ("interactive(every=true)", "Interactive needs every to be an integer; got True."),
        ("kd(temperature=instance(seed=1.5))", "Instance needs seed to be an integer; got 1.5."),
        (
            "dtkd(temperature=sharpness(differentiable=maybe))",
            "Sharpness needs differentiable to be true or false; got 'maybe'.",
        ),
        ("kd(hard=true)", "KD needs hard to be a finite number; got True."),
        ("fitnet(names=layer3)", "FitNet needs names to be a list, each text; got 'layer3'."),
        (
            "mlkd(temperatures=[2, deep])",
            "MLKD needs temperatures to be a list, each a finite number; got [2, 'deep'].",
        ),
        ("ckd(pairs=1.5)", "CKD needs pairs to be an integer or None; got 1.5."),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_way_out(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        method_from(text)
    assert said in str(caught.value)


VALUES = ("1.5", "'a'", "[1, 2]", "none", "true", "-1", "9e999", "99999999999", "kd", "[]")


def test_any_value_of_any_argument_is_used_or_refused() -> None:
    """No method or policy raises another error than ValueError, whatever it is given."""
    for parts, build in ((METHODS, method_from), (POLICIES, policy_from)):
        for name, part in parts.items():
            for argument, value in itertools.product(list(inspect.signature(part.__init__).parameters)[1:], VALUES):
                with contextlib.suppress(ValueError):
                    build(f"{name}({argument}={value})")


def test_damaged_text_is_read_or_refused() -> None:
    rng, alphabet = random.Random(0), "()[],=+-*/.'\"0123456789eE_abcKDk \n\0\u00e9\u202e"
    for _ in range(600):
        text = list(rng.choice([preset.spec for preset in PRESETS.values()]))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text) + 1)
            text[place : place + rng.randint(0, 3)] = rng.choices(alphabet, k=rng.randint(0, 3))
        with contextlib.suppress(ValueError):
            method_from("".join(text))


def test_a_method_without_a_temperature_refuses_another() -> None:
    with pytest.raises(ValueError, match=r"Sum takes no temperature; got temperature='static\(4\)'. Pass it to a part"):
        method_from("sum(kd, dkd)", "static(4)")


# presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_arm_can_be_made(name: str) -> None:
    assert type(method_of(name)).__name__.lower() == PRESETS[name].spec.partition("(")[0]


def test_arms_are_what_their_labels_say() -> None:
    assert PRESETS["supervised"].label == "student alone"
    matched, dtkd = method_of("kd-matched"), method_of("dtkd")
    assert isinstance(matched, KD) and isinstance(dtkd, DTKD)
    assert matched.soft == dtkd.dynamic + dtkd.soft
    assert (matched.hard, matched.warmup, matched.temperature.tau) == (dtkd.hard, dtkd.warmup, dtkd.temperature.tau)
    published = method_of("dtkd-published").temperature
    assert (published.solve, published.differentiable) == ("published", True)
    assert method_of("dtkd-only").soft == 0
    assert (method_of("dkd-target").non_target, method_of("dkd-rest").target) == (0, 0)
    assert isinstance(method_of("dkd-rest-dynamic").temperature, Sharpness)


def test_any_text_is_an_arm_labeled_by_itself() -> None:
    assert preset_from(" dtkd( soft=0.5)") == Preset("dtkd( soft=0.5)", "dtkd( soft=0.5)", "dtkd( soft=0.5)")
    assert preset_from("KD-Matched") == PRESETS["kd-matched"]
    assert preset_from("dtkd", "sharpness(4, solve=std)").label == "dtkd @ sharpness(4, solve=std)"


def test_a_list_of_arms_times_temperatures() -> None:
    assert split("kd, dtkd(soft=1, temperature=sharpness(4, solve=std)),dkd,") == [
        "kd",
        "dtkd(soft=1, temperature=sharpness(4, solve=std))",
        "dkd",
    ]
    labels = [preset.label for preset in presets_from("kd,dtkd,dtkd-exact,supervised", "own, static(2)")]
    assert labels == [
        "KD",
        "kd @ static(2)",
        "DTKD exact",
        "dtkd @ static(2)",
        "dtkd-exact @ static(2)",
        "student alone",
    ]


def test_a_mistyped_arm_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no method is called 'dtkd-publised'. Did you mean 'dtkd-published'"):
        presets_from("kd,dtkd-publised")
    with pytest.raises(ValueError, match=r"no temperature policy is called 'statik'. Did you mean 'static'"):
        presets_from("kd", "statik")


@pytest.mark.parametrize(
    ("methods", "spec"),
    [
        ("dkd", "kd(soft=4, hard=1, warmup=20/240)"),
        ("dtkd,dtkd-only,dtkd-std", "kd(soft=4, hard=1, warmup=20/240)"),
        ("dtkd(dynamic=1, soft=0.5)", "kd(soft=1.5, hard=1, warmup=20/240)"),
        ("dtkd(temperature=sharpness(2))", "kd(soft=4, hard=1, warmup=20/240, temperature=static(2))"),
    ],
)
def test_the_matched_control_has_the_total_weights(methods: str, spec: str) -> None:
    presets, added = with_controls(presets_from(methods))
    assert [preset.label for preset in added] == ["student alone", "KD, weight-matched"]
    assert [preset.label for preset in presets[:2]] == ["student alone", "KD, weight-matched"]
    assert added[1].spec == spec
    dtkd = next((m for m in map(method_of, split(methods)) if isinstance(m, DTKD)), None)
    if dtkd is not None:
        matched = method_of(spec)
        assert (matched.soft, matched.warmup) == (dtkd.dynamic + dtkd.soft, dtkd.warmup)


def test_controls_that_are_there_are_not_added() -> None:
    presets = presets_from("supervised,kd-matched,dtkd")
    assert with_controls(presets) == (presets, [])


def test_slugs_are_names_of_folders() -> None:
    assert slug("DTKD(soft=0.5, temperature=static)") == "dtkd-soft-0.5-temperature-static"
    assert slug("KD, weight-matched") == "kd-weight-matched"
    assert slug("../..") == "arm"
