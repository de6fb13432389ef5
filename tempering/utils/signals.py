"""Signals that ask a process to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# sent before a job is ended or suspended: by Slurm (--signal, preemption), Grid Engine (-notify), LSF, a terminal
BATCH = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
ALL = (signal.SIGINT, *BATCH)


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], object], numbers: Sequence[signal.Signals] = ALL
) -> Iterator[None]:
    """Handle signals in a context; those that are ignored, as under nohup, stay ignored."""
    before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
