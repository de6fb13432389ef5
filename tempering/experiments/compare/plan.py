"""The grid of a comparison: its runs (cells), their ids, and the file that stores it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempering.experiments.former_names import FORMER, PRESENT, former_spec, present_spec
from tempering.experiments.presets import Preset, slug
from tempering.utils.files import read_sealed, sealed, sha256_text, write_atomic
from tempering.utils.text import without_private_paths

FILE = "plan.json"
OWN = ("method", "temperature", "seed", "label", "out")  # flags that a cell sets
ELSEWHERE = {"threads", "teacher_dir", "quiet", "out", "keep"}  # flags that change where or how fast, not the result
FORMAT = 3  # of a plan; 1 has flags by their former names, 3 a checksum


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        id: readable name with a hash of the run's settings; the name of its record.
        label: label of the preset in records.
        method: value of the recipe's --method.
        temperature: value of its --temperature; None for the method's own.
        seed: seed of the run, by which runs of two presets are paired.
    """

    id: str
    label: str
    method: str
    temperature: str | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Attributes:
        recipe: the recipe's name.
        flags: its flags, shared by all runs; absolute paths are cut to their last component.
        control: label of the preset that differences are taken to; None lets the report choose.
        cells: sorted by preset, then by seed.
    """

    recipe: str
    flags: dict[str, str]
    control: str | None
    cells: tuple[Cell, ...]


def plan_for(
    recipe: Path, presets: Sequence[Preset], seeds: Sequence[int], flags: Sequence[str], control: str | None = None
) -> Plan:
    """Return the grid of presets times seeds.

    Raises:
        ValueError: if flags cannot be parsed, or are set by the grid.
    """
    flags_by_name = shared_flags(flags, OWN, "compare")
    cells = [
        Cell(_id(recipe.stem, preset, seed, flags_by_name), preset.label, preset.spec, preset.temperature, seed)
        for preset in presets
        for seed in seeds
    ]
    return Plan(recipe.stem, flags_by_name, control, tuple(cells))


def shared_flags(flags: Sequence[str], own: Collection[str], command: str) -> dict[str, str]:
    """Return the flags that affect the result, name -> value, sorted; those of ``ELSEWHERE`` are left out.

    Raises:
        ValueError: if flags cannot be parsed, or are among ``own``, which ``command`` sets.
    """
    pairs = dict(sorted(_pairs(flags)))
    if conflicts := sorted(set(pairs) & set(own)):
        raise ValueError(f"{command} sets --{conflicts[0]} itself, differently in each run; remove it after the --.")
    return {name: value for name, value in pairs.items() if name not in ELSEWHERE}


def merged(folder: Path, plan: Plan) -> Plan:
    """Return the grid stored in ``folder``, extended by ``plan``; ``plan`` itself if there is none.

    Raises:
        ValueError: if the folder has a grid with another recipe or other flags; names the difference.
    """
    if not (folder / FILE).is_file():
        return plan
    old = read(folder)
    differ = [name for name in sorted({*old.flags, *plan.flags}) if old.flags.get(name) != plan.flags.get(name)]
    if old.recipe != plan.recipe or differ:
        name = differ[0] if differ else "recipe"
        old_value, new_value = (old.flags.get(name), plan.flags.get(name)) if differ else (old.recipe, plan.recipe)
        raise ValueError(
            f"{folder} contains another comparison: its {name} was {old_value!r}, now it is {new_value!r}, and one "
            "table cannot show both. Use another --out."
        )
    cells = {(cell.method, cell.temperature, cell.seed): cell for cell in old.cells}  # these keep their ids
    for cell in plan.cells:
        cells.setdefault((cell.method, cell.temperature, cell.seed), cell)
    return Plan(plan.recipe, plan.flags, plan.control or old.control, tuple(cells.values()))


def read(folder: Path) -> Plan:
    """Read the grid stored in ``folder``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its file is invalid.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} contains no comparison: there is no {FILE}. Start one: tempering compare RECIPE --methods a,b "
            f"--out {folder}"
        )
    try:
        content = read_sealed(path, required=FORMAT)
        cells = tuple(
            Cell(**cell | {name: cell[name] and present_spec(cell[name]) for name in ("method", "temperature")})
            for cell in content["cells"]
        )
        flags: dict[str, str] = content["flags"]
        if content["format"] == 1:
            flags = {PRESENT.get(name, name): value for name, value in flags.items()}
        return Plan(content["recipe"], dict(sorted(flags.items())), content["control"], cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the plan of a comparison: {error}. Was it edited by hand?") from error


def write(folder: Path, plan: Plan) -> None:
    """Write the grid atomically, unless the file is up to date."""
    text = sealed({"format": FORMAT, **asdict(plan)})
    path = folder / FILE
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    write_atomic(path, text)


def record_of(folder: Path, cell: Cell) -> Path:
    """Return the path of a finished run's record."""
    return folder / "records" / f"{cell.id}.json"


def work_of(folder: Path, cell: Cell) -> Path:
    """Return the folder that a run writes to."""
    return folder / "work" / cell.id


def lock_path(work: Path) -> Path:
    """Return the lock file of a run's folder; a process holds it while it works on the run."""
    return work.with_name(work.name + ".lock")


def _pairs(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of every flag; paths are cut to their last component, so that a grid is portable."""
    tokens = list(flags)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or len(token) < 3:
            raise ValueError(f"{token!r} after the -- is not a flag of the recipe. Write --name=value.")
        name, equals, value = token[2:].partition("=")
        while not equals and tokens and not tokens[0].startswith("--"):
            value = f"{value} {tokens.pop(0)}".strip()
        if value and Path(value).exists():
            value = Path(value).resolve().name
        yield name.replace("-", "_"), without_private_paths([f"--{name}", value])[1]


def _id(recipe: str, preset: Preset, seed: int, flags: dict[str, str]) -> str:
    former = {FORMER.get(name, name): value for name, value in flags.items()}
    what: dict[str, Any] = {
        "recipe": recipe,
        "method": former_spec(preset.spec),
        "temperature": preset.temperature and former_spec(preset.temperature),
        "flags": former,
    }
    digest = sha256_text(json.dumps([what, seed], sort_keys=True))
    return f"{slug(preset.label)}-s{seed}-{digest[:8]}"
