"""A step does not wait for its device: nothing in it asks for a number."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tempering
from tempering import distill
from tempering.methods import DIST, DKD, DTKD, KD, Method, Supervised
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.temperature import Cosine, Curriculum, Sharpness, Standardized

PACKAGE = Path(tempering.__file__).parent
# who looks at numbers on a CPU alone, where a look costs nothing (Curriculum also once in a while on a device)
CPU_ONLY = {
    "_log",
    "_exact",
    "exact",
    "statistics",
    "_warn_once",
    "_count_at_bound",
    "__post_init__",
    "require_labels",
    "mask_constants",
    "with_reference",
}
METHODS = {
    "supervised": Supervised,
    "kd": KD,
    "dkd": DKD,
    "dtkd": DTKD,
    "dtkd-published": lambda: DTKD(temperature=Sharpness(4.0, solve="published", differentiable=True)),
    "standardized": lambda: KD(temperature=Standardized()),
    "ctkd": lambda: KD(temperature=Curriculum()),
    "cosine": lambda: KD(temperature=Cosine()),
    "dist": DIST,
}


pytestmark = pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)")


class Looks(TorchDispatchMode):
    """Counts by whom a tensor's value is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # not by the word "tempering", which may be in the name of any folder above the tests
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
            self.by[frames[-1].name if frames else "torch"] += 1
        return func(*args, **(kwargs or {}))


def run(method: Method, device: str = "cpu", on_step: Callable[..., None] | None = None) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.randint(5, (8,)), torch.arange(8) + 8 * i) for i in range(6)]
    distill(
        nn.Linear(6, 5),
        Live(nn.Linear(6, 5)),
        batches,
        method=method,
        task=Classification(),
        optimizer=torch.optim.SGD,
        steps=6,
        accelerator=device,
        selfcheck=False,
        log_every=100,
        quiet=True,
        on_step=on_step,
    )


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_nobody_asks_for_a_number(make: Callable[[], Method]) -> None:
    """Between the first step, which is logged, and the last, of what the loop, the method and the policy compute."""
    seen: dict[int, Counter[str]] = {}
    with Looks() as looks:
        run(make(), on_step=lambda step, loss: seen.update({step: Counter(looks.by)}))
    between = seen[4] - seen[1]
    asked = {name: count for name, count in between.items() if name not in CPU_ONLY}
    assert not asked, f"a device would be waited for in {asked}"
    assert between["_log"] == 3, "the looks at the loss are seen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch cannot say who waits for it")
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_no_synchronization_on_cuda(make: Callable[[], Method]) -> None:
    def strict(step: int, loss: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")

    try:
        run(make(), "cuda", strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
