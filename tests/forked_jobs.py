"""Jobs of grids and searches, each forked from one process that has imported everything once.

Their own processes are started by the tests of commands that are killed, in ``test_comparison`` and ``test_tune``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

SLOW = [
    "tempering.cli.main",
    "tempering.experiments.recipe",
    "tempering.training.distill",
    "tempering.training.trainer",
    "tempering.training.selfcheck",
    "lightning_fabric",
    "torchmetrics.functional.classification",
]


class Forked:
    """A job's process as ``Popen`` starts it."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: Any, **_: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SLOW, __name__])
        self.process = context.Process(target=run_command, args=(command[2:], dict(env), stdout.name))
        self.process.start()
        self.pid, self.terminate, self.kill = self.process.pid, self.process.terminate, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode


def run_command(command: Sequence[str], env: Mapping[str, str], log: str) -> None:
    """What ``python -m MODULE ARGUMENTS`` does, for the two modules that jobs are."""
    module, *words = command
    os.environ.update(env)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  open to the end, for a traceback
    sys.argv = [module, *words]
    main: Any = importlib.import_module("tempering.cli.main" if module == "tempering" else module).main
    sys.exit(main(words))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let grids and searches in this process fork their jobs."""
    from tempering.experiments.compare import runner

    jobs = SimpleNamespace(**{name: getattr(subprocess, name) for name in subprocess.__all__} | {"Popen": Forked})
    monkeypatch.setattr(runner, "subprocess", jobs)
    monkeypatch.setattr(runner, "_as_nice", lambda pid: None)  # of a session of its own, which a fork has not
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    if "tempering.experiments.tune.runner" in sys.modules:  # it needs an optional package
        monkeypatch.setattr("tempering.experiments.tune.runner.subprocess", jobs)
