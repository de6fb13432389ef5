"""The command that audits a run: its models and data from its recipe, its findings beside its records."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress, arg

from tempering.experiments import recipe as recipes

if TYPE_CHECKING:
    from torch import nn

    from tempering.audits import Audit
    from tempering.teachers.base import Teacher
    from tempering.temperature.base import Policy
    from tempering.training.experiment import Experiment

FORMAT = 1
KINDS = ("calibration", "explanation", "robustness", "privacy")  # cheap ones first


@dataclass(frozen=True)
class Asked:
    """What was asked for beside the kinds of audits; None leaves an audit's own default."""

    samples: int | None
    eps: float | None
    autoattack: bool
    shadows: int
    seed: int


def audit(
    run: Annotated[Path, Positional, arg(metavar="RUN|CHECKPOINT")],
    *,
    calibration: bool = False,
    explanation: bool = False,
    robustness: bool = False,
    privacy: bool = False,
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    split: str = "test",
    samples: int | None = None,
    eps: float | None = None,
    autoattack: bool = False,
    shadows: int = 0,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
    recipe_args: Annotated[tuple[str, ...], Suppress] = (),
) -> int:
    """Audit a trained student beside its teacher; every kind of audit where none is named.

    tempering audit runs/first --calibration --privacy
    tempering audit student.safetensors --robustness --recipe cifar100 -- --data DIR --student resnet8x4

    The recipe says which nets and which data: the one that the run was started with and its flags, to which those
    behind the -- are added; nothing is trained. Findings go to audits.json beside the run's records, each audit as it
    ends, and the report shows them. An interrupted audit begins again, finished ones are kept.

    Args:
        run: a run's folder; or weights, a .safetensors file or a checkpoint's folder.
        calibration: ECE, Brier score, NLL, and the temperature that would mend them.
        explanation: agreement by class and by difficulty, input gradients, Grad-CAM, representations, which samples the
            temperature treated as hard; an explainer's tree.
        robustness: FGSM, PGD and whether they may be believed, certified radii, common corruptions.
        privacy: membership inference; of a text with planted canaries, their exposure.
        recipe: the recipe, where the run does not say; then its flags are those behind the -- alone.
        split: of the data to audit: test or validation. Members, for privacy, are those of the training split.
        samples: rows to look at; by itself all for calibration and agreement, 1000 for attacks, 2000 for privacy.
        eps: strength of attacks in pixels of [0, 1]; by itself 8/255.
        autoattack: AutoAttack too, which takes long (extra "robustness").
        shadows: shadow models that LiRA trains, an even number of 4 or more; 0 leaves LiRA out.
        seed: of random starts, halves and resamples.
        device: where the models answer: auto, cpu, cuda, cuda:1, mps.
        overwrite: repeat finished audits.
        quiet: no tables.
    """
    chosen = {"calibration": calibration, "explanation": explanation, "robustness": robustness, "privacy": privacy}
    kinds = [kind for kind in KINDS if chosen[kind]] or list(KINDS)
    folder, weights, place = _target(run)
    experiment = _described(run, folder, recipe, recipe_args)
    where = _device(device)
    student = _weighed(experiment.student, weights).to(where)
    teacher = None if experiment.made_teacher is None else _teacher(experiment.made_teacher).to(where)
    data = experiment.splits.get(split)
    if data is None:
        there = ", ".join(name for name, batches in experiment.splits.items() if batches)
        raise ValueError(f"the run has no {split} split; it has {there}.")
    asked = Asked(samples, eps, autoattack, shadows, seed)
    if teacher is None and "explanation" in kinds:
        if explanation:
            raise ValueError("--explanation compares a student with its teacher, and this run has none.")
        kinds.remove("explanation")
    record = _Record(place, {"split": split, **_identities(student, experiment, data)}, again=overwrite)
    for kind in kinds:
        findings = record.made(kind, _auditor(kind, asked, folder, experiment, data), student, teacher, data)
        if not quiet:
            _show(kind, findings)
    print(f"findings, and what each means: {place}")
    return 0


# what is audited


def _target(run: Path) -> tuple[Path | None, Path, Path]:
    """(the run's folder where there is one, the weights, where findings go)."""
    if (run / "facts.json").is_file():
        weights = run / "student.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(
                f"{run} has no student.safetensors: it has not finished. Give one of its checkpoints."
            )
        return run, weights, run / "audits.json"
    if not run.exists():
        raise FileNotFoundError(
            f"there is no {run}. Give a run's folder, a .safetensors file or a checkpoint's folder."
        )
    if run.is_dir() and not (run / "state.json").is_file():
        raise FileNotFoundError(f"{run} is neither a run (facts.json) nor a checkpoint (state.json).")
    above = run.resolve().parents[1 if run.is_dir() else 0]
    return (above if (above / "facts.json").is_file() else None), run, run.with_name(f"{run.stem}.audits.json")


def _described(run: Path, folder: Path | None, recipe: str | None, recipe_args: Sequence[str]) -> Experiment:
    """The run as its recipe describes it, with its trained teacher."""
    from tempering.training.experiment import UntrainedTeacherError

    recorded: Sequence[str] = ()
    if recipe is None:
        recipe, recorded = _recorded(run, folder)
    file = recipes.find(recipe)
    given = [*recorded, *recipe_args]
    named = any(word.split("=")[0] == "--out" for word in recipe_args)
    if folder is not None and "out" in recipes.flags(file) and not named:
        given += ["--out", str(folder)]  # next to which its teacher is kept
    experiment = recipes.describe(file, given, prog=f"tempering audit {run} --")
    try:
        return experiment.with_teacher("present", cached=False)
    except UntrainedTeacherError as error:
        raise ValueError(
            f"the recipe {file.name} would train its teacher first, so the teacher of {run} was not found. Say where "
            "it is with the recipe's flags behind the --, such as --teacher-dir DIR or --out RUN."
        ) from error


def _recorded(run: Path, folder: Path | None) -> tuple[str, tuple[str, ...]]:
    """The recipe and flags that a run was started with."""
    command = [] if folder is None else json.loads((folder / "facts.json").read_text()).get("command") or []
    if len(command) > 2 and command[1] == "run":
        return command[2], tuple(word for word in command[3:] if word != "--")
    raise ValueError(
        f"nothing says which recipe {run} was trained by. Name it, and the run's flags: tempering audit {run} --recipe "
        "digits -- --method dtkd"
    )


def _weighed(student: nn.Module, weights: Path) -> nn.Module:
    from tempering.models import load
    from tempering.training import checkpoint as checkpoints

    if not weights.is_dir():
        return load(student, weights)
    try:
        student.load_state_dict(checkpoints.read(weights)["student"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{weights} does not hold this {type(student).__name__}: {error}") from error
    return student


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _teacher(teacher: Teacher) -> nn.Module:
    """The live teacher, in float32 at least."""
    model = teacher.model
    if model is None:
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, which knows the answers to its own inputs alone; an "
            "audit asks the model itself. Leave the cache's flag out."
        )
    if any(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point()):
        return copy.deepcopy(model).float()
    return model


def _identities(student: nn.Module, experiment: Experiment, data: Any) -> dict[str, Any]:
    """What findings are of: other weights or other data make them void."""
    from tempering.teachers.base import fingerprint

    teacher = None if experiment.made_teacher is None else experiment.made_teacher.identity
    return {"student": fingerprint(student), "teacher": teacher, "data": getattr(data, "identity", None)}


# the audits


def _auditor(kind: str, asked: Asked, folder: Path | None, experiment: Experiment, data: Any) -> Audit:
    from tempering.audits import AUDITS
    from tempering.audits.canaries import Canaries

    planted = getattr(experiment.train, "canaries", ())
    if kind == "privacy" and planted:  # a text's secrets, rather than whether its pieces were trained on
        return Canaries(planted, seed=asked.seed)
    return AUDITS[kind.capitalize()](**_settings(kind, asked, folder, experiment, data))


def _settings(kind: str, asked: Asked, folder: Path | None, experiment: Experiment, data: Any) -> dict[str, Any]:
    """An audit's arguments: what was asked for, and what the run and its data say."""
    from torch.fx import GraphModule

    from tempering.models import stages

    how: dict[str, Any] = {} if asked.samples is None else {"samples": asked.samples}
    if kind != "explanation":
        how["seed"] = asked.seed
    if kind == "calibration":
        how["taught"] = _taught(folder)
    elif kind == "explanation":
        model = None if experiment.made_teacher is None else experiment.made_teacher.model
        # a folded copy calls the leaves alone, so its stages cannot be tapped
        theirs = {} if model is None or isinstance(model, GraphModule) else dict(model.named_modules())
        how["layers"] = {name: (name, name) for name in stages(experiment.student) if name in theirs}
        how["class_names"] = getattr(data, "class_names", None)
        how["policy"] = _policy(folder, experiment, data)
    elif kind == "robustness":
        if not hasattr(data, "mean") or not hasattr(data, "std"):
            raise ValueError(
                f"attacks work on pixels, and {type(data).__name__} does not say the mean and std that it normalizes "
                "with. Give the loader these attributes, or call audits.Robustness(mean=, std=) yourself."
            )
        how |= {"mean": tuple(data.mean), "std": tuple(data.std), "auto": asked.autoattack}
        how |= {} if asked.eps is None else {"eps": asked.eps}
    else:
        members: Any = experiment.train
        how |= {"members": members.clean() if hasattr(members, "clean") else members, "shadows": asked.shadows}
    return how


def _policy(folder: Path | None, experiment: Experiment, data: Any) -> Policy | None:
    """The run's own policy that can tell samples apart; one that learned, with what the last checkpoint holds of it.

    None where there is none, where no run says which, or where what it learned is not there any more.
    """
    from tempering.audits.base import answers
    from tempering.rows import Rows
    from tempering.temperature.static import Static
    from tempering.training import checkpoint as checkpoints

    named = experiment.method.policies()
    name = next((name for name, policy in named.items() if not isinstance(policy, Static)), None)
    if folder is None or name is None or experiment.made_teacher is None or experiment.made_teacher.model is None:
        return None
    said, y = answers({"student": experiment.student, "teacher": _teacher(experiment.made_teacher)}, data, 8)
    named[name].setup(Rows(said["student"].float(), said["teacher"].float(), y))
    if named[name].state_dict():
        state = checkpoints.load(folder / "checkpoints")
        if state is None:
            return None
        inside = [key for key in state["method"] if key.startswith(f"{name}.")]
        named[name].load_state_dict({key.removeprefix(f"{name}."): state["method"][key] for key in inside})
    return named[name]


def _taught(folder: Path | None) -> dict[str, float] | None:
    """Mean temperatures of the run's last recorded step."""
    if folder is None:
        return None
    from tempering.utils.files import read_json_lines

    steps = [line for line in read_json_lines(folder / "steps.jsonl") if "T_student" in line]
    return {side: steps[-1][f"T_{side}"]["mean"] for side in ("student", "teacher")} if steps else None


class _Record:
    """audits.json: what was found of one student, kept from one command to the next."""

    def __init__(self, place: Path, of: Mapping[str, Any], *, again: bool) -> None:
        # data that does not say what it is may be other data
        self.place, self.again = place, again or of["data"] is None
        self.content: dict[str, Any] = {"format": FORMAT, "of": dict(of), "audits": {}}
        if place.is_file():
            older = json.loads(place.read_text())
            if older.get("format") == FORMAT and older.get("of") == self.content["of"]:
                self.content = older

    def made(
        self, kind: str, auditor: Audit, student: nn.Module, teacher: nn.Module | None, data: Any
    ) -> list[dict[str, Any]]:
        """The findings: those there are of the same settings, else new ones, written as soon as they are whole."""
        from tempering.training.recorder import surroundings
        from tempering.utils.files import write_atomic

        settings = json.loads(json.dumps(_plain(vars(auditor)), default=dataclasses.asdict))
        older = self.content["audits"].get(kind)
        if older and older["settings"] == settings and not self.again:
            return older["findings"]
        begin = time.monotonic()
        found = [dataclasses.asdict(f) for f in auditor(student, teacher, data)]
        said = {"settings": settings, "seconds": round(time.monotonic() - begin, 1), "findings": found}
        if drawn := auditor.report_data(student):
            said["drawn"] = drawn
        around = {k: v for k, v in surroundings().items() if k != "host"}
        self.content["audits"][kind] = {**said, **around}
        write_atomic(self.place, json.dumps(self.content, indent=1, allow_nan=False))
        return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON; data by its identity, or its type."""
    plain = (int, float, str, dict, list, tuple, type(None))
    return {
        name: value if isinstance(value, plain) else getattr(value, "identity", type(value).__name__)
        for name, value in settings.items()
        if not name.startswith("_") and (name != "members" or hasattr(value, "identity"))
    }


def _show(kind: str, findings: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tempering.reports.audit_section import finding_text

    table = Table(title=kind, title_justify="left")
    for head in ("of", "number", "value", "95 % interval", "n"):
        table.add_column(head, overflow="fold")
    for finding in findings:
        row = finding_text(finding)
        table.add_row(row.of, row.name, row.value, row.interval, row.n)
    Console().print(table, markup=False)
