"""Place a user's method among recorded ones: the command `tempering bench`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, Suppress, arg

if TYPE_CHECKING:
    from tempering.experiments.compare.plan import Plan
    from tempering.experiments.presets import Preset
    from tempering.reports.records import RunRecord

ARENA = Path("benchmarks/results/arena16/grid")


def bench(
    method: Annotated[str, Positional, arg(metavar="FILE")],
    *,
    arena: Annotated[Path, arg(metavar="FOLDER")] = ARENA,
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    seeds: int | None = None,
    jobs: int = 1,
    threads: int = 1,
    quiet: bool = False,
    recipe_args: Annotated[tuple[str, ...], Suppress] = (),
) -> int:
    """Run your method by the protocol of recorded runs, on their seeds, and print its place among them.

    tempering bench mine.py -- --data DIR

    The recipe, its flags and the teacher are those of the records; flags that name files of this machine follow the --.
    The same command resumes an interrupted bench. A changed file is another bench.

    Args:
        method: FILE.py with one subclass of Method or Policy, FILE.py:NAME(argument=value), or any method or policy by
            name. A policy is benched in KD with equal weights.
        arena: folder of the recorded comparison.
        out: folder of the runs; default: runs/bench/NAME-HASH.
        seeds: number of recorded seeds to run; default: all.
        jobs: runs at the same time.
        threads: CPU threads per run.
        quiet: print the table only.
    """
    from rich.console import Console

    from tempering.experiments.compare.plan import merged, plan_for, read
    from tempering.experiments.compare.runner import ComparisonRunner
    from tempering.experiments.compare.status import records
    from tempering.experiments.recipe import find
    from tempering.reports.leaderboard import leaderboard, reading, rich_table
    from tempering.utils.text import printable

    recorded = read(arena)
    runs = [run for run in records(arena, recorded) if run.done]
    paired = sorted({run.seed for run in runs})[:seeds]
    if not paired or (seeds is not None and seeds < 1):
        raise ValueError(f"bench needs finished runs to pair with, and seeds >= 1; got {arena} and seeds={seeds}.")
    preset, name = own_preset(method, {run.label for run in runs})
    file = find(recorded.recipe)
    flags = protocol_flags(recorded, arena, file, recipe_args)
    check_data(runs[0], file, flags)
    folder = out or Path("runs/bench", name)
    plan = merged(folder, plan_for(file, [preset], paired, flags))
    code = ComparisonRunner(folder, plan, file, flags, jobs=jobs, threads=threads, quiet=quiet).run()
    own = [run for run in records(folder, plan) if run.done]
    board = leaderboard([*runs, *own])
    console = Console()
    console.print(rich_table(board, {run.label for run in own}))
    for sentence in () if quiet else reading(board):
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)
    return code


def own_preset(text: str, taken: Collection[str]) -> tuple[Preset, str]:
    """Return the preset of a method, or of KD with equal weights and a policy; and a name with a hash of its code.

    Raises:
        ValueError: if it cannot be built.
    """
    from tempering.experiments.presets import PRESETS, Preset, method_of, slug
    from tempering.experiments.spec import is_policy, own_file
    from tempering.utils.files import sha256_file, sha256_text

    file, call = own_file(text) or (None, text)
    label = call or text if file is None else f"{call or file.stem} ({file.name})"
    label = f"{label}, yours" if label in taken else label
    spec, temperature = (PRESETS["kd-matched"].spec, text) if is_policy(text) else (text, None)
    method_of(spec, temperature)
    code = "" if file is None else sha256_file(file)
    return Preset(label, label, spec, temperature), f"{slug(label)}-{sha256_text(text + code)[:8]}"


def protocol_flags(recorded: Plan, arena: Path, recipe: Path, given: Sequence[str]) -> list[str]:
    """Return the flags of the recorded runs, with those of ``given`` that name files or change nothing.

    A file that is not given, such as the teacher's weights, is looked for beside the records.

    Raises:
        ValueError: for a given flag that would change the protocol, or a file that is not found.
    """
    from tempering.experiments.compare.plan import OWN, shared_flags
    from tempering.experiments.recipe import annotated_flags, check_flags

    check_flags(recipe, given)
    own = shared_flags(given, OWN, "bench")
    paths = {name for name, annotation in annotated_flags(recipe).items() if "Path" in annotation}
    for name, value in own.items():
        if name not in paths and value != recorded.flags.get(name):
            before = recorded.flags.get(name, "the default")
            raise ValueError(
                f"bench runs the recorded protocol, where --{name} is {before}; got {value}. Leave it out."
            )
    flags = list(given)
    for name, value in recorded.flags.items():
        if name in own:
            continue
        if name in paths:
            near = [*sorted(arena.glob(value)), *sorted(arena.parent.glob(f"*/{value}")), *sorted(Path().glob(value))]
            if not near:
                raise ValueError(f"the recorded runs have a file --{name} {value}. Name yours: -- --{name} PATH")
            value = str(near[0].absolute())
        flags.append(f"--{name.replace('_', '-')}" + (f"={value}" if value else ""))
    return flags


def check_data(recorded: RunRecord, recipe: Path, flags: Sequence[str]) -> None:
    """Raise ValueError if the training images are not those of the recorded runs."""
    from tempering.experiments.recipe import describe

    identity = dict(describe(recipe, flags, prog="tempering bench").facts).get("data", {}).get("identity")
    if identity != (known := recorded.of("data").get("identity")):
        raise ValueError(
            f"the training data are not those of the records: their identity is {str(identity)[:12]}, recorded is "
            f"{str(known)[:12]}. Results could not be compared."
        )
