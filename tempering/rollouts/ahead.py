"""Generate ahead of the training: a thread that asks the engine, at most ``staleness`` batches before they are used."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

from tempering.rollouts.engines import GenerationRequest
from tempering.utils.device import is_distributed


class _Ahead(NamedTuple):
    """A batch to come: generated (``request``, ``answer``) or of the data; ``pushed``: of its weights, at ``since``."""

    number: int
    batch: Any
    request: GenerationRequest | None
    answer: Future[Any] | None
    pushed: Future[Any] | None
    since: int


def generate_ahead(rollouts: Any, batches: Iterator[tuple[int, Any]], start: int) -> Iterator[Any]:
    """Yield the batches in their order, generated in a thread while those before are trained on.

    One thread pushes weights and generates, in the order of the calls, so which weights a batch has depends on its
    number alone: those before batch ``index - staleness`` at most, of the refreshes that are due. With several
    processes weights are pushed in between, on all together.

    Args:
        rollouts: an ``OnPolicy`` with an engine.
        batches: (index, batch) from ``start`` on.
        start: the first index.
    """
    engine = rollouts.engine
    assert engine is not None
    several = is_distributed() and torch.distributed.get_world_size() > 1
    waiting: deque[_Ahead] = deque()
    pushed: Future[Any] | None = None
    pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
    try:
        for used in itertools.count(start):
            coming = list(itertools.islice(batches, engine.staleness + 1 - len(waiting)))
            if coming and rollouts.is_refresh_due(used):
                rollouts.refreshed = used
                snapshot = engine.snapshot()
                if several:
                    wait([ahead.answer for ahead in waiting if ahead.answer is not None])
                    engine.push(snapshot)
                else:
                    pushed = pool.submit(engine.push, snapshot)
            since = rollouts.refreshed
            for index, batch in coming:
                request = answer = None
                if rollouts.is_generated(index):
                    request = rollouts.request(batch, rollouts.batch_seed(index))
                    answer = pool.submit(request.ask)
                waiting.append(_Ahead(index, batch, request, answer, pushed, index if since is None else since))
            if not waiting:
                return
            yield _collect(rollouts, waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _collect(rollouts: Any, ahead: _Ahead) -> Any:
    """Wait for a batch, and return it."""
    if ahead.pushed is not None:
        ahead.pushed.result()  # its error is the cause of what follows
    if ahead.request is None or ahead.answer is None:
        return ahead.batch
    batch = rollouts.complete(ahead.request, ahead.answer.result())
    rollouts.stats.stale += ahead.number - ahead.since
    return batch
