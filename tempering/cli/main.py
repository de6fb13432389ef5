"""Run the commands of `tempering`. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, Suppress, arg

from tempering._version import __version__
from tempering.utils.files import forget_interrupts, handle_signals, interrupt
from tempering.utils.text import printable

if TYPE_CHECKING:
    from tempering.training.config import Run

RECIPE = "Path of a recipe, or the name of a bundled one, such as digits or cifar100."
Recipe = Annotated[Path, Positional, arg(metavar="RECIPE", help=RECIPE)]
OptionalRecipe = Annotated[Path | None, Positional, arg(metavar="[RECIPE]", help=RECIPE)]
Folder = Annotated[Path, Positional, arg(metavar="FOLDER")]
FROM = "Flags from a file: a run's facts.json, or YAML or JSON, {flag: value}. The command line has precedence."
FlagFile = Annotated[Path | None, arg(name="from", metavar="FILE", help=FROM)]
RecipeArgs = Annotated[tuple[str, ...], Suppress]  # the recipe's flags, which main() separates from the command's


def run(
    recipe: OptionalRecipe = None,
    *,
    generations: int | None = None,
    flag_file: FlagFile = None,
    recipe_args: RecipeArgs = (),
) -> int:
    """Run a recipe, a Python file whose main(*, ...) has its flags as arguments.

    `tempering run cifar100 --help` explains the flags of that recipe; `tempering run --from RUN/facts.json --seed 1`
    repeats a run with another seed.

    Args:
        generations: number of students, each the teacher of the next, in OUT/generation-1, OUT/generation-2, ...; the
            recipe's teacher teaches the first. The same command resumes.
    """
    from tempering.experiments.recipe import call, finish

    file, argv = _recipe_and_flags(recipe, flag_file, recipe_args)
    if generations is not None:
        from tempering.experiments.generations import run_recipe_generations

        for one in run_recipe_generations(file, argv, generations, prog=f"tempering run {recipe or file}"):
            _print_result(one)
        return 0
    with _recorded_as("run", file, argv) if flag_file else nullcontext():
        finished = finish(call(file, argv, prog=f"tempering run {recipe or file}"))
    if finished is not None and finished.facts.get("result"):
        _print_result(finished)
    return 0


def check(recipe: OptionalRecipe = None, *, flag_file: FlagFile = None, recipe_args: RecipeArgs = ()) -> int:
    """Check a recipe and the first batch of its run, with the flags of the run. Train and write nothing.

    tempering check cifar100 --data DIR
    """
    from tempering.experiments.recipe import describe

    file, argv = _recipe_and_flags(recipe, flag_file, recipe_args)
    print(describe(file, argv, prog=f"tempering check {recipe or file}").check().line)
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
    """Run a grid of methods and seeds, resumable, and write a table and a page of the results.

    tempering compare RECIPE --methods kd,dtkd --seeds 3 --out runs/grid -- --data DIR --epochs 60

    `tempering compare status FOLDER` shows finished and running runs, and the remaining time; `tempering compare report
    FOLDER` writes the table and the page again, from the records.

    The recipe's flags follow the --. A finished run is not repeated, an interrupted one is resumed. Records of a few KB
    are written to FOLDER/records; FOLDER/table.md and FOLDER/report.html are made from the records.

    Args:
        out: the comparison's folder.
        methods: methods, separated by commas: names (see `tempering list`) or calls such as "dtkd(soft=0.5)".
        temperatures: policies, separated by commas, in place of each method's own; "own" keeps it.
        seeds: number of seeds, the same for every method.
        first_seed: the first seed.
        jobs: runs at the same time.
        threads: CPU threads per run. Two runs with one thread each are faster than one after the other with two.
        nice: run at the lowest priority.
        gpus: ids of GPUs, separated by commas; each run uses one.
        control: the method that the others are compared with; default: the student alone.
        controls: add the student alone and KD with equal total weights if they are not among the methods.
        quiet: print failures only.
    """
    from tempering.experiments.compare.plan import merged, plan_for
    from tempering.experiments.compare.runner import ComparisonRunner, renice
    from tempering.experiments.compare.status import damaged, say, show
    from tempering.experiments.presets import presets_from, with_controls
    from tempering.experiments.recipe import check_flags, find
    from tempering.utils.registry import lookup

    if not methods or seeds < 1:
        raise ValueError(
            "a comparison needs a recipe, --methods and at least one seed: tempering compare digits --methods kd,dtkd "
            f"--out {out}."
        )
    file = find(str(recipe))
    check_flags(file, recipe_args)
    presets = presets_from(methods, temperatures)
    if controls:
        presets, added = with_controls(presets)
        for preset in added:
            say(f"added as a control: {preset.label} = {preset.spec} (--no-controls leaves it out)", quiet=quiet)
    grid = plan_for(file, presets, range(first_seed, first_seed + seeds), recipe_args, control)
    grid = merged(out, grid)
    if control is not None:  # before anything is run
        lookup(control, {cell.label: cell for cell in grid.cells}, "method")
    if nice:
        renice()
    ids = [part.strip() for part in gpus.split(",") if part.strip()]
    runner = ComparisonRunner(out, grid, file, recipe_args, jobs=jobs, threads=threads, gpus=ids, quiet=quiet)
    code = runner.run()
    if not quiet:
        show(out, grid, runner.failed)
    _warn_of(damaged(out, grid))
    return code


def compare_status(folder: Folder) -> int:
    """Show finished and running runs of a comparison, and the remaining time."""
    from tempering.experiments.compare.plan import read
    from tempering.experiments.compare.status import cell_statuses, damaged, status_table, summary

    plan = read(folder)
    statuses = cell_statuses(folder, plan)
    _print(status_table(statuses), summary(statuses, max(1, sum(s.state == "running" for s in statuses))))
    _warn_of(damaged(folder, plan))
    return 0


def compare_report(folder: Folder, *, control: str | None = None) -> int:
    """Write the table and the page of a comparison again, from its records.

    Args:
        folder: the comparison's folder.
        control: the method that the others are compared with; default: that of the comparison.
    """
    from tempering.experiments.compare.plan import read
    from tempering.experiments.compare.status import damaged, render, unrecorded

    plan = read(folder)
    print("written: {} and {}".format(*render(folder, replace(plan, control=control or plan.control))))
    for path in unrecorded(folder, plan):
        print(f"{path} is missing, though its run is finished: the command of the comparison writes it again")
    _warn_of(damaged(folder, plan))
    return 0


def _warn_of(lines: Sequence[str]) -> None:
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


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
    """Search the temperature and weights of a method on the validation split; the test split is not used.

    tempering tune RECIPE --method dtkd --trials 20 --out runs/tune -- --data DIR --epochs 60 --validation 5000

    The recipe's flags follow the --. The same command resumes an interrupted search, and more --trials extend it. The
    best flags are printed in the form of a command, and FOLDER/tune.html shows the importance of each parameter.

    Args:
        out: the search's folder.
        method: a preset or a method, whose values are the first trial; or one with placeholders in braces for which
            --space has ranges, as in "lskd(kd(soft={soft}, hard=0))".
        trials: total number of trials, including those of earlier calls.
        space: search space; default: every weight but that of the labels, the warm-up and the temperature.
            "soft=0.1..10" is a range, on a log scale if it spans a factor of ten or more, unless "log" or "linear"
            follows; "temperature.solve=exact|std" is a choice; "soft=4" is fixed. Flags of the recipe can be searched
            too: "lr=0.01..0.1".
        seed: random seed of every trial's run, and of the search.
        jobs: trials at the same time.
        threads: CPU threads per trial.
        prune: stop a trial that is worse, after the same epoch, than the median of the trials before.
        quiet: print only the best flags.
    """
    from tempering.experiments.recipe import check_flags, find, flags
    from tempering.experiments.tune.page import words, write_page
    from tempering.experiments.tune.runner import SearchRunner, command
    from tempering.experiments.tune.space import space_of
    from tempering.experiments.tune.study import best

    file = find(str(recipe))
    check_flags(file, recipe_args)
    search_space = space_of(method, space, flags(file))
    options = {"trials": trials, "seed": seed, "jobs": jobs, "threads": threads, "prune": prune, "quiet": quiet}
    search = SearchRunner(out, file, recipe_args, search_space, **options)
    if code := search.run():
        return code
    best_command = command(recipe, recipe_args, best(search.study))
    page = write_page(out, search.study, search_space, best_command)
    if not quiet:
        _print(*words(search.study, search_space), f"page: {page}", "the best flags:")
    _print(best_command)
    return 0


def report(
    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN...")],
    *,
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
    control: str | None = None,
    title: str | None = None,
    public: bool = False,
    serve: bool = False,
    port: int = 8000,
) -> None:
    """Write an HTML page about runs, which needs no network connection.

    Two runs are compared side by side: `tempering report RUN_A RUN_B`.

    Args:
        runs: folders of runs, folders that contain them, or records.
        out: path of the page.
        control: the method that the others are compared with; default: the student alone.
        title: title of the page.
        public: leave out host names, private paths and examples of the data; secrets are always left out.
        serve: show the page at http://127.0.0.1:PORT until Ctrl-C, instead of writing it; it follows runs in progress.
        port: of --serve; 0 takes a free one.
    """
    from tempering.reports.page import write_page
    from tempering.reports.pair import side_by_side
    from tempering.reports.records import load_runs
    from tempering.reports.serve import page_of
    from tempering.reports.table import compare, rich_table

    if serve:
        return _serve(lambda: page_of(runs, title=title, control=control, public=public), port)
    loaded = load_runs(runs, public=public)
    _print(rich_table(compare(side_by_side(loaded), control)))
    print(f"report: {write_page(loaded, out, title=title, control=control)}")


def _serve(page: Callable[[], str], port: int) -> None:
    from tempering.reports.serve import HOST, server

    with server(page, port) as running:
        print(f"report: http://{HOST}:{running.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            return


def list_parts() -> None:
    """List presets, methods, temperature policies, audits, networks and recipes."""
    from rich.table import Table

    from tempering.audits import AUDITS
    from tempering.experiments.presets import PRESETS
    from tempering.experiments.recipe import bundled_recipes
    from tempering.methods import METHODS
    from tempering.models import MODELS
    from tempering.temperature import POLICIES

    def table(title: str, *heads: str) -> Table:
        empty = Table(title=title, title_justify="left")
        for head in heads:
            empty.add_column(head, overflow="fold")
        return empty

    presets = table("Presets", "name", "label", "method")
    for preset in PRESETS.values():
        presets.add_row(preset.name, preset.label, preset.spec)
    tables = [presets]
    for title, parts in (("Methods", METHODS), ("Temperature policies", POLICIES), ("Audits", AUDITS)):
        listed = table(title, "name", "paper", "description")
        for name, part in parts.items():
            listed.add_row(name.lower(), getattr(part, "paper", ""), (part.__doc__ or "").strip().partition("\n")[0])
        tables.append(listed)
    recipes = ", ".join(path.stem for path in bundled_recipes())
    _print(*tables, f"Networks: {', '.join(sorted(MODELS))}", f"Recipes: {recipes}", markup=False)


def demo(*, out: Path = Path("runs/demo"), seeds: int = 3) -> int:
    """Train a teacher, compare five methods over three seeds, and write a report, on scikit-learn's bundled digits.

    Args:
        out: folder of the runs and the report; the same command resumes an interrupted demo.
        seeds: number of seeds per method.
    """
    from tempering.experiments.recipe import find, load, with_flags
    from tempering.reports.page import write_page
    from tempering.reports.records import load_run
    from tempering.reports.table import compare, rich_table

    main = load(find("digits"))
    methods = ("supervised", "kd", "kd-matched", "dtkd-published", "dtkd")
    folders = []
    for method in methods:
        for seed in range(seeds):
            folder = out / f"{method}-{seed}"
            if not (folder / "facts.json").is_file() or not load_run(folder).done:
                # networks this small are not faster with more threads
                _print_result(with_flags(main, {"method": method, "seed": seed, "out": folder, "threads": 1}).run())
            folders.append(folder)
    runs = [load_run(folder) for folder in folders]
    _print(rich_table(compare(runs)))
    print(f"report: {write_page(runs, out / 'report.html')}")
    return 0


# a command, or "module:function" of one that is imported only when it is used
COMMANDS: dict[str, Callable[..., int | None] | str] = {
    "demo": demo,
    "new-recipe": "tempering.cli.new_recipe:new_recipe",
    "run": run,
    "compare": compare,
    "bench": "tempering.cli.bench:bench",
    "tune": tune,
    "report": report,
    "check": check,
    "audit": "tempering.cli.audit:audit",
    "list": list_parts,
    "export": "tempering.cli.export:export",
    "conformance": "tempering.cli.conformance:conformance",
    "plan": "tempering.cli.plan:plan",
}
COMPARE_COMMANDS = {"status": compare_status, "report": compare_report}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors for the user are printed without a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args or os.environ.get("TEMPERING_TRACEBACK", "0") not in ("", "0")
    if args == ["--version"]:
        print(f"tempering {__version__}")
        return 0
    args, recipe_args = split_argv([a for a in args if a != "--traceback"])
    try:
        with handle_signals(interrupt):
            return _dispatch(split_equals(args), recipe_args)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # as in `tempering list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if forget_interrupts():  # an import that was broken off fails with another error
            return _interrupted()
        from tempering.cli.errors import is_user_error, message

        if traceback or not is_user_error(error):
            raise
        notes = map(printable, getattr(error, "__notes__", ()))
        said = "\n".join((message(error, split_equals([*args, *recipe_args])), *notes))
        print(f"error: {said}\n(--traceback shows where)", file=sys.stderr)
        return 1


def _interrupted() -> int:
    """Say so, and return the exit code."""
    forget_interrupts()
    print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
    return 130


def _dispatch(args: list[str], recipe_args: tuple[str, ...]) -> int:
    if args[:1] == ["compare"] and args[1:2] and (command := COMPARE_COMMANDS.get(args[1])):
        return tyro.cli(command, prog=f"tempering compare {args[1]}", args=args[2:])

    def bound(name: str) -> Callable[..., Any]:
        command = load_command(name)
        takes_recipe_args = "recipe_args" in inspect.signature(command).parameters
        return partial(command, recipe_args=recipe_args) if takes_recipe_args else command

    if args and args[0] in COMMANDS:
        return tyro.cli(bound(args[0]), prog=f"tempering {args[0]}", args=args[1:]) or 0
    tyro.extras.subcommand_cli_from_dict(  # prints the help or an error, and exits
        {name: bound(name) for name in COMMANDS},
        prog="tempering",
        args=args,
        description="Knowledge distillation, with the temperature under control.",
    )
    return 0


def load_command(name: str) -> Callable[..., int | None]:
    """Return the function of a command."""
    command = COMMANDS[name]
    if not isinstance(command, str):
        return command
    module, _, function = command.partition(":")
    return getattr(importlib.import_module(module), function)


def split_equals(args: Sequence[str]) -> list[str]:
    """Split --flag=value into two arguments, so that suggestions for an unknown flag compare its name alone."""
    return [word for a in args for word in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]


def split_argv(args: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split into the command's and the recipe's arguments: after RECIPE for run and check, after -- for the others."""
    if args[:1] in (["run"], ["check"]) and len(args) > 1:
        words = split_equals([a for a in args[1:] if a != "--"])
        given = list[str]()
        for own in ("--from", "--generations") if args[0] == "run" else ("--from",):
            start = words.index(own) if own in words else len(words)
            given, words = given + words[start : start + 2], words[:start] + words[start + 2 :]
        recipe = words[:1] if words and not words[0].startswith("-") else []
        if recipe or (given[:1] == ["--from"] and len(given) % 2 == 0):
            return [args[0], *recipe, *given], tuple(words[len(recipe) :])
    if "--" in args:
        index = args.index("--")
        return args[:index], tuple(args[index + 1 :])
    return args, ()


def _recipe_and_flags(
    recipe: Path | None, flag_file: Path | None, argv: tuple[str, ...]
) -> tuple[Path, tuple[str, ...]]:
    """Return the recipe's file and its flags, with those of a file."""
    if flag_file is not None:
        from tempering.experiments.flag_files import flags_from

        return flags_from(flag_file, None if recipe is None else str(recipe), argv)
    if recipe is None:
        raise ValueError("give a recipe, or --from FILE: tempering run digits --method dtkd")
    from tempering.experiments.recipe import find

    return find(str(recipe)), argv


@contextmanager
def _recorded_as(command: str, recipe: Path, argv: tuple[str, ...]) -> Generator[None]:
    """Let a run record the flags of a file, in place of the name of the file."""
    before = sys.argv
    sys.argv = [before[0], command, str(recipe), *argv]
    try:
        yield
    finally:
        sys.argv = before


def _print_result(run: Run) -> None:
    """Print one line about a finished run."""
    from tempering.utils.text import best_and_last

    facts, records = run.facts, "" if run.folder is None else f"; records: {run.folder}"
    said = best_and_last(facts["result"], facts.get("best_by"))
    print(f"{printable(facts['label'])}, seed {facts['seed']}: {said}; {facts['result']['seconds']:.0f} s{records}")


def _print(*parts: Any, markup: bool = True) -> None:
    from rich.console import Console

    console = Console()
    for part in parts:
        text = printable(part) if isinstance(part, str) else part
        console.print(text, markup=markup, highlight=False, soft_wrap=isinstance(part, str))


if __name__ == "__main__":
    sys.exit(main())
