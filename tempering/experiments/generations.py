"""Born-again networks: the student of each generation is the teacher of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tempering.experiments.recipe import describe
from tempering.teachers.live import Live
from tempering.training.config import Run
from tempering.training.experiment import Experiment


def run_generations(describe: Callable[[int], Experiment], generations: int) -> list[Run]:
    """Train ``generations`` students, one after the other, and return their runs.

    The student of generation i, with its last weights, teaches generation i + 1. Called again, finished generations are
    read and an interrupted one is resumed, with the same results to the bit.

    Args:
        describe: number of the generation, from 1 -> its experiment, with a new student and a folder of its own. Its
            teacher is that of generation 1 only.
        generations: at least 1.

    Raises:
        ValueError: for fewer generations, or two of one folder.

    Reference: Furlanello et al., "Born-Again Neural Networks", ICML 2018, arXiv:1805.04770.
    """
    if generations < 1:
        raise ValueError(f"a chain needs generations >= 1; got {generations}.")
    runs, folders = list[Run](), set[Path]()
    for number in range(1, generations + 1):
        experiment = describe(number)
        if experiment.out in folders:
            raise ValueError(
                f"generation {number} has the folder of an earlier one, {experiment.out}. Give each its own."
            )
        folders |= set() if experiment.out is None else {experiment.out}
        facts = {**experiment.facts, "generation": number}
        if runs:
            teacher = Live(runs[-1].student, normalization="data")
            facts["teacher"] = {"name": f"generation {number - 1}"}
            experiment = replace(experiment, teacher=teacher)
        runs.append(replace(experiment, facts=facts).run())
    return runs


def run_recipe_generations(recipe: Path, argv: Sequence[str], generations: int, *, prog: str) -> list[Run]:
    """Run a recipe ``generations`` times, with seeds that count up, in OUT/generation-1, OUT/generation-2, ...

    Raises:
        ValueError: for a recipe without a folder, or without a teacher.
    """
    first = describe(recipe, argv, prog=prog)
    if first.out is None or first.teacher is None:
        raise ValueError(
            "generations need a folder and a method with a teacher: tempering run digits --method kd --generations 3."
        )
    out, seed = first.out, first.config.seed

    def generation(number: int) -> Experiment:
        own = (f"--out={out / f'generation-{number}'}", f"--seed={seed + number - 1}")
        return describe(recipe, (*argv, *own), prog=prog)

    return run_generations(generation, generations)
