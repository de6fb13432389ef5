"""Send scalars of a run to loggers. A logger that fails is left out from then on, with a warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tempering.utils.text import redact, without_secrets

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow", "trackio")
LOGGED_AS = {"done": "success", "interrupted": "aborted", "failed": "failed"}
DESCRIBED = ("label", "seed", "method", "student", "teacher", "data", "settings", "optimizer", "versions", "command")


class Loggers:
    """The loggers of a run.

    Args:
        loggers: names, or loggers of Fabric.
        folder: of the run.
        on_failure: called with the name of a logger that fails during the run, and why.

    Raises:
        ValueError: for an unknown name, or a name without a folder.
        ImportError: for a logger that is not installed.
    """

    def __init__(
        self, loggers: Sequence[Any], folder: Path | None, on_failure: Callable[[str, str], None] | None = None
    ) -> None:
        self.active: list[Any] = [make_logger(logger, folder) for logger in loggers]
        self.on_failure = on_failure

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Log the content of facts.json that describes the run, without secrets.

        Raises:
            ConnectionError: for a logger that cannot start.
        """
        described = {name: facts[name] for name in DESCRIBED if facts.get(name) is not None}
        params = flat(without_secrets(json.loads(json.dumps(described, default=str))))
        for logger in self.active:
            try:
                logger.log_hyperparams(params)
            except NotImplementedError:  # Fabric's CSV logger
                continue
            except Exception as error:
                raise ConnectionError(
                    f"the logger {_name(logger)} cannot start: {_reason(error)}. Nothing was trained. Is its server "
                    "reachable, and are you logged in? Or leave it out of loggers=."
                ) from error

    def step(self, line: Mapping[str, Any]) -> None:
        """Log the loss, its terms, the learning rate, the time and the mean temperatures of a step's record."""
        scalars: dict[str, float] = {f"train/{name}": line[name] for name in ("loss", "lr", "step_ms")}
        scalars |= {f"train/{name}": value for name, value in line["terms"].items()}
        scalars |= {f"train/{side}": line[side]["mean"] for side in ("T_teacher", "T_student") if side in line}
        self._log(scalars, line["step"])

    def scores(self, scores: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Log the scores of every split."""
        self._log(
            {f"{split}/{name}": value for split, values in scores.items() for name, value in values.items()}, step
        )

    def end(self, status: str) -> None:
        """Complete the logs of a run that is "done", "interrupted" or "failed"."""
        self._each(lambda logger: logger.finalize(LOGGED_AS[status]), "at the end")

    def _log(self, scalars: dict[str, float], step: int) -> None:
        self._each(lambda logger: logger.log_metrics(dict(scalars), step=step), f"at step {step}")

    def _each(self, call: Callable[[Any], object], when: str) -> None:
        for logger in list(self.active):
            try:
                call(logger)
            except Exception as error:  # hours of training are not lost for it
                self.active.remove(logger)
                name, reason = _name(logger), f"failed {when}: {_reason(error)}"
                warnings.warn(
                    f"the logger {name} {reason}. The run continues without it; its own records are complete.",
                    stacklevel=2,
                )
                if self.on_failure is not None:
                    self.on_failure(name, reason)


def _name(logger: Any) -> str:
    return str(getattr(logger, "package", None) or type(logger).__name__)


def _reason(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".strip())[:500]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists of mappings: {"a": {"b": 1}} -> {"a.b": 1}; other lists become text."""
    items: dict[str, Any] = {}
    if isinstance(value, Mapping):
        items = dict(cast("Mapping[str, Any]", value))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in cast("list[Any]", value)):
        items = {str(i): item for i, item in enumerate(cast("list[Any]", value))}
    else:
        return {name: " ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else value}
    return {
        key: inner for part, item in items.items() for key, inner in flat(item, f"{name}.{part}".lstrip(".")).items()
    }


def make_logger(logger: Any, folder: Path | None) -> Any:
    """Create the logger with this name; return a logger of Fabric unchanged."""
    if not isinstance(logger, str):
        return logger
    if logger not in LOGGERS:
        raise ValueError(f"loggers are {', '.join(LOGGERS)} or objects of lightning_fabric; got {logger!r}.")
    if folder is None:
        raise ValueError(f"the logger {logger!r} needs a folder to write to: give out=FOLDER.")
    try:
        if logger in ("wandb", "mlflow", "trackio"):
            from tempering.training import trackers

            return getattr(trackers, f"{logger.capitalize()}Logger")(folder)
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        if logger == "tensorboard":
            return TensorBoardLogger(root_dir=folder, name="logs", version=logger)
        # one file per start of the run, because Fabric's logger removes existing ones
        count = len(list(Path(folder, "logs").glob("csv*")))
        version = f"csv-{count + 1}" if count else "csv"
        return CSVLogger(root_dir=folder, name="logs", version=version, flush_logs_every_n_steps=1)
    except ImportError as error:
        raise ImportError(f'the logger {logger!r} is not installed: pip install "tempering[{logger}]"') from error
