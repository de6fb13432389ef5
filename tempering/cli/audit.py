"""Audit a run: the command `tempering audit`, with models and data of the run's recipe."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress, arg

from tempering.experiments.flag_files import recorded_command
from tempering.experiments.former_names import present_flags
from tempering.experiments.recipe import describe, find, flags

if TYPE_CHECKING:
    from torch import nn

    from tempering.audits import Audit
    from tempering.teachers.base import Teacher
    from tempering.temperature.base import Policy
    from tempering.training.experiment import Experiment

FORMAT = 1
KINDS = ("calibration", "explanation", "robustness", "privacy")  # in order of cost


@dataclass(frozen=True)
class AuditOptions:
    """Options of the audits; None is the default of each audit."""

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
    """Audit a trained student and its teacher; run every kind of audit if none is named.

    tempering audit runs/first --calibration --privacy
    tempering audit student.safetensors --robustness --recipe cifar100 -- --data DIR --student resnet8x4

    The networks and the data are those of the run's recipe and its flags; flags after the -- are added. Nothing is
    trained. Findings are written to audits.json in the run's folder after each audit, and the report shows them. An
    interrupted audit is repeated, finished ones are kept.

    Args:
        run: a run's folder, a .safetensors file, or a checkpoint's folder.
        calibration: ECE, Brier score, NLL, and the temperature that minimizes NLL.
        explanation: agreement by class and by difficulty, input gradients, Grad-CAM, representations, the samples that
            the temperature treats as hard, and an explainer's tree.
        robustness: FGSM and PGD with checks for gradient masking, certified radii, common corruptions.
        privacy: membership inference; for a text with planted canaries, their exposure.
        recipe: the recipe, if it is not recorded in the run; its flags are then only those after the --.
        split: split to audit: test or validation. For privacy, members are samples of the training split.
        samples: number of samples; default: all for calibration and agreement, 1000 for attacks, 2000 for privacy.
        eps: l-infinity strength of attacks, in pixels of [0, 1]; default: 8/255.
        autoattack: run AutoAttack too, which is slow (extra "robustness").
        shadows: number of shadow models to train for LiRA, even and 4 or more; 0 omits LiRA.
        seed: random seed of attack starts, splits and bootstrap resamples.
        device: device of the models: auto, cpu, cuda, cuda:1, mps.
        overwrite: repeat finished audits.
        quiet: print no tables.
    """
    chosen = {"calibration": calibration, "explanation": explanation, "robustness": robustness, "privacy": privacy}
    kinds = [kind for kind in KINDS if chosen[kind]] or list(KINDS)
    folder, weights, audits_file = _target(run)
    experiment = _describe_run(run, folder, recipe, recipe_args)
    device = _resolve_device(device)
    student = _load_weights(experiment.student, weights).to(device)
    teacher = None if experiment.resolved_teacher is None else _teacher_model(experiment.resolved_teacher).to(device)
    data = experiment.splits.get(split)
    if data is None:
        names = ", ".join(name for name, batches in experiment.splits.items() if batches)
        raise ValueError(f"the run has no {split} split; it has {names}.")
    options = AuditOptions(samples, eps, autoattack, shadows, seed)
    if teacher is None and "explanation" in kinds:
        if explanation:
            raise ValueError("--explanation compares a student with its teacher, and this run has none.")
        kinds.remove("explanation")
    record = _AuditRecord(audits_file, {"split": split, **_identities(student, experiment, data)}, overwrite=overwrite)
    for kind in kinds:
        findings = record.run(kind, _make_audit(kind, options, folder, experiment, data), student, teacher, data)
        if not quiet:
            _show(kind, findings)
    print(f"findings, and the meaning of each: {audits_file}")
    return 0


# models and data


def _target(run: Path) -> tuple[Path | None, Path, Path]:
    """Return the run's folder or None, the path of the weights, and the path of audits.json."""
    if (run / "facts.json").is_file():
        weights = run / "student.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(
                f"{run} has no student.safetensors: it is not finished. Give one of its checkpoints."
            )
        return run, weights, run / "audits.json"
    if not run.exists():
        raise FileNotFoundError(
            f"there is no {run}. Give a run's folder, a .safetensors file or a checkpoint's folder."
        )
    if run.is_dir() and not (run / "state.json").is_file():
        raise FileNotFoundError(f"{run} is neither a run (facts.json) nor a checkpoint (state.json).")
    parent = run.resolve().parents[1 if run.is_dir() else 0]
    return (parent if (parent / "facts.json").is_file() else None), run, run.with_name(f"{run.stem}.audits.json")


def _describe_run(run: Path, folder: Path | None, recipe: str | None, recipe_args: Sequence[str]) -> Experiment:
    """Return the run's Experiment with its trained teacher."""
    from tempering.training.experiment import UntrainedTeacherError
    from tempering.utils.files import read_verified

    recorded: Sequence[str] = ()
    if recipe is None:
        try:
            facts = {} if folder is None else read_verified(folder / "facts.json")
            recipe, recorded = recorded_command(facts, run)
        except ValueError as error:
            raise ValueError(
                f"{error} Give it, and the run's flags: tempering audit {run} --recipe digits -- --method dtkd"
            ) from error
    file = find(recipe)
    argv = [*present_flags(recorded, flags(file)), *recipe_args]
    has_out = any(word.split("=")[0] == "--out" for word in recipe_args)
    if folder is not None and "out" in flags(file) and not has_out:
        argv += ["--out", str(folder)]  # the folder of teachers is next to it
    experiment = describe(file, argv, prog=f"tempering audit {run} --")
    try:
        return experiment.with_teacher("present", cached=False)
    except UntrainedTeacherError as error:
        raise ValueError(
            f"the recipe {file.name} would train its teacher first, so the teacher of {run} was not found. Give its "
            "folder with the recipe's flags after the --, such as --teacher-dir DIR or --out RUN."
        ) from error


def _load_weights(student: nn.Module, weights: Path) -> nn.Module:
    from tempering.models import load
    from tempering.training import checkpoint

    if not weights.is_dir():
        return load(student, weights)
    try:
        student.load_state_dict(checkpoint.read(weights)["student"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{weights} does not hold this {type(student).__name__}: {error}") from error
    return student


def _resolve_device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _teacher_model(teacher: Teacher) -> nn.Module:
    """Return the teacher's network, in float32 or float64."""
    model = teacher.model
    if teacher.parts and len(teacher.models) == len(teacher.parts):
        from tempering.teachers.combined import AsModule

        return AsModule(teacher)
    if model is None or teacher.parts:
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}, which has logits of the cached samples only; an "
            "audit needs the network. Omit the flag of the cache."
        )
    if any(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point()):
        from tempering.utils.tensors import copy_model

        return copy_model(model).float()
    return model


def _identities(student: nn.Module, experiment: Experiment, data: Any) -> dict[str, Any]:
    """Return the identities of models and data; findings about others are not reused."""
    from tempering.teachers.base import fingerprint

    teacher = None if experiment.resolved_teacher is None else experiment.resolved_teacher.identity
    return {"student": fingerprint(student), "teacher": teacher, "data": getattr(data, "identity", None)}


# the audits


def _make_audit(kind: str, options: AuditOptions, folder: Path | None, experiment: Experiment, data: Any) -> Audit:
    from tempering.audits import AUDITS
    from tempering.audits.canaries import Canaries

    planted = getattr(experiment.train, "canaries", ())
    if kind == "privacy" and planted:  # exposure of canaries instead of membership inference
        return Canaries(planted, seed=options.seed)
    return AUDITS[kind.capitalize()](**_arguments(kind, options, folder, experiment, data))


def _arguments(
    kind: str, options: AuditOptions, folder: Path | None, experiment: Experiment, data: Any
) -> dict[str, Any]:
    """Return the arguments of an audit's constructor."""
    from torch.fx import GraphModule

    from tempering.models import stages
    from tempering.tasks.language_modeling import LanguageModeling
    from tempering.tasks.text_classification import TextClassification

    arguments: dict[str, Any] = {} if options.samples is None else {"samples": options.samples}
    if kind != "explanation":
        arguments["seed"] = options.seed
    if kind == "calibration":
        arguments["temperatures"] = _mean_temperatures(folder)
        if isinstance(experiment.task, (LanguageModeling, TextClassification)):
            arguments["task"] = experiment.task
    elif kind == "explanation":
        model = None if experiment.resolved_teacher is None else experiment.resolved_teacher.model
        # a GraphModule (fused batch norms) calls only leaf modules, so hooks on its stages do not run
        teacher_modules = {} if model is None or isinstance(model, GraphModule) else dict(model.named_modules())
        arguments["layers"] = {name: (name, name) for name in stages(experiment.student) if name in teacher_modules}
        arguments["class_names"] = getattr(data, "class_names", None)
        arguments["policy"] = _policy(folder, experiment, data)
    elif kind == "robustness":
        if not hasattr(data, "mean") or not hasattr(data, "std"):
            raise ValueError(
                f"attacks work on pixels, and {type(data).__name__} has no attributes mean and std. Add them to "
                "the loader, or call audits.Robustness(mean=, std=) yourself."
            )
        arguments |= {"mean": tuple(data.mean), "std": tuple(data.std), "auto": options.autoattack}
        arguments |= {} if options.eps is None else {"eps": options.eps}
    else:
        members: Any = experiment.train
        arguments |= {"members": members.clean() if hasattr(members, "clean") else members, "shadows": options.shadows}
    return arguments


def _policy(folder: Path | None, experiment: Experiment, data: Any) -> Policy | None:
    """Return the run's temperature policy, with its state from the newest checkpoint.

    None if the method has only static temperatures, or if the run, its live teacher or its checkpoint is missing.
    """
    from tempering.audits.base import collect_logits
    from tempering.rows import Rows
    from tempering.temperature.static import Static
    from tempering.training import checkpoint

    policies = experiment.method.policies()
    name = next((name for name, policy in policies.items() if not isinstance(policy, Static)), None)
    if (
        folder is None
        or name is None
        or experiment.resolved_teacher is None
        or experiment.resolved_teacher.model is None
    ):
        return None
    models = {"student": experiment.student, "teacher": _teacher_model(experiment.resolved_teacher)}
    logits, y = collect_logits(models, data, 8)
    policy = policies[name]
    policy.setup(Rows(logits["student"].float(), logits["teacher"].float(), y))
    if policy.state_dict():
        state = checkpoint.load(folder / "checkpoints")
        if state is None:
            return None
        keys = [key for key in state["method"] if key.startswith(f"{name}.")]
        policy.load_state_dict({key.removeprefix(f"{name}."): state["method"][key] for key in keys})
    return policy


def _mean_temperatures(folder: Path | None) -> dict[str, float] | None:
    """Return the mean temperatures of the run's last recorded step."""
    if folder is None:
        return None
    from tempering.utils.files import read_json_lines

    steps = [line for line in read_json_lines(folder / "steps.jsonl") if "T_student" in line]
    return {side: steps[-1][f"T_{side}"]["mean"] for side in ("student", "teacher")} if steps else None


class _AuditRecord:
    """The file audits.json: findings about one student.

    Args:
        path: of the file.
        subject: identities of models and data; findings about others are discarded.
        overwrite: whether to repeat finished audits.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any], *, overwrite: bool) -> None:
        # data without identity may be other data
        self.path, self.overwrite = path, overwrite or subject["data"] is None
        self.content: dict[str, Any] = {"format": FORMAT, "of": dict(subject), "audits": {}}
        if path.is_file():
            from tempering.utils.files import read_verified

            previous = read_verified(path)
            previous.pop("sha256", None)
            if previous.get("format") == FORMAT and previous.get("of") == self.content["of"]:
                self.content = previous

    def run(
        self, kind: str, audit: Audit, student: nn.Module, teacher: nn.Module | None, data: Any
    ) -> list[dict[str, Any]]:
        """Return the recorded findings if the settings are equal; otherwise run the audit and record its findings."""
        from tempering.training.run_records import surroundings
        from tempering.utils.files import sealed, write_atomic

        settings = json.loads(json.dumps(_plain(vars(audit)), default=dataclasses.asdict))
        previous = self.content["audits"].get(kind)
        if previous and previous["settings"] == settings and not self.overwrite:
            return previous["findings"]
        start = time.monotonic()
        findings = [dataclasses.asdict(finding) for finding in audit(student, teacher, data)]
        result = {"settings": settings, "seconds": round(time.monotonic() - start, 1), "findings": findings}
        if report_data := audit.report_data(student):
            result["drawn"] = report_data
        environment = {k: v for k, v in surroundings().items() if k != "host"}
        self.content["audits"][kind] = {**result, **environment}
        write_atomic(self.path, sealed(json.loads(json.dumps(self.content, allow_nan=False))))
        return findings


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to JSON; data is its identity or the name of its type."""
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
