"""Runs that kill themselves with SIGKILL, each in its own process: ``python -m tests.killed_runs OUT``, see KILLS."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tempering.training import checkpoint
from tempering.utils import files
from tests.runs import resumable

# name -> (loader, what kills, the how-manieth time)
KILLS = {
    "in mid-epoch, batches": ("batches", "step", 12),
    "in mid-epoch, shuffled": ("shuffled", "step", 7),
    "before the first checkpoint": ("shuffled", "step", 2),
    "writing tensors": ("shuffled", "tensors.safetensors", 5),
    "writing the state": ("batches", "state.json", 4),
    "renaming": ("batches", "rename", 3),
    "putting one in another's place": ("list", "replace", 1),
    "writing the best weights": ("batches", "best.safetensors.partial", 2),
    "after an epoch's scores": ("shuffled", "scores", 2),
}


class Killer:
    """Ends this process at the how-manieth call."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def set_killer(what: str, count: int) -> dict[str, Any]:
    """Put a killer in its place; what the run has to be told for it."""
    kill = Killer(count)
    if what == "step":
        return {"on_step": kill}
    if what in ("rename", "replace"):
        rename = Path.rename

        def renaming(self: Path, target: Path) -> Path:
            moved = rename(self, target)
            # "replace": between the two renames that exchange a step's checkpoint for a newer one
            if what == "rename" or str(target).endswith(checkpoint.OLD):
                kill()
            return moved

        Path.rename = renaming
        # an epoch's end is at step 8, where a checkpoint lies already
        return {"checkpoint_every": 4, "keep": 1} if what == "replace" else {}
    if what == "scores":
        from tempering.training.run_records import Recorder

        epoch = Recorder.epoch
        Recorder.epoch = lambda self, line: (epoch(self, line), kill())[0]
        return {}
    write = files.write_file

    def half(path: Path, data: bytes, **how: bool) -> None:
        if path.name == what:
            path.write_bytes(data[: len(data) // 2])
            kill()
        write(path, data, **how)

    files.write_file = half
    return {}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    # once, before the forks, not in each of them
    import lightning_fabric.strategies.model_parallel  # noqa: F401
    import torchmetrics.functional.classification  # noqa: F401

    for name, (loader, what, count) in KILLS.items():
        child = os.fork()
        if not child:
            resumable(loader, out / name, **set_killer(what, count))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name}: not killed, {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
