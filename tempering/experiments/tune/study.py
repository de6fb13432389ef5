"""A search's Optuna journal, and functions on its trials."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments.tune.space import Dimension
from tempering.reports.compare import Metric
from tempering.utils.files import read_json, verify, write_atomic

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
SEAL = "study.json"  # size and hash of the journal, so that a journal that is cut or changed is named
STARTUP = 5  # complete trials before the first may be pruned


def study_of(folder: Path, seed: int, *, prune: bool = True) -> optuna.Study:
    """Open the search's journal; create it if there is none.

    Raises:
        ImportError: if optuna is not installed.
        ValueError: if the journal was cut or changed after it was written.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError as error:
        raise ImportError("a search needs optuna: pip install 'tempering[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / JOURNAL
    _verify(folder)
    _mend(path)
    storage = JournalStorage(JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP) if prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=storage, study_name="tune", direction="maximize", pruner=pruner, load_if_exists=True
    )
    # the sampler's state is not stored: a resumed search must not repeat the first samples
    study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * len(study.get_trials(deepcopy=False)))
    return study


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that are complete or pruned."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def best(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """Return the trial with the best score at its last epoch.

    Raises:
        ValueError: if no trial is complete.
    """
    done = [t for t in finished(study) if t.state.name == "COMPLETE"]
    if not done:
        raise ValueError("no trial is complete, so there is no best one. Use more --trials, or --no-prune.")
    return max(done, key=lambda t: (t.value, -t.number))


def shown(metric: Metric | None, value: float | None) -> str:
    """Format a trial's value as a score."""
    if value is None or metric is None:
        return "no score"
    return f"{metric.name.replace('/', ' ')} {metric.show(-value if metric.lower else value)}{metric.unit}"


def suggest(trial: optuna.Trial, d: Dimension) -> str:
    """Sample a value of the dimension, as text with four significant digits; the trial runs with exactly this text."""
    if d.low is None or d.high is None:
        return trial.suggest_categorical(d.name, d.choices)
    return f"{trial.suggest_float(d.name, d.low, d.high, log=d.log):.4g}"


def parameter(d: Dimension, text: str | None) -> Any:
    """Return the method's default value as a parameter; None if it is outside the range."""
    if d.low is None or d.high is None:
        return text if text in d.choices else None
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if d.low <= value <= d.high else None


def seal(folder: Path) -> None:
    """Write the journal's size and hash beside it, unless they are up to date."""
    data, path = (folder / JOURNAL).read_bytes(), folder / SEAL
    position = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "last": data.count(b"\n")}
    if not path.is_file() or read_json(path) != position:
        write_atomic(path, json.dumps(position))


def _verify(folder: Path) -> None:
    """Raise ValueError if the journal does not begin with the bytes that were sealed."""
    try:
        if position := read_json(folder / SEAL):
            verify(folder / JOURNAL, position)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition(" Restore")[0]
        raise ValueError(
            f"the journal of the search in {folder} is damaged: {reason} Restore {JOURNAL}; or remove it and {SEAL}, "
            "and run the same command: trials that are finished are read from their folders."
        ) from error


def _mend(path: Path) -> None:
    """Remove an incomplete last line and a stale lock left by a killed process; the caller holds the search's lock."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    Path(f"{path}.lock").unlink(missing_ok=True)
