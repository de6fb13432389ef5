"""The grid of a comparison: its cells, what makes each of them itself, and the file that remembers it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempering.experiments.presets import Arm, slug
from tempering.reports.records import MACHINE_PATH
from tempering.utils.files import sha256_text, write_atomic

FILE = "plan.json"
OWN = ("method", "temperature", "seed", "label", "out")  # flags that a cell sets
ELSEWHERE = {"threads", "teacher_dir", "quiet", "out", "keep"}  # flags that say where or how fast, not what
FORMAT = 2  # of a plan; 1 has flags by their former names
# flag -> its former name, under which the ids of cells are made: a renamed flag is the same cell. (--subset and --views
# were not renamed to --max-train-samples and --second-view: published commands use them.)
FORMER = {
    "text_source": "writes",
    "max_new_tokens": "written",
    "prompt_length": "prompt",
    "generated_fraction": "share",
    "eval_generation": "grade",
    "no_eval_generation": "no_grade",
    "routing_tree": "tree",
    "cuda_graphs": "graphs",
    "canaries_per_count": "each",
    "canary_digits": "digits",
    "privacy_detectors": "private",
    "class_rows": "rows",
    "anchors_per_image": "keep",
    "resize_mode": "fit",
    "train_file": "train",
}
PRESENT = {former: name for name, former in FORMER.items()}
# the same for words of methods and policies
FORMER_WORDS = {"standardized": "standardised", "ablated": "isolated", "non_target": "rest"}
PRESENT_WORDS = {former: word for word, former in FORMER_WORDS.items()}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        id: readable, and a hash of what makes it this run; the name of its record.
        label: the arm's, as tables show it.
        method: as the recipe's --method reads it.
        temperature: as its --temperature does; None for the method's own.
        seed: by which cells of two arms are paired.
    """

    id: str
    label: str
    method: str
    temperature: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of.

    Attributes:
        recipe: the recipe's name.
        flags: its flags, the same in all cells; paths of the machine cut to their last part.
        control: label of the arm that differences are taken to; None is the report's choice.
        cells: by arm, then by seed.
    """

    recipe: str
    flags: dict[str, str]
    control: str | None
    cells: tuple[Cell, ...]


def plan_for(
    recipe: Path, arms: Sequence[Arm], seeds: Sequence[int], flags: Sequence[str], control: str | None = None
) -> Plan:
    """The grid of arms times seeds.

    Raises:
        ValueError: for flags that cannot be read, or that the grid sets itself.
    """
    what = shared_flags(flags, OWN, "compare")
    cells = [
        Cell(_id(recipe.stem, arm, seed, what), arm.label, arm.spec, arm.temperature, seed)
        for arm in arms
        for seed in seeds
    ]
    return Plan(recipe.stem, what, control, tuple(cells))


def shared_flags(flags: Sequence[str], own: Collection[str], command: str) -> dict[str, str]:
    """The flags that say what is run, name -> value, sorted; those of ``ELSEWHERE`` left out.

    Raises:
        ValueError: for flags that cannot be read, or that ``command`` sets itself, which are ``own``.
    """
    found = dict(sorted(_pairs(flags)))
    if taken := sorted(set(found) & set(own)):
        raise ValueError(f"{command} sets --{taken[0]} itself, in every run another; take it out from behind the --.")
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def merged(folder: Path, plan: Plan) -> Plan:
    """The grid that ``folder`` holds, widened by ``plan``; ``plan`` itself where there is none.

    Raises:
        ValueError: where the folder holds a grid of another recipe or other flags, naming what differs.
    """
    if not (folder / FILE).is_file():
        return plan
    old = read(folder)
    differ = [name for name in sorted({*old.flags, *plan.flags}) if old.flags.get(name) != plan.flags.get(name)]
    if old.recipe != plan.recipe or differ:
        name = differ[0] if differ else "recipe"
        then, now = (old.flags.get(name), plan.flags.get(name)) if differ else (old.recipe, plan.recipe)
        raise ValueError(
            f"{folder} holds another grid: its {name} was {then!r}, now it is {now!r}, and one table cannot hold both. "
            "Give another --out."
        )
    cells = {(cell.method, cell.temperature, cell.seed): cell for cell in old.cells}  # these keep their ids
    for cell in plan.cells:
        cells.setdefault((cell.method, cell.temperature, cell.seed), cell)
    return Plan(plan.recipe, plan.flags, plan.control or old.control, tuple(cells.values()))


def read(folder: Path) -> Plan:
    """The grid that ``folder`` holds.

    Raises:
        FileNotFoundError: where it holds none.
        ValueError: where its file is broken.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no comparison: there is no {FILE}. Start one: tempering compare RECIPE --methods a,b "
            f"--out {folder}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(
            Cell(**cell | {"method": _replace_words(cell["method"], PRESENT_WORDS)}) for cell in content["cells"]
        )
        flags: dict[str, str] = content["flags"]
        if content["format"] == 1:
            flags = {PRESENT.get(name, name): value for name, value in flags.items()}
        return Plan(content["recipe"], dict(sorted(flags.items())), content["control"], cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the plan of a comparison: {error}. Was it edited by hand?") from error


def write(folder: Path, plan: Plan) -> None:
    """Write the grid atomically, unless the file holds it already."""
    text = json.dumps({"format": FORMAT, **asdict(plan)}, indent=1) + "\n"
    path = folder / FILE
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    write_atomic(path, text)


def record_of(folder: Path, cell: Cell) -> Path:
    """Where a finished cell's record lies."""
    return folder / "records" / f"{cell.id}.json"


def work_of(folder: Path, cell: Cell) -> Path:
    """The folder that a cell's run writes to."""
    return folder / "work" / cell.id


def lock_path(work: Path) -> Path:
    """Return the lock file of a run's folder; a process holds it while it works on the run."""
    return work.with_name(work.name + ".lock")


def _replace_words(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\w+", lambda word: words.get(word[0], word[0]), text)


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of every flag; a path's value is its last part, so a grid can move to another machine."""
    tokens = list(flags)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or len(token) < 3:
            raise ValueError(f"{token!r} behind the -- is no flag of the recipe. Write --name=value.")
        name, equals, value = token[2:].partition("=")
        while not equals and tokens and not tokens[0].startswith("--"):
            value = f"{value} {tokens.pop(0)}".strip()
        if value and Path(value).exists():
            value = Path(value).resolve().name
        yield name.replace("-", "_"), MACHINE_PATH.sub("", value)


def _id(recipe: str, arm: Arm, seed: int, flags: dict[str, str]) -> str:
    former = {FORMER.get(name, name): value for name, value in flags.items()}
    what: dict[str, Any] = {
        "recipe": recipe,
        "method": _replace_words(arm.spec, FORMER_WORDS),
        "temperature": None if arm.temperature is None else _replace_words(arm.temperature, FORMER_WORDS),
        "flags": former,
    }
    digest = sha256_text(json.dumps([what, seed], sort_keys=True))
    return f"{slug(arm.label)}-s{seed}-{digest[:8]}"
