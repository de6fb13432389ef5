"""Log to Weights & Biases with Fabric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only


class WandbLogger(Logger):
    """Log to a new W&B run in ``folder``; needs the extra "wandb" and a login."""

    def __init__(self, folder: str | Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.folder = str(folder)
        self.run: Any = wandb.init(project="tempering", dir=self.folder)  # pyright: ignore[reportUnknownMemberType]

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return str(self.run.id)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.run.config.update(dict(params))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "success" else 1)
