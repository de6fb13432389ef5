"""Loggers of Fabric for experiment trackers: Weights & Biases, trackio and MLflow.

They make a new run of the tracker at every start of a run, on rank 0, with the settings of the tracker itself: its
environment variables and login say where.
"""

from __future__ import annotations

import importlib
import re
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

PROJECT = "tempering"
MOST_PARAMS = 100  # of one request to MLflow
LONGEST = 500  # characters of a value; MLflow before 2.8 takes no more


class Tracker(Logger):
    """Base class: a run of a tracker that begins when it is first used.

    Args:
        folder: of the run, whose name is the tracker's name of it.
    """

    package = ""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.module: Any = importlib.import_module(self.package)
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.package

    @property
    def version(self) -> str:
        return "" if self._run is None else str(self._run.id)

    @property
    def run(self) -> Any:
        """The tracker's run; on rank 0 only."""
        if self._run is None:
            self._run = self._begin()
        return self._run

    @abstractmethod
    def _begin(self) -> Any:
        """Start a run."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.run.config.update(dict(params))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._end(success=status == "success")

    @abstractmethod
    def _end(self, *, success: bool) -> None:
        """End the run, and wait until everything is written."""


class WandbLogger(Tracker):
    """Log to a new run of W&B, whose files are in ``folder``; needs the extra "wandb" and a login."""

    package = "wandb"

    def _begin(self) -> Any:
        return self.module.init(project=PROJECT, name=self.folder.name, dir=str(self.folder))

    def _end(self, *, success: bool) -> None:
        self._run.finish(exit_code=0 if success else 1)


class TrackioLogger(Tracker):
    """Log to a new run of trackio, which is local unless TRACKIO_SPACE_ID is set; needs the extra "trackio"."""

    package = "trackio"

    def _begin(self) -> Any:
        return self.module.init(project=PROJECT, name=f"{self.folder.name}-{time.time_ns():x}")

    def _end(self, *, success: bool) -> None:
        self._run.finish()


class MlflowLogger(Tracker):
    """Log to a new run of MLflow, in MLFLOW_TRACKING_URI or MLflow's default; needs the extra "mlflow"."""

    package = "mlflow"

    @property
    def version(self) -> str:
        return "" if self._run is None else str(self._run.info.run_id)

    def _begin(self) -> Any:
        self.client = self.module.MlflowClient()
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = self.client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        return self.client.create_run(number, run_name=self.folder.name)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        number, now, kind = self.run.info.run_id, int(time.time() * 1000), self.module.entities.Metric
        values = [kind(_key(name), float(value), now, step or 0) for name, value in metrics.items()]
        self.client.log_batch(number, metrics=values)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        number, kind = self.run.info.run_id, self.module.entities.Param
        values = [kind(_key(name), str(value)[:LONGEST]) for name, value in dict(params).items()]
        for start in range(0, len(values), MOST_PARAMS):
            self.client.log_batch(number, params=values[start : start + MOST_PARAMS])

    def _end(self, *, success: bool) -> None:
        self.client.set_terminated(self.version, "FINISHED" if success else "FAILED")


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)
