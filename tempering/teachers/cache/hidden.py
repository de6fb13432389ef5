"""A teacher's last hidden states on disk: H numbers a token in place of V logits, and its head beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tempering.rows import upcast_to_float32
from tempering.teachers.base import Teacher
from tempering.teachers.cache.recorder import STORED, Recordable, device_of, to_stored_precision
from tempering.teachers.cache.shards import (
    CachedShards,
    Inputs,
    record_shards,
    recording_key,
    text_batches,
    texts_per_shard,
)
from tempering.teachers.live import Live
from tempering.teachers.outputs import Head, Hidden
from tempering.utils.tensors import tensor_bytes

HEAD = "head.safetensors"


class CachedHidden(CachedShards):
    """Looks the last hidden states up by sample id: ``Hidden`` (B, L, H), whose head makes logits of the rows alone.

    A run by ``distill`` makes the logits of its rows, (N, V); ``kernels.linear_loss`` on ``answer.rows(place, shape)``
    and ``answer.head`` never holds them. Files are mapped, and many processes may read them.

    Args:
        path: the folder that ``record_hidden`` wrote.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB.

    Raises:
        FileNotFoundError, CorruptCacheError, ValueError: as ``CachedTeacher`` does.
    """

    kind = "hidden states"
    recorded_by = "teachers.record_hidden(teacher, batches, path, inputs=...)"

    def __init__(
        self, path: str | Path, *, batches: Any = None, teacher: Teacher | None = None, checksum: bool | None = None
    ) -> None:
        super().__init__(path, batches=batches, teacher=teacher, checksum=checksum)
        held = self.file(HEAD)
        about, names = held.metadata(), set(held.keys())
        bias = held.get_tensor("bias") if "bias" in names else None
        cap = None if about["cap"] == "None" else float(about["cap"])
        self.head = Head(held.get_tensor("weight"), bias, scale=float(about["scale"]), cap=cap)

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Hidden:
        found = [file.get_slice("states")[row : row + 1] for file, row in self.find(ids)]
        states = torch.cat(found) if found else torch.zeros(0, self.length, self.head.weight.shape[1])
        device = ids.device if ids is not None else states.device
        if self.head.weight.device != device:
            self.head = self.head.to(device)
        return Hidden(states.to(device, non_blocking=True), self.head)

    def to(self, device: torch.device | str) -> Self:
        self.head = self.head.to(device)
        return self


def record_hidden(
    teacher: Live,
    batches: Recordable,
    path: str | Path,
    *,
    inputs: Inputs,
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
        inputs: how a batch becomes the models' inputs: ``LanguageModeling().inputs``. The model must take them:
            ``.prepare_model``.
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
    tensors = {n: x.detach() for n, x in (("weight", head.weight), ("bias", head.bias)) if x is not None}
    about = {"scale": repr(float(head.scale)), "cap": repr(None if head.cap is None else float(head.cap))}
    key = recording_key(CachedHidden.kind, batches, teacher, precision=precision, head=_digest(tensors, about))
    size = texts_per_shard(key["length"] * head.weight.shape[1] * STORED[precision][1].itemsize)

    def query(ids: Tensor) -> dict[str, Tensor]:
        parts: list[Tensor] = []
        for part, given, _ in text_batches(teacher, batches, ids, inputs):
            parts.append(_states(teacher, given, part, precision, head if not parts else None))
        return {"states": torch.cat(parts)}

    record_shards(path, key, query, teacher, size=size, more={HEAD: (tensors, about)}, quiet=quiet)
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
        "Models of transformers with a language modeling head do; of others, record logits: teachers.record_top_k."
    )


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, x in tensors.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


@torch.no_grad()
def _states(teacher: Live, inputs: Any, ids: Tensor, precision: str, head: Head | None) -> Tensor:
    """Return a batch's hidden states as they are stored; check that ``head`` makes the teacher's logits of them."""
    with _head_inputs(teacher.model) as seen:
        output = teacher(inputs, ids.to(device_of(teacher)))
    if not seen:
        raise TypeError(f"{type(teacher.model).__name__} answered without its head: nothing to keep.")
    states, mask = seen[-1], inputs.get("attention_mask")
    gone = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask is not None and mask.shape == gone.shape:
        gone = mask == 0  # nothing attends to padding, and it may be NaN
    states = states.masked_fill(gone[..., None], 0.0)
    if head is not None:
        _check_head(head, teacher, states[:1], output.logits[:1], gone[:1])
    kept = to_stored_precision(states.flatten(1), precision, int(ids[0]), what="hidden states")
    return kept.view(states.shape).cpu()


def _check_head(head: Head, teacher: Live, states: Tensor, logits: Tensor, gone: Tensor) -> None:
    made, want = head(states[~gone]), upcast_to_float32(logits[~gone])
    off, scale = float((made - want).abs().max()), float(want.abs().max())
    if not off <= max(1e-4, 8 * torch.finfo(states.dtype).eps) * scale:
        raise ValueError(
            f"the head of {type(teacher.model).__name__} does not make its logits from what it reads: off by "
            f"{off:.3g} where they reach {scale:.3g}. Does the model scale, cap or add to them in a way of its "
            "own? Say so: record_hidden(..., head=teachers.outputs.Head(weight, bias, scale=..., cap=...))."
        )


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the head of the model is called with."""
    seen: list[Tensor] = []
    hook = _layer_of(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()
