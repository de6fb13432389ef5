"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from tempering._version import __version__
from tempering.cli.audit import audit
from tempering.cli.new_recipe import new_recipe
from tempering.experiments.recipe import BEHIND

RECIPE = "A recipe's file; or digits, cifar100."
OURS = ("SelfCheckError", "CorruptCheckpointError")  # by name: their modules import torch


def run(recipe: Annotated[Path, Positional, arg(metavar="RECIPE", help=RECIPE)]) -> int:
    """Run a recipe: a Python file whose main(*, ...) takes its flags.

    tempering run recipes/cifar100.py --help explains the flags of that recipe.
    """
    from tempering.experiments import recipe as recipefile

    done = tyro.cli(recipefile.load(recipefile.find(str(recipe))), prog=f"tempering run {recipe}", args=BEHIND.get())
    if done is not None and getattr(done, "facts", {}).get("result"):
        _tell(done)
    return 0


def check(recipe: Annotated[Path, Positional, arg(metavar="RECIPE", help=RECIPE)]) -> int:
    """Look at a recipe's first batch and stop: the self-check alone, with the flags of the run.

    tempering check recipes/cifar100.py --data DIR
    """
    from tempering.experiments import recipe as recipefile
    from tempering.training.distill import CHECK_ONLY, CheckedOnly

    token = CHECK_ONLY.set(True)
    try:
        tyro.cli(recipefile.load(recipefile.find(str(recipe))), prog=f"tempering check {recipe}", args=BEHIND.get())
    except CheckedOnly as checked:
        print(checked)
        return 0
    finally:
        CHECK_ONLY.reset(token)
    raise ValueError(f"{recipe} ended without training anything, so nothing was checked. Does its main call distill()?")


def compare(
    recipe: Annotated[Path | None, Positional, arg(metavar="RECIPE", help=RECIPE)] = None,
    *,
    out: Annotated[Path, arg(metavar="FOLDER")],
    methods: str = "",
    temperatures: str | None = None,
    seeds: int = 3,
    first_seed: int = 0,
    jobs: int = 1,
    threads: int = 1,
    nice: bool = False,
    gpus: str = "",
    control: str | None = None,
    controls: bool = True,
    status: bool = False,
    tables_only: bool = False,
    quiet: bool = False,
) -> int:
    """Run a grid of arms and seeds, resumable, and make one table and one page of it.

    tempering compare RECIPE --methods kd,dtkd --seeds 3 --out runs/grid -- --data DIR --epochs 60

    What stands behind the -- are the recipe's flags. A finished cell never runs again, a killed one goes on; records of
    a few KB go to FOLDER/records, and FOLDER/table.md and FOLDER/report.html are made from them alone.

    Args:
        out: the comparison's folder.
        methods: arms with commas between: names (see `tempering list`) or methods such as "dtkd(soft=0.5)".
        temperatures: policies with commas between, in place of each method's own; "own" leaves it.
        seeds: how many, the same for every arm.
        first_seed: the first of them.
        jobs: cells at once.
        threads: of each cell. Two cells of one thread do more than one of two.
        nice: run at the lowest priority.
        gpus: ids of GPUs with commas between, one a cell at work.
        control: the arm that differences are taken to; by itself the student alone.
        controls: add the student alone and KD at the same total weights where they are not among the methods.
        status: only say what is done, what runs, and when it will end.
        tables_only: only make table and page again.
        quiet: print failures alone.
    """
    from tempering.experiments.compare import plan as arena_plan
    from tempering.experiments.compare import status as arena_view

    if status:
        plan = arena_plan.read(out)
        found = arena_view.cell_statuses(out, plan)
        _print(
            arena_view.status_table(found), arena_view.summary(found, max(1, sum(s.state == "running" for s in found)))
        )
        return 0
    if tables_only:
        plan = arena_plan.read(out)
        print("made again: {} and {}".format(*arena_view.render(out, replace(plan, control=control or plan.control))))
        return 0
    from tempering.experiments import recipe as recipefile
    from tempering.experiments.compare.runner import Arena, renice
    from tempering.experiments.presets import arms_from, with_controls
    from tempering.utils.registry import lookup

    if recipe is None or not methods or seeds < 1:
        raise ValueError(
            "a comparison needs a recipe, --methods and at least one seed: tempering compare digits --methods kd,dtkd "
            f"--out {out}. --status and --tables-only need --out alone."
        )
    file = recipefile.find(str(recipe))
    recipefile.check_flags(file, BEHIND.get())
    arms = arms_from(methods, temperatures)
    if controls:
        arms, added = with_controls(arms)
        for arm in added:
            arena_view.say(f"added as a control: {arm.label} = {arm.spec} (--no-controls leaves it out)", quiet=quiet)
    grid = arena_plan.plan_for(file, arms, range(first_seed, first_seed + seeds), BEHIND.get(), control)
    grid = arena_plan.merged(out, grid)
    if control is not None:  # before hours are spent
        lookup(control, {cell.label: cell for cell in grid.cells}, "arm")
    if nice:
        renice()
    ids = [part.strip() for part in gpus.split(",") if part.strip()]
    arena = Arena(out, grid, file, BEHIND.get(), jobs=jobs, threads=threads, gpus=ids, quiet=quiet)
    code = arena.run()
    if not quiet:
        arena_view.show(out, grid, arena.failed)
    return code


def tune(
    recipe: Annotated[Path, Positional, arg(metavar="RECIPE", help=RECIPE)],
    *,
    out: Annotated[Path, arg(metavar="FOLDER")],
    method: str = "dtkd",
    trials: int = 20,
    space: str = "",
    seed: int = 0,
    jobs: int = 1,
    threads: int = 1,
    prune: bool = True,
    quiet: bool = False,
) -> int:
    """Search temperature and weights of a method on the validation split; the test split is not looked at.

    tempering tune RECIPE --method dtkd --trials 20 --out runs/tune -- --data DIR --epochs 60 --validation 5000

    What stands behind the -- are the recipe's flags. A killed search goes on with the same command, and more --trials
    widen it. The best flags are printed as they are typed, and FOLDER/tune.html shows what mattered.

    Args:
        out: the search's folder.
        method: an arm or a method, which the search begins with; or one with places in braces that --space names, as
            in "lskd(kd(soft={soft}, hard=0))".
        trials: how many, those of earlier calls counted.
        space: what to search, by itself every weight but the labels', the warm-up and the temperature: "soft=0.1..10"
            is a range, by its logarithm where it spans a factor of ten ("log" or "linear" behind it says otherwise),
            "temperature.solve=exact|std" a choice, "soft=4" holds it; the recipe's flags too: "lr=0.01..0.1".
        seed: of every trial's run, and of the search.
        jobs: trials at once.
        threads: of each trial.
        prune: cut a trial that is worse, after the same epoch, than the median of those before.
        quiet: print the best flags alone.
    """
    from tempering.experiments import recipe as recipefile
    from tempering.experiments.tune import runner as tuning
    from tempering.experiments.tune.page import words, write_page
    from tempering.experiments.tune.space import space_of
    from tempering.experiments.tune.study import best

    file, flags = recipefile.find(str(recipe)), BEHIND.get()
    recipefile.check_flags(file, flags)
    wanted = space_of(method, space, recipefile.flags(file))
    how = {"trials": trials, "seed": seed, "jobs": jobs, "threads": threads, "prune": prune, "quiet": quiet}
    search = tuning.Search(out, file, flags, wanted, **how)
    if code := search.run():
        return code
    typed = tuning.command(recipe, flags, best(search.study))
    page = write_page(out, search.study, wanted, typed)
    if not quiet:
        _print(*words(search.study, wanted), f"page: {page}", "the best flags:")
    _print(typed)
    return 0


def report(
    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN...")],
    *,
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
    control: str | None = None,
    title: str | None = None,
) -> None:
    """Make one HTML page, which opens offline, of runs.

    Args:
        runs: folders of runs, folders above them, or records.
        out: the page.
        control: the arm that differences are taken to; by itself the student alone.
        title: of the page.
    """
    from tempering.reports.page import write_page
    from tempering.reports.records import find_runs, load_run
    from tempering.reports.table import compare, rich_table

    found = [load_run(path) for path in find_runs(runs)]
    _print(rich_table(compare(found, control)))
    print(f"report: {write_page(found, out, title=title, control=control)}")


def list_parts() -> None:
    """Every arm, method, temperature policy, audit and net."""
    from rich.table import Table

    from tempering.audits import AUDITS
    from tempering.experiments.presets import ARMS
    from tempering.methods import METHODS
    from tempering.models import MODELS
    from tempering.temperature import POLICIES

    def table(title: str, *heads: str) -> Table:
        made = Table(title=title, title_justify="left")
        for head in heads:
            made.add_column(head, overflow="fold")
        return made

    arms = table("Arms", "name", "in tables", "method")
    for arm in ARMS.values():
        arms.add_row(arm.name, arm.label, arm.spec)
    tables = [arms]
    for title, parts in (("Methods", METHODS), ("Temperature policies", POLICIES), ("Audits", AUDITS)):
        listed = table(title, "name", "paper", "what it is")
        for name, part in parts.items():
            listed.add_row(name.lower(), getattr(part, "paper", ""), (part.__doc__ or "").strip().partition("\n")[0])
        tables.append(listed)
    _print(*tables, f"Nets: {', '.join(sorted(MODELS))}", markup=False)


def demo(*, out: Path = Path("runs/demo"), seeds: int = 3) -> int:
    """The whole job on scikit-learn's bundled digits: a teacher, five arms over three seeds, a table, a report.

    Args:
        out: where runs and report go; a second demo in the same folder goes on where the first one stopped.
        seeds: of every arm.
    """
    from tempering.experiments import recipe as recipefile
    from tempering.reports.page import write_page
    from tempering.reports.records import load_run
    from tempering.reports.table import compare, rich_table

    main = recipefile.load(recipefile.find("digits"))
    arms = ("supervised", "kd", "kd-matched", "dtkd-published", "dtkd")
    folders = []
    for arm in arms:
        for seed in range(seeds):
            place = out / f"{arm}-{seed}"
            if not (place / "facts.json").is_file() or not load_run(place).done:
                _tell(main(method=arm, seed=seed, out=place, threads=1))  # nets this small gain nothing from more
            folders.append(place)
    runs = [load_run(place) for place in folders]
    _print(rich_table(compare(runs)))
    print(f"report: {write_page(runs, out / 'report.html')}")
    return 0


COMMANDS = {
    "demo": demo,
    "new-recipe": new_recipe,
    "run": run,
    "compare": compare,
    "tune": tune,
    "report": report,
    "check": check,
    "audit": audit,
    "list": list_parts,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors that say what to do are printed as they are, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    loud = "--traceback" in args or os.environ.get("TEMPERING_TRACEBACK", "0") not in ("", "0")
    if args == ["--version"]:
        print(f"tempering {__version__}")
        return 0
    args, behind = _divided([a for a in args if a != "--traceback"])
    token = BEHIND.set(behind)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        said = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="tempering",
            args=_apart(args),
            description="Knowledge distillation, with the temperature under control.",
        )
        return said or 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tempering list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if loud or not _speaks(error):
            raise
        print(f"error: {error}\n(--traceback shows where)", file=sys.stderr)
        return 1
    finally:
        BEHIND.reset(token)
        signal.signal(signal.SIGTERM, before)


def _apart(args: Sequence[str]) -> list[str]:
    """--flag=value as two words, so that a mistyped name with a value is matched by its name."""
    return [word for a in args for word in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]


def _divided(args: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Our arguments, and those that a recipe reads itself: behind RECIPE for run and check, behind -- for others."""
    if args[:1] in (["run"], ["check"]) and len(args) > 1 and not args[1].startswith("-"):
        return args[:2], tuple(_apart([a for a in args[2:] if a != "--"]))
    if "--" in args:
        place = args.index("--")
        return args[:place], tuple(args[place + 1 :])
    return args, ()


def _speaks(error: Exception) -> bool:
    """Whether an error is one that says what to do, not a fault of this program."""
    spoken = (ValueError, OSError, ImportError, FloatingPointError)
    return isinstance(error, spoken) or type(error).__name__ in OURS


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _tell(done: Any) -> None:
    """One line on a finished run."""
    from tempering.experiments.compare.status import scores

    best = done.best and done.best["epoch"]
    where = "" if done.folder is None else f"; records: {done.folder}"
    print(
        f"{done.facts['label']}, seed {done.facts['seed']}: {scores(done.last or {})} "
        f"(best epoch {best}; {done.facts['result']['seconds']:.0f} s){where}"
    )


def _print(*parts: Any, markup: bool = True) -> None:
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part, markup=markup, highlight=False, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    sys.exit(main())
