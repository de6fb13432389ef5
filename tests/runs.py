"""Small runs that the engine's tests share: points in space, nets, loaders, a method that trains something itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tempering.data import Batches
from tempering.methods import KD, Method
from tempering.objectives import cross_entropy
from tempering.rows import Rows
from tempering.tasks import Classification
from tempering.training import checkpoint
from tempering.training.config import Run
from tempering.training.distill import distill

DIMS, CLASSES = 6, 5
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
TIMES = {"step_ms", "rows_per_second", "seconds"}
Part = tuple[Tensor, ...]


def teacher_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its classes are the labels of ``points``, so it is right on most of them."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(DIMS, CLASSES), nn.BatchNorm1d(CLASSES, affine=False)).to(dtype)


def student_net(*, dropout: float = 0.0, norm: bool = False, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [nn.Linear(DIMS, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(16, CLASSES))


def points(n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """n points and the class that the teacher gives to each."""
    x = torch.randn(n, DIMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return x, teacher_net(dtype).eval()(x).argmax(-1)


class Weighted(Classification):
    """Batches of (inputs, labels, weights)."""

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        return batch[0], batch[0], None

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        return [Rows(student, student.detach() if teacher is None else teacher, batch[1], batch[2])]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        return {"logits": batch[2].sum()}


def weighted(n: int, *, dtype: torch.dtype = torch.float32) -> Part:
    """Points of very unequal weights, some of them 0, some unlabeled."""
    x, y = points(n, dtype=dtype)
    weight = torch.linspace(0.0, 3.0, n, dtype=dtype).square()
    weight[::9] = 0.0
    return x, torch.where(torch.arange(n) % 7 == 3, -100, y), weight


def cut(parts: Part, *sizes: int) -> list[Part]:
    """The rows in batches of these sizes, over and over until there are no more."""
    out, low, n = [], 0, 0
    while low < len(parts[0]):
        size = sizes[n % len(sizes)]
        out.append(tuple(p[low : low + size] for p in parts))
        low, n = low + size, n + 1
    return out


class Shared:
    """A list of batches of which each rank gets an unequal share."""

    def __init__(self, batches: Sequence[Part], rank: int = 0, world: int = 1) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def shard(self, rank: int, world: int) -> Shared:
        return Shared(self.batches, rank, world)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Part]:
        for batch in self.batches:
            third = len(batch[0]) // 3
            yield batch if self.world == 1 else tuple(p[third:] if self.rank else p[:third] for p in batch)


class Noisy(Dataset[Part]):
    """Points that every look moves a little, by the global random numbers."""

    def __init__(self, n: int) -> None:
        self.x, self.y = points(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Part:
        return self.x[i] + 0.1 * torch.randn(DIMS), self.y[i]


def images(**more: Any) -> Batches:
    """Points as images of 1 x 2 x 3 pixels, cropped, flipped and shuffled."""
    x, y = points(60)
    pixels = (255 * x.sigmoid()).to(torch.uint8).view(60, 1, 2, 3)
    return Batches(pixels, y, batch_size=8, mean=(0.5,), std=(0.25,), shuffle=True, crop=1, flip=True, **more)


# eight batches an epoch, the last one short
LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: cut(points(60), 8),
    "shuffled": lambda: DataLoader(Noisy(60), batch_size=8, shuffle=True),
    "own generator": lambda: DataLoader(
        Noisy(60), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "workers": lambda: DataLoader(Noisy(60), batch_size=8, shuffle=True, num_workers=1),
    "batches": images,
}


class Learned(Method):
    """A method with a projector, sized by the first rows, and a learned scale."""

    paper = "none: a test's"
    zero_when_equal = False
    shift_invariant = False

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.ModuleList()
        self.scale = nn.Parameter(torch.ones(()))

    def setup(self, rows: Rows) -> None:
        if not len(self.projector):
            self.projector.append(nn.Linear(rows.student.shape[1], rows.student.shape[1]))
            self.to(rows.student)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        said = self.scale * self.projector[0](rows.student)
        return {"soft": (said - rows.teacher).square().mean(-1), "hard": cross_entropy(rows)}


def go(batches: Any, *, student: nn.Module | None = None, teacher: Any = "net", **more: Any) -> Run:
    """distill() on the CPU with KD and little said."""
    student = student_net() if student is None else student
    teacher = teacher_net() if teacher == "net" else teacher
    settings = {"method": KD(), "optimizer": SGD, "accelerator": "cpu", "quiet": True, "log_every": 1} | more
    return distill(student, teacher, batches, **settings)


# runs that are stopped and taken up again: 20 steps, 8 an epoch, a checkpoint every 3 and at each epoch's end

STEPS = 20


def flattened(net: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), net)


def resumable(loader: str, out: Path, **more: Any) -> Run:
    """A run whose every random number counts: dropout, augmentation, order; with a method that trains, and a clip."""
    student, teacher = flattened(student_net(dropout=0.3, norm=True)), flattened(teacher_net())
    torch.manual_seed(77)  # of the method's projector
    wanted = {"method": Learned(), "optimizer": ADAMW, "schedule": cosine, "max_grad_norm": 1.0, "steps": STEPS} | more
    wanted = {"out": out, "checkpoint_every": 3, "validation": cut(points(20, seed=9), 10), "selfcheck": False} | wanted
    return go(LOADERS[loader](), student=student, teacher=teacher, **wanted)


def cosine(progress: float) -> float:
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(3.14159 * progress)))


def stop_at(step: int) -> Callable[[int, Tensor], None]:
    """An ``on_step`` that breaks off."""

    def stop(number: int, loss: Tensor) -> None:
        if number == step:
            raise KeyboardInterrupt

    return stop


# what is left of a run


def left(out: Path) -> dict[str, Any]:
    """Everything that must be the same: the last checkpoint's bits, the weights' files, and the lines."""
    state = checkpoint.load(out / "checkpoints")
    assert state is not None
    state["at"]["seconds"] = 0.0
    lines = {
        name: [timeless(json.loads(line)) for line in (out / name).read_text().splitlines()]
        for name in ("steps.jsonl", "epochs.jsonl")
    }
    files = {name: (out / name).read_bytes() for name in ("student.safetensors", "best.safetensors")}
    return {"state": state, "lines": lines, "files": files}


def timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMES}


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def weights(module: nn.Module) -> Tensor:
    """All parameters in one line, in float64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])
