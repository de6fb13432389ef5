"""What a search varies by default is declared by annotations: neither docstrings nor python -OO change it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import pytest
from torch import Tensor

from docs.tools import papers_page as papersdoc
from tempering.cli import main as cli
from tempering.experiments.presets import PRESETS
from tempering.experiments.tune.space import format_call, space_of
from tempering.methods import METHODS
from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.temperature import POLICIES
from tempering.temperature.base import Policy, Temperatures
from tempering.temperature.static import Static
from tempering.utils.search_space import Fraction, Range, Temperature, Weight, declared
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path as Elsewhere

# the weights that each method searches by default; a method of your own need not be here
WEIGHTS = {
    "AT": "feature",
    "ATS": "soft",
    "CKD": "soft divergence",
    "CRD": "feature",
    "CSKD": "fixed weighted gram",
    "CWD": "feature",
    "DIST": "inter intra",
    "DKD": "target non_target",
    "DTKD": "dynamic soft",
    "Divergence": "soft",
    "ERKD": "soft",
    "Explainer": "soft entropy",
    "FGD": "foreground background attention relation",
    "FeatureCKD": "feature",
    "FitNet": "feature",
    "HybridULD": "exact ranked",
    "Imitation": "feature",
    "InconsistentDetection": "adversarial",
    "Interactive": "soft supervised",
    "KD": "soft",
    "KDIGA": "soft align",
    "LD": "soft",
    "MGD": "feature",
    "MLKD": "soft classes batch",
    "NKD": "target non_target",
    "NST": "feature",
    "PKD": "feature",
    "PKT": "feature",
    "PolicyGradient": "soft",
    "QueryKD": "classes l1 giou",
    "R2KD": "value order",
    "RKD": "feature",
    "RLD": "sample masked",
    "ReviewKD": "feature",
    "SP": "feature",
    "SimKD": "feature",
    "Swing": "soft",
    "TRADES": "robust",
    "TTM": "soft",
    "ULD": "soft",
    "USKD": "target non_target weak",
    "VID": "feature",
    "WTTM": "soft",
}
TEMPERATURES = {"Adaptive", "Cosine", "Curriculum", "DTS", "Energy", "Entropy", "Instance", "Sharpness", "Standardized"}
TEMPERATURES |= {"ConstantRatio", "Static"}


def spaces() -> dict[str, list[str]]:
    """The default search space of every method, of every policy in KD, and of every preset."""
    texts = [format_call(kind.example()) for kind in METHODS.values()]
    texts += [f"kd(temperature={format_call(kind.example())})" for kind in POLICIES.values()]
    texts += [preset.spec for preset in PRESETS.values()]
    return {text: _dimensions(text) for text in texts}


def _dimensions(text: str) -> list[str]:
    try:
        return [str(d) for d in space_of(text).dimensions.values()]
    except ValueError as error:
        assert "nothing to search" in str(error)
        return []


def test_python_without_docstrings_searches_the_same() -> None:
    code = "import json; from tests.test_search_space import spaces; print(json.dumps([spaces.__doc__, spaces()]))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    docstring, said = json.loads(done.stdout)
    assert docstring is None and spaces.__doc__
    assert said == spaces()


@pytest.mark.parametrize("docstring", [None, "Nothing.\n\n    Args:\n        hard, eps, tau, reach: weight of it.\n"])
def test_docstrings_play_no_part(docstring: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spaces()
    bases = {base for kind in (*METHODS.values(), *POLICIES.values()) for base in kind.__mro__}
    for kind in bases:
        if kind.__module__.startswith("tempering."):
            monkeypatch.setattr(kind, "__doc__", docstring)
    assert spaces() == before
    assert papersdoc.parse_docstring(METHODS["KD"]) == ("Nothing." if docstring else "", [], "")
    assert cli.main(["list"]) == 0


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_methods_declare_their_weights_and_warm_up(name: str) -> None:
    markers = declared(METHODS[name].__init__)
    assert [argument for argument, marker in markers.items() if marker == Weight()] == WEIGHTS[name].split()
    has_warmup = "warmup" in inspect.signature(METHODS[name].__init__).parameters
    assert [argument for argument, marker in markers.items() if marker == Fraction()] == ["warmup"] * has_warmup
    softened = [argument for argument, marker in markers.items() if marker == Temperature()]
    assert softened == (["correct", "wrong"] if name == "ATS" else [])


@pytest.mark.parametrize("name", sorted(TEMPERATURES))
def test_policies_declare_their_reference_temperature(name: str) -> None:
    markers = declared(POLICIES[name].__init__)
    assert markers == {"tau": Temperature()} | ({"warmup": Fraction()} if name == "Instance" else {})


def test_ranges() -> None:
    assert Weight().range(2) == Range(0.2, 20.0, log=True) and Weight().range(0.0) is None
    assert Weight(factor=2).range(2) == Range(1.0, 4.0, log=True)
    assert Temperature().range(4.0) == Range(1.0, 10.0, log=True) and Temperature().range(0.0) is None
    assert Temperature().range(0.5) == Range(0.5, 10.0, log=True)
    assert Temperature().range(12.0) == Range(1.0, 24.0, log=True)
    assert Fraction().range(0) == Range(0.0, 0.25, log=False) and Fraction().range(0.5).high == 0.5


class Plain(Policy):
    """A policy that declares nothing.

    Args:
        tau: the teacher's temperature.
    """

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return Static(self.tau)(rows, progress)


class Undeclared(Method):
    """A method that declares nothing.

    Args:
        soft: weight of nothing.
    """

    def __init__(self, *, soft: float = 1.0, warmup: float = 0.0, temperature: Policy | None = None) -> None:
        super().__init__()
        self.soft, self.warmup, self.temperature = soft, warmup, temperature or Plain()

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {}


class Declared(Undeclared):
    """A method with a marker in a union, a bare one, one with a range of its own, and a name for type checkers."""

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight(factor=3.0)] | None = 1.0,
        warmup: Annotated[float, Fraction] = 0.0,
        temperature: Policy | None = None,
        folder: Elsewhere | None = None,
    ) -> None:
        super().__init__(soft=soft or 0.0, warmup=warmup, temperature=temperature)
        self.folder = folder


def test_what_is_not_declared_is_searched_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "Undeclared", Undeclared)
    monkeypatch.setitem(POLICIES, "Plain", Plain)
    with pytest.raises(ValueError, match=r"undeclared has nothing to search\. Name the arguments to vary: --space"):
        space_of("undeclared")
    space = space_of("undeclared", "soft=0.5..1, tau=1..2")
    assert [str(d) for d in space.varied] == ["soft=0.5..1 linear", "temperature.tau=1..2 linear"]


def test_a_method_of_ones_own_declares_what_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "Declared", Declared)
    monkeypatch.setitem(POLICIES, "Plain", Plain)
    assert [str(d) for d in space_of("declared").varied] == ["soft=0.333333..3 log", "warmup=0..0.25 linear"]


def test_a_marker_that_would_be_lost_is_refused() -> None:
    def function(*, soft: Annotated[Elsewhere, Weight()]) -> None: ...

    with pytest.raises(TypeError, match=r"annotation of 'soft'.*outside TYPE_CHECKING"):
        declared(function)


def test_markers_change_no_constructor() -> None:
    assert METHODS["KD"]().hyperparameters()["soft"] == 0.9
    with pytest.raises(ValueError, match="KD needs soft >= 0 and finite; got -1"):
        METHODS["KD"](soft=-1)
    parameter = inspect.signature(METHODS["KD"].__init__).parameters["soft"]
    assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, 0.9)
