"""A teacher's last hidden states on disk: H numbers a token in place of V logits, and its head beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tempering.rows import widened
from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import STORED, Recordable, device_of, narrowed
from tempering.teachers.cache.shards import Shards, given, key_of, record_shards, room
from tempering.teachers.live import Live
from tempering.teachers.outputs import Head, Hidden

KIND, HEAD = "hidden states", "head.safetensors"


class CachedHidden(Teacher):
    """Looks the last hidden states up by sample id: ``Hidden`` (B, L, H), whose head makes logits of the rows alone.

    A run by ``distill`` makes the logits of its rows, (N, V); ``kernels.linear_loss`` on ``answer.rows(place, shape)``
    and ``answer.head`` never holds them. Files are mapped, and many processes may read them.

    Args:
        path: the folder that ``record_hidden`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, BrokenCache, ValueError: as ``Shards`` does.
    """

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        self.shards = Shards(path, kind=KIND, batches=batches, teacher=teacher, checksum=checksum)
        self.path, self.identity = self.shards.path, self.shards.identity
        held = self.shards.file(HEAD)
        about, names = held.metadata(), set(held.keys())
        bias = held.get_tensor("bias") if "bias" in names else None
        cap = None if about["cap"] == "None" else float(about["cap"])
        self.head = Head(held.get_tensor("weight"), bias, scale=float(about["scale"]), cap=cap)

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Hidden:
        found = [file.get_slice("states")[row : row + 1] for file, row in self.shards.at(ids)]
        states = torch.cat(found) if found else torch.zeros(0, self.shards.length, self.head.weight.shape[1])
        device = ids.device if ids is not None else states.device
        if self.head.weight.device != device:
            self.head = self.head.to(device)
        return Hidden(states.to(device, non_blocking=True), self.head)

    def to(self, device: torch.device | str) -> Self:
        self.head = self.head.to(device)
        return self

    def objection(self, batches: Any) -> str | None:
        return self.shards.objection(batches)


def record_hidden(
    teacher: Live,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Callable[[Any], tuple[Any, Any, Any]],
    precision: str = "bf16",
    head: Head | None = None,
    quiet: bool = False,
) -> CachedHidden:
    """Ask the teacher once about every text, keep what its head reads, and open the result.

    A token takes 2 H bytes, or 4 H in fp32, which gives the teacher's logits but for the order of sums. That the kept
    head makes them is looked at in every shard. What was cut short goes on; of several processes one records.

    Args:
        teacher: a live language model of transformers.
        batches: texts of one length, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: how a batch becomes the models' inputs: ``Generation().inputs``. The model must take them: ``.meet``.
        precision: "bf16", "fp16" or "fp32", in which hidden states are stored.
        head: where ``head_of(model)`` does not find it, or not its scale and cap.
        quiet: no progress bar.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a head that does not make the
            teacher's logits, or states that are NaN or beyond the precision.
        TypeError: for a model without a head.
    """
    if precision not in STORED:
        raise ValueError(f"record_hidden needs precision {', '.join(map(repr, STORED))}; got {precision!r}.")
    path, head = Path(path), head or head_of(teacher.model)
    asked = _Asked(teacher, batches, inputs, precision, head)
    tensors = {n: x.detach() for n, x in (("weight", head.weight), ("bias", head.bias)) if x is not None}
    about = {"scale": repr(float(head.scale)), "cap": repr(None if head.cap is None else float(head.cap))}
    key = key_of(KIND, batches, teacher, precision=precision, head=_digest(tensors, about))
    size = room(key["length"] * head.weight.shape[1] * STORED[precision][1].itemsize)
    record_shards(path, key, asked, teacher, size=size, more={HEAD: (tensors, about)}, quiet=quiet)
    return CachedHidden(path, batches=batches, teacher=teacher)


def head_of(model: nn.Module) -> Head:
    """The output embeddings of a model of transformers, with the scale and the soft cap that its config names.

    They are the model's own, so ``kernels.linear_loss`` trains those of a student.

    Raises:
        TypeError: for a model that has none.
    """
    core, layer = _layer_of(model)
    config: Any = getattr(core, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, over, cap = (_number(config, n) for n in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
    bias, more = layer.bias, getattr(core, "final_logits_bias", None)
    if isinstance(more, Tensor):
        bias = more.flatten() if bias is None else bias + more.flatten()
    return Head(layer.weight, bias, scale=(scale or 1.0) / (over or 1.0), cap=cap)


def _layer_of(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    for core in model.modules():
        layer = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None  # pyright: ignore
        if isinstance(layer, nn.Linear):
            return core, layer
    raise TypeError(
        f"{type(model).__name__} has no head to keep hidden states of: no get_output_embeddings() that is nn.Linear. "
        "Models of transformers with a language modelling head do; of others, record logits: teachers.record_sparse."
    )


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, x in tensors.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Asked:
    """A shard of hidden states: ids in, {"states": (ids, L, H)} out."""

    def __init__(
        self, teacher: Live, batches: Recordable, inputs: Callable[[Any], Any], precision: str, head: Head
    ) -> None:
        self.teacher, self.batches, self.inputs, self.precision, self.head = teacher, batches, inputs, precision, head

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        parts = [self._asked(part, first=int(part[0]) == int(ids[0])) for part in ids.split(self.batches.batch_size)]
        return {"states": torch.cat(parts)}

    @torch.no_grad()
    def _asked(self, ids: Tensor, *, first: bool) -> Tensor:
        device = device_of(self.teacher)
        asked, _ = given(self.batches, ids, self.inputs, device)
        with _heard(self.teacher.model) as heard:
            said = self.teacher(asked, ids.to(device))
        if not heard:
            raise TypeError(f"{type(self.teacher.model).__name__} answered without its head: nothing to keep.")
        states, mask = heard[-1], asked.get("attention_mask")
        gone = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        if mask is not None and mask.shape == gone.shape:
            gone = mask == 0  # nobody looks there, and it may be NaN
        states = states.masked_fill(gone[..., None], 0.0)
        if first:
            self._same(states[:1], said.logits[:1], gone[:1])
        kept = narrowed(states.flatten(1), self.precision, int(ids[0]), what="hidden states")
        return kept.view(states.shape).cpu()

    def _same(self, states: Tensor, logits: Tensor, gone: Tensor) -> None:
        """Look that the head makes the teacher's logits."""
        made, want = self.head(states[~gone]), widened(logits[~gone])
        off, scale = float((made - want).abs().max()), float(want.abs().max())
        if not off <= max(1e-4, 8 * torch.finfo(states.dtype).eps) * scale:
            raise ValueError(
                f"the head of {type(self.teacher.model).__name__} does not make its logits from what it reads: off by "
                f"{off:.3g} where they reach {scale:.3g}. Does the model scale, cap or add to them in a way of its "
                "own? Say so: record_hidden(..., head=answers.Head(weight, bias, scale=..., cap=...))."
            )


@contextmanager
def _heard(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the head of the model reads meanwhile."""
    heard: list[Tensor] = []
    hook = _layer_of(model)[1].register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    try:
        yield heard
    finally:
        hook.remove()
