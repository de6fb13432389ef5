"""Presets of methods for comparisons: name on the command line, label in records, and method."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tempering.utils.registry import suggest

if TYPE_CHECKING:
    from tempering.methods.base import Method

MATCHED = "KD, weight-matched"


class Preset(NamedTuple):
    """A method of a comparison: name, label in records, method as spec.py parses it, and temperature override."""

    name: str
    label: str
    spec: str
    temperature: str | None = None


PRESETS = {
    name: Preset(name, label, spec)
    for name, label, spec in (
        ("supervised", "student alone", "supervised"),
        ("kd", "KD", "kd"),
        ("kd-matched", MATCHED, "kd(soft=4, hard=1, warmup=20/240)"),
        ("kd-imagenet", "KD, ImageNet weights", "kd(soft=0.5, hard=0.5, temperature=static(1))"),
        ("dkd", "DKD", "dkd"),
        (
            "dkd-imagenet",
            "DKD, ImageNet weights",
            "dkd(target=1, non_target=0.5, warmup=1/100, temperature=static(1))",
        ),
        ("dtkd", "DTKD exact", "dtkd"),
        ("dtkd-exact", "DTKD exact", "dtkd"),
        ("dtkd-published", "DTKD published", "dtkd(temperature=sharpness(4, solve=published, differentiable=True))"),
        ("dtkd-max", "DTKD max", "dtkd(temperature=sharpness(4, solve=max))"),
        ("dtkd-absmax", "DTKD, max of |logits|", "dtkd(temperature=sharpness(4, solve=absmax, differentiable=True))"),
        ("dtkd-std", "DTKD std", "dtkd(temperature=sharpness(4, solve=std))"),
        ("dtkd-only", "DTKD, dynamic term only", "dtkd(soft=0)"),
        ("dkd-target", "DKD, target only", "dkd(non_target=0)"),
        ("dkd-rest", "DKD, rest only", "dkd(target=0)"),
        ("dkd-dynamic", "DKD, dynamic", "dkd(temperature=sharpness(4))"),
        ("dkd-target-dynamic", "DKD, target only, dynamic", "dkd(non_target=0, temperature=sharpness(4))"),
        ("dkd-rest-dynamic", "DKD, rest only, dynamic", "dkd(target=0, temperature=sharpness(4))"),
        ("ctkd", "CTKD", "kd(temperature=curriculum)"),
        ("ctkd-instance", "CTKD, by instance", "kd(temperature=curriculum(form=instance))"),
        ("itkd", "ITKD", "kd(temperature=instance)"),
        ("cosine", "KD, cosine-weighted T", "kd(temperature=cosine)"),
        ("normkd", "NormKD", "kd(temperature=standardized(2, scale=teacher, differentiable=True))"),
        ("standardized", "KD, standardized T", "kd(temperature=standardized(2, scale=tau))"),
        ("energy", "EnergyKD, bounds by block", "kd(temperature=energy)"),
        ("adaptive", "KD, T by difficulty (AdaKD)", "kd(temperature=adaptive(4))"),
        ("constant-ratio", "KD, T by the largest logit", "kd(temperature=constantratio)"),
        ("kdiga-control", "KDIGA without alignment", "kdiga(align=0)"),
        ("annealed", "KD, T annealed from 4 to 1", "kd(temperature=scheduled(static(4), end=1))"),
        ("dts", "DTS", "kd(temperature=dts)"),
        ("entropy", "DTKD, equal entropies", "dtkd(temperature=entropy(4))"),
        ("swing", "Swing", "swing"),
        ("redacted", "KD, private tokens left out", "swing(redact=True)"),
        ("dtkd-annealed", "DTKD, tau annealed from 4 to 2", "dtkd(temperature=scheduled(sharpness(4), end=2))"),
        ("dtkd-soften", "DTKD, T_t and T_s alone", "dtkd(temperature=ablated(sharpness(4), keep=temperatures))"),
        ("dtkd-weigh", "DTKD, scale T_t T_s alone", "dtkd(temperature=ablated(sharpness(4), keep=scale))"),
    )
}


def preset_from(text: str, temperature: str | None = None) -> Preset:
    """Return the preset with that name; any other text is parsed as a method and used as its label.

    ``temperature`` is a policy that replaces the method's own and becomes part of the label.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("a method is empty. Pass names or methods separated by commas, such as kd,dtkd.")
    preset = PRESETS.get(text.lower(), Preset(text, text, text))
    if temperature is None:
        return preset
    temperature = " ".join(temperature.split())
    return Preset(text, f"{preset.name} @ {temperature}", preset.spec, temperature)


def presets_from(methods: str, temperatures: str | None = None) -> list[Preset]:
    """Return the presets of a comma-separated list, without duplicates, times the temperatures if given.

    A method without a temperature appears once. The temperature "own" keeps a method's own.

    Raises:
        ValueError: if a preset cannot be built; suggests the closest name.
    """
    presets: dict[str, Preset] = {}
    for text in split(methods):
        for temperature in split(temperatures) if temperatures else ["own"]:
            keep_own = temperature == "own" or "temperature" not in method_of(text).hyperparameters()
            preset = preset_from(text, None if keep_own else temperature)
            method_of(text, preset.temperature)
            presets.setdefault(preset.label, preset)
    return list(presets.values())


def with_controls(presets: list[Preset]) -> tuple[list[Preset], list[Preset]]:
    """Prepend missing controls, and return (all, added controls): student alone, and KD with DTKD's total weights.

    The weights, warm-up and tau are those of most DTKD presets, else the published ones.
    """
    added = [] if any(preset.label == PRESETS["supervised"].label for preset in presets) else [PRESETS["supervised"]]
    if not any(preset.label == MATCHED for preset in presets):
        added.append(PRESETS["kd-matched"]._replace(spec=_equal_weights_spec(presets)))
    return [*added, *presets], added


def _equal_weights_spec(presets: list[Preset]) -> str:
    """Return KD with the total weights, warm-up and tau of most DTKD presets."""
    from tempering.methods.logits.dtkd import DTKD

    methods = [m for m in (method_of(preset.spec, preset.temperature) for preset in presets) if isinstance(m, DTKD)]
    if not methods:
        return PRESETS["kd-matched"].spec
    settings = [(m.dynamic + m.soft, m.hard, round(240 * m.warmup, 6), m.temperature.tau) for m in methods]
    soft, hard, warmup, tau = max(settings, key=settings.count)
    temperature = "" if tau == 4 else f", temperature=static({tau:g})"
    return f"kd(soft={soft:g}, hard={hard:g}, warmup={warmup:g}/240{temperature})"


def run_label(preset: Preset, student: str, *, second_stage: bool = False) -> str:
    """The label of a run in tables: its preset's, and what its student has in addition."""
    from tempering.models import parted

    attention, _ = parted(student)
    return preset.label + (f" + {attention.upper()}" if attention else "") + (", second stage" if second_stage else "")


def slug(text: str) -> str:
    """Convert ``text`` to a folder name: lower case, letters, digits, dots and dashes, at most 48 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:48].rstrip("-.") or "arm"


def split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def method_of(text: str, temperature: str | None = None) -> Method:
    """Return the method of a preset's name or of any other text.

    Raises:
        ValueError: if it cannot be built; suggests the closest name.
    """
    from tempering.experiments.spec import method_from
    from tempering.methods import METHODS

    preset = preset_from(text)
    if re.fullmatch(r"[\w-]+", preset.spec) and METHODS.find(preset.spec) is None:
        names = {name.lower() for name in METHODS} | set(PRESETS)
        raise ValueError(
            f"no method is called {text!r}.{suggest(text, names)} There are: {', '.join(sorted(names))}; or "
            "write a method with its arguments, as in dtkd(soft=0.5)."
        )
    return method_from(preset.spec, temperature)
