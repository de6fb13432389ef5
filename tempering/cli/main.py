"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, Suppress, arg

from tempering._version import __version__
from tempering.cli.audit import audit
from tempering.cli.new_recipe import new_recipe

RECIPE = "A recipe's file; or the name of a bundled one, such as digits or cifar100."
Recipe = Annotated[Path, Positional, arg(metavar="RECIPE", help=RECIPE)]
Folder = Annotated[Path, Positional, arg(metavar="FOLDER")]
RecipeArgs = Annotated[tuple[str, ...], Suppress]  # the recipe's flags, which main() takes off the command line
OURS = ("SelfCheckError", "CorruptCheckpointError")  # by name: their modules import torch


def run(recipe: Recipe, *, recipe_args: RecipeArgs = ()) -> int:
    """Run a recipe: a Python file whose main(*, ...) takes its flags.

    tempering run cifar100 --help explains the flags of that recipe.
    """
    from tempering.experiments import recipe as recipes

    done = recipes.finish(recipes.call(recipes.find(str(recipe)), recipe_args, prog=f"tempering run {recipe}"))
    if done is not None and done.facts.get("result"):
        _tell(done)
    return 0


def check(recipe: Recipe, *, recipe_args: RecipeArgs = ()) -> int:
    """Check a recipe and the first batch of its run, with the flags of the run. Trains and writes nothing.

    tempering check cifar100 --data DIR
    """
    from tempering.experiments import recipe as recipes

    made = recipes.describe(recipes.find(str(recipe)), recipe_args, prog=f"tempering check {recipe}")
    print(made.check().line)
    return 0


def compare(
    recipe: Recipe,
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
    quiet: bool = False,
    recipe_args: RecipeArgs = (),
) -> int:
    """Run a grid of methods and seeds, resumable, and make one table and one page of it.

    tempering compare RECIPE --methods kd,dtkd --seeds 3 --out runs/grid -- --data DIR --epochs 60

    `tempering compare status FOLDER` shows what is done, what runs, and when it will end; `tempering compare report
    FOLDER` makes the table and the page again, from the records.

    After the -- come the recipe's flags. A finished run never runs again, an interrupted one resumes; records of a few
    KB are written to FOLDER/records, and FOLDER/table.md and FOLDER/report.html are made from them alone.

    Args:
        out: the comparison's folder.
        methods: methods, separated by commas: names (see `tempering list`) or calls such as "dtkd(soft=0.5)".
        temperatures: policies, separated by commas, in place of each method's own; "own" keeps it.
        seeds: number of seeds, the same for every method.
        first_seed: the first seed.
        jobs: runs at the same time.
        threads: CPU threads per run. Two runs with one thread each do more than one with two.
        nice: run at the lowest priority.
        gpus: ids of GPUs, separated by commas, one per running run.
        control: the method that differences are taken to; default: the student alone.
        controls: add the student alone and KD with equal total weights if they are not among the methods.
        quiet: print failures only.
    """
    from tempering.experiments import recipe as recipes
    from tempering.experiments.compare import plan as plans
    from tempering.experiments.compare import status as views
    from tempering.experiments.compare.runner import Arena, renice
    from tempering.experiments.presets import arms_from, with_controls
    from tempering.utils.registry import lookup

    if not methods or seeds < 1:
        raise ValueError(
            "a comparison needs a recipe, --methods and at least one seed: tempering compare digits --methods kd,dtkd "
            f"--out {out}."
        )
    file = recipes.find(str(recipe))
    recipes.check_flags(file, recipe_args)
    arms = arms_from(methods, temperatures)
    if controls:
        arms, added = with_controls(arms)
        for arm in added:
            views.say(f"added as a control: {arm.label} = {arm.spec} (--no-controls leaves it out)", quiet=quiet)
    grid = plans.plan_for(file, arms, range(first_seed, first_seed + seeds), recipe_args, control)
    grid = plans.merged(out, grid)
    if control is not None:  # before hours are spent
        lookup(control, {cell.label: cell for cell in grid.cells}, "arm")
    if nice:
        renice()
    ids = [part.strip() for part in gpus.split(",") if part.strip()]
    arena = Arena(out, grid, file, recipe_args, jobs=jobs, threads=threads, gpus=ids, quiet=quiet)
    code = arena.run()
    if not quiet:
        views.show(out, grid, arena.failed)
    return code


def compare_status(folder: Folder) -> int:
    """Show which runs of a comparison are done and running, and when it will end."""
    from tempering.experiments.compare import plan as plans
    from tempering.experiments.compare import status as views

    found = views.cell_statuses(folder, plans.read(folder))
    _print(views.status_table(found), views.summary(found, max(1, sum(s.state == "running" for s in found))))
    return 0


def compare_report(folder: Folder, *, control: str | None = None) -> int:
    """Make the table and the page of a comparison again, from its records.

    Args:
        folder: the comparison's folder.
        control: the method that differences are taken to; default: the comparison's own.
    """
    from tempering.experiments.compare import plan as plans
    from tempering.experiments.compare import status as views

    plan = plans.read(folder)
    print("written: {} and {}".format(*views.render(folder, replace(plan, control=control or plan.control))))
    return 0


def tune(
    recipe: Recipe,
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
    recipe_args: RecipeArgs = (),
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
    from tempering.experiments import recipe as recipes
    from tempering.experiments.tune import runner as tuning
    from tempering.experiments.tune.page import words, write_page
    from tempering.experiments.tune.space import space_of
    from tempering.experiments.tune.study import best

    file = recipes.find(str(recipe))
    recipes.check_flags(file, recipe_args)
    wanted = space_of(method, space, recipes.flags(file))
    how = {"trials": trials, "seed": seed, "jobs": jobs, "threads": threads, "prune": prune, "quiet": quiet}
    search = tuning.Search(out, file, recipe_args, wanted, **how)
    if code := search.run():
        return code
    typed = tuning.command(recipe, recipe_args, best(search.study))
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
    from tempering.experiments import recipe as recipes
    from tempering.reports.page import write_page
    from tempering.reports.records import load_run
    from tempering.reports.table import compare, rich_table

    main = recipes.load(recipes.find("digits"))
    arms = ("supervised", "kd", "kd-matched", "dtkd-published", "dtkd")
    folders = []
    for arm in arms:
        for seed in range(seeds):
            place = out / f"{arm}-{seed}"
            if not (place / "facts.json").is_file() or not load_run(place).done:
                # networks this small gain nothing from more threads
                _tell(recipes.with_flags(main, {"method": arm, "seed": seed, "out": place, "threads": 1}).run())
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
COMPARE = {"status": compare_status, "report": compare_report}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors that say what to do are printed as they are, without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    loud = "--traceback" in args or os.environ.get("TEMPERING_TRACEBACK", "0") not in ("", "0")
    if args == ["--version"]:
        print(f"tempering {__version__}")
        return 0
    args, recipe_args = _divided([a for a in args if a != "--traceback"])
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _dispatch(_apart(args), recipe_args)
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
        signal.signal(signal.SIGTERM, before)


def _dispatch(args: list[str], recipe_args: tuple[str, ...]) -> int:
    if args[:1] == ["compare"] and args[1:2] and (command := COMPARE.get(args[1])):
        return tyro.cli(command, prog=f"tempering compare {args[1]}", args=args[2:])

    def bound(command: Callable[..., Any]) -> Callable[..., Any]:
        takes = "recipe_args" in inspect.signature(command).parameters
        return partial(command, recipe_args=recipe_args) if takes else command

    code = tyro.extras.subcommand_cli_from_dict(
        {name: bound(command) for name, command in COMMANDS.items()},
        prog="tempering",
        args=args,
        description="Knowledge distillation, with the temperature under control.",
    )
    return code or 0


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
