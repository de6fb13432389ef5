"""Decide whether a teacher is better than a guess, from as many batches as it takes: a sequential test."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.rows import Rows, class_labels, is_scored
from tempering.training.config import VERDICTS, SelfCheckError
from tempering.training.distributed import from_all_processes, is_first_process, while_all
from tempering.utils.files import file_lock, sha256_text, write_atomic

FALSE_ALARM = 5e-4  # largest probability to refuse a teacher that is at least ``good_accuracy``
MISSED = 0.05  # largest probability to accept a teacher that guesses
EFFECT = 0.1  # how much better than a guess a good teacher is, in standard deviations of a guess's hits on one row
MOST_BATCHES = 100


class Verdict(NamedTuple):
    """The result of a test, "good", "guess" or "open" (not decided), and the counts that it is computed from."""

    result: str
    correct: int = 0
    rows: int = 0
    classes: int = 0
    batches: int = 0

    @property
    def is_likely_good(self) -> bool:
        """Whether a guess would be right so often in at most one of twenty runs, where batches ran out."""
        if self.rows < 8 or self.classes < 2:
            return False
        k = torch.arange(self.correct, self.rows + 1, dtype=torch.float64)
        log_binomial = math.lgamma(self.rows + 1) - torch.lgamma(k + 1) - torch.lgamma(self.rows - k + 1)
        log_p = log_binomial - k * math.log(self.classes) + (self.rows - k) * math.log1p(-1 / self.classes)
        return float(log_p.exp().sum()) <= MISSED

    @property
    def share(self) -> str:
        """The accuracy, for messages."""
        return f"{100 * self.correct / max(1, self.rows):.1f} %"


def good_accuracy(classes: int) -> float:
    """Return the smallest accuracy that a good teacher of this number of classes has: above chance by ``EFFECT``."""
    chance = 1.0 / classes
    return chance + EFFECT * math.sqrt(chance * (1.0 - chance))


def log_evidence(correct: Tensor, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the log of the evidence against "it is good" and against "it guesses", of counts of hits, (...) each.

    Evidence against a hypothesis is the mean likelihood ratio of a few alternatives on the other side of it. Its
    expectation under the hypothesis is at most 1 at any time, so it ever exceeds 1 / a with probability at most a,
    however often it is looked at (Ville's inequality).
    """
    chance, good = 1.0 / classes, good_accuracy(classes)
    better = [good, *(chance + (1.0 - chance) * part for part in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0))]

    def against(null: float, alternatives: list[float], weights: list[float] | None = None) -> Tensor:
        q = torch.tensor(alternatives, dtype=torch.float64)
        w = torch.full_like(q, 1 / len(q)) if weights is None else q.new_tensor(weights)
        hits, misses = correct.double().unsqueeze(-1), (rows - correct).double().unsqueeze(-1)
        ratio = torch.xlogy(hits, q / null) + torch.xlogy(misses, (1.0 - q).clamp_min(0.0) / (1.0 - null))
        return (ratio + w.log()).logsumexp(-1)

    # the first of these is what shuffled classes look like
    return against(good, [0.0, chance / 2, chance], [0.5, 0.25, 0.25]), against(chance, better)


def judge(counts: Iterable[tuple[Rows, Tensor | None]]) -> Verdict:
    """Count hits batch by batch until the teacher is known to be good, or to guess; "open" where batches run out.

    The hits are those of all processes, so that all have the same verdict after the same number of batches.

    Args:
        counts: per batch its rows and the teacher's likeliest class of each, as ``Task.scored_rows`` returns them.
    """
    correct = rows = classes = batches = 0
    for block, top in while_all(counts):
        batches, classes = batches + 1, block.student.shape[1]
        found = from_all_processes(_hits(block, top))
        if any(part is None for part in found):
            return Verdict("open", correct, rows, 0, batches)
        correct, rows = (total + sum(part[i] for part in found if part) for i, total in enumerate((correct, rows)))
        if classes < 2:
            return Verdict("open", correct, rows, classes, batches)
        no_good, no_guess = log_evidence(torch.tensor(correct), torch.tensor(rows), classes)
        if float(no_guess) >= -math.log(MISSED):
            return Verdict("good", correct, rows, classes, batches)
        if float(no_good) >= -math.log(FALSE_ALARM):
            return Verdict("guess", correct, rows, classes, batches)
        if batches >= MOST_BATCHES:
            break
    return Verdict("open", correct, rows, classes, batches)


def _hits(block: Rows, top: Tensor | None) -> tuple[int, int] | None:
    """Return the numbers of hits and of labeled rows; None without labels or classes."""
    if block.target is None or top is None:
        return None
    known = is_scored(block.target, block.weight)
    return int(((top == class_labels(block.target)) & known).sum()), int(known.sum())


def shared_verdict(teacher: str, decide: Callable[[], Verdict]) -> Verdict:
    """Return the verdict on the teacher of this identity, decided once by all runs that share a folder of verdicts.

    All runs of a grid have the verdict of the run that was first, so that none of them is refused alone.
    """
    if not (folder := os.environ.get(VERDICTS)):
        return decide()
    path = Path(folder) / f"{sha256_text(teacher)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_first = is_first_process()
    with file_lock(path.with_suffix(".lock")) if is_first else nullcontext():  # others of its run wait for the first
        stored = path.read_text() if is_first and path.is_file() else None
        if (stored := from_all_processes(stored)[0]) is not None:
            return Verdict(**json.loads(stored))
        verdict = decide()
        if is_first:
            write_atomic(path, json.dumps(verdict._asdict()))
        return verdict


def above_chance(identity: str, counts: Callable[[], Iterable[tuple[Rows, Tensor | None]]], which: str) -> str:
    """Return the result of the test of one teacher: "ok (...)", or why it is not decided.

    Args:
        which: the teacher, for messages.

    Raises:
        SelfCheckError: for a teacher that guesses.
    """
    verdict = shared_verdict(identity, lambda: judge(counts()))
    told = f"right on {verdict.correct} of {verdict.rows} rows, as a guess among {verdict.classes} classes would be"
    if verdict.result == "guess":
        raise SelfCheckError(
            f"{which} is {told}. Are its classes in the labels' order, its weights loaded, its inputs normalized "
            "as in its training? skip_checks=['above chance'] (--skip-checks 'above chance') skips this check, and "
            "selfcheck=False (--no-selfcheck) all of them."
        )
    if verdict.result == "good" or verdict.is_likely_good:
        where = "the first batch" if verdict.batches == 1 else f"the first {verdict.batches} batches"
        return f"ok ({verdict.share} on {where})"
    if not verdict.classes:
        return "no labels"
    if verdict.rows >= 8 and verdict.classes > 1:
        warnings.warn(
            f"{which} may be no better than a guess: it is {told}, and there are too few rows to be sure.",
            stacklevel=4,
        )
    return f"only {verdict.rows} labeled rows of {verdict.classes} classes"
