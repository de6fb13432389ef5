"""Named arms of a comparison: what is typed, how a table calls it, and the method it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tempering.utils.registry import suggest

if TYPE_CHECKING:
    from tempering.methods.base import Method

MATCHED = "KD, weight-matched"


class Arm(NamedTuple):
    """An arm: the name that is typed, the label in tables, the method as specs.py reads it, and another temperature."""

    name: str
    label: str
    spec: str
    temperature: str | None = None


ARMS = {
    name: Arm(name, label, spec)
    for name, label, spec in (
        ("supervised", "student alone", "supervised"),
        ("kd", "KD", "kd"),
        ("kd-matched", MATCHED, "kd(soft=4, hard=1, warmup=20/240)"),
        ("dkd", "DKD", "dkd"),
        ("dtkd", "DTKD exact", "dtkd"),
        ("dtkd-exact", "DTKD exact", "dtkd"),
        ("dtkd-published", "DTKD published", "dtkd(temperature=sharpness(4, solve=published, attached=True))"),
        ("dtkd-max", "DTKD max", "dtkd(temperature=sharpness(4, solve=max))"),
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
        ("normkd", "NormKD", "kd(temperature=standardized(2, scale=teacher, attached=True))"),
        ("standardized", "KD, standardized T", "kd(temperature=standardized(2, scale=tau))"),
        ("energy", "EnergyKD, bounds by block", "kd(temperature=energy)"),
        ("adaptive", "KD, T by difficulty (AdaKD)", "kd(temperature=adaptive(4))"),
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


def arm_from(text: str, temperature: str | None = None) -> Arm:
    """The arm of that name; any other text is a method of its own, labeled by itself.

    ``temperature`` is a policy that takes the place of the method's own, and is a part of the label.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("an arm is empty. Give names or methods with commas between, such as kd,dtkd.")
    arm = ARMS.get(text.lower(), Arm(text, text, text))
    if temperature is None:
        return arm
    temperature = " ".join(temperature.split())
    return Arm(text, f"{arm.name} @ {temperature}", arm.spec, temperature)


def arms_from(methods: str, temperatures: str | None = None) -> list[Arm]:
    """The arms of a comma-separated list, each once, times the temperatures where there are some.

    A method that looks at no temperature stands there once. "own" as a temperature leaves a method its own.

    Raises:
        ValueError: for an arm that cannot be made, naming the nearest.
    """
    arms: dict[str, Arm] = {}
    for text in split(methods):
        for temperature in split(temperatures) if temperatures else ["own"]:
            own = temperature == "own" or "temperature" not in method_of(text).hyperparameters()
            arm = arm_from(text, None if own else temperature)
            method_of(text, arm.temperature)
            arms.setdefault(arm.label, arm)
    return list(arms.values())


def with_controls(arms: list[Arm]) -> tuple[list[Arm], list[Arm]]:
    """The arms behind the controls that were missing, and those: the student alone, and KD at DTKD's total weights.

    The weights, warm-up and tau are those of most DTKD arms, else the published ones.
    """
    added = [] if any(arm.label == ARMS["supervised"].label for arm in arms) else [ARMS["supervised"]]
    if not any(arm.label == MATCHED for arm in arms):
        added.append(ARMS["kd-matched"]._replace(spec=_matched(arms)))
    return [*added, *arms], added


def _matched(arms: list[Arm]) -> str:
    """KD at the total weights, warm-up and tau of most DTKD arms."""
    from tempering.methods.logits.dtkd import DTKD

    made = [m for m in (method_of(arm.spec, arm.temperature) for arm in arms) if isinstance(m, DTKD)]
    if not made:
        return ARMS["kd-matched"].spec
    found = [(m.dynamic + m.soft, m.hard, round(240 * m.warmup, 6), m.temperature.tau) for m in made]
    soft, hard, warmup, tau = max(found, key=found.count)
    temperature = "" if tau == 4 else f", temperature=static({tau:g})"
    return f"kd(soft={soft:g}, hard={hard:g}, warmup={warmup:g}/240{temperature})"


def run_label(arm: Arm, student: str, *, second_stage: bool = False) -> str:
    """The label of a run in tables: its arm's, and what its student has in addition."""
    from tempering.models import parted

    attention, _ = parted(student)
    return arm.label + (f" + {attention.upper()}" if attention else "") + (", second stage" if second_stage else "")


def slug(text: str) -> str:
    """``text`` as the name of a folder: lower case, letters, digits, dots and dashes, at most 48."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:48].rstrip("-.") or "arm"


def split(text: str) -> list[str]:
    """The parts between commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def method_of(text: str, temperature: str | None = None) -> Method:
    """The method of an arm, of its name or of any other text.

    Raises:
        ValueError: for one that cannot be made, naming the nearest arm or method.
    """
    from tempering.experiments.spec import method_from
    from tempering.methods import METHODS

    arm = arm_from(text)
    if re.fullmatch(r"[\w-]+", arm.spec) and METHODS.find(arm.spec) is None:
        known = {name.lower() for name in METHODS} | set(ARMS)
        raise ValueError(
            f"no arm or method is called {text!r}.{suggest(text, known)} There are: {', '.join(sorted(known))}; or "
            "write a method with its arguments, as in dtkd(soft=0.5)."
        )
    return method_from(arm.spec, temperature)
