"""Cache of a teacher's last hidden states and its head: H numbers per token in place of V logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from tempering.rows import upcast_to_float32
from tempering.teachers.cache.base import CorruptCacheError
from tempering.teachers.cache.recorder import STORED, Recordable, device_of, recording_path, to_stored_precision
from tempering.teachers.cache.shard_recorder import Tensors, record_shards, recording_key
from tempering.teachers.cache.text_lookup import CachedShards, device_like
from tempering.teachers.cache.texts import Inputs
from tempering.teachers.live import Live
from tempering.teachers.outputs import Head, Hidden
from tempering.utils.tensors import tensor_bytes, to_device

HEAD = "head.safetensors"


class CachedHidden(CachedShards):
    """Looks up the last hidden states by sample id: ``Hidden`` (B, L, H), whose head computes logits of the rows alone.

    ``distill`` computes the logits of the batch's rows, (N, V); ``kernels.linear_loss`` on
    ``output.rows(positions, shape)`` and ``output.head`` never stores them. Files are memory-mapped, and many processes
    may read them.

    Arguments and errors are those of ``CachedTeacher``; ``record_hidden`` writes the folder.
    """

    kind = "hidden states"
    recorded_by = "teachers.record_hidden(teacher, batches, path, inputs=...)"

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(path, **options)
        try:
            file = self.file(HEAD)
            metadata, names = file.metadata(), set(file.keys())
            bias = file.get_tensor("bias") if "bias" in names else None
            cap = None if metadata["cap"] == "None" else float(metadata["cap"])
            self.head = Head(file.get_tensor("weight"), bias, scale=float(metadata["scale"]), cap=cap)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CorruptCacheError(
                f"{self.path / HEAD} cannot be read ({type(error).__name__}: {error}). Remove the folder and record it "
                f"again: {self.recorded_by}."
            ) from error

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Hidden:
        found, device = self.find(inputs, ids), device_like(inputs, ids)
        parts = [file.get_slice("states")[part] for file, _, part in found.parts]
        values = torch.cat(parts) if parts else torch.zeros(0, self.head.weight.shape[1])
        if self.head.weight.device != device:
            self.head = self.head.to(device)
        states, stored = to_device((found.scatter(values), found.stored), device)
        return Hidden(states, self.head, stored)

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
    """Run the teacher once on every text, store the inputs of its head, and open the result.

    A learned token takes 2 H bytes, or 4 H in fp32, which reproduces the teacher's logits except for the order of
    sums; a text takes 16 more, and 8 for every stretch of learned tokens. Every batch checks that the stored head
    reproduces them. Tokens that are not learned take nothing, and texts that ``path`` has already are not computed
    again: see ``record_top_k``. An interrupted recording is resumed; if several processes call this, one records.

    Args:
        teacher: a live language model of transformers.
        batches: texts, ``data.Tokens`` or ``data.Pairs``.
        path: the folder to write.
        inputs: maps a batch to the models' inputs: ``LanguageModeling().inputs``. The model must accept them: see
            ``LanguageModeling.prepare_model``.
        precision: "bf16", "fp16" or "fp32" of the stored hidden states.
        head: the head, if ``head_of(model)`` does not find it, or not its scale and cap.
        quiet: whether to hide the progress bar.

    Raises:
        ValueError: if ``path`` contains another recording, naming the difference; for a head that does not reproduce
            the teacher's logits, or states that are NaN or beyond the precision's range.
        TypeError: for a model without a head.
    """
    if precision not in STORED:
        raise ValueError(f"record_hidden needs precision {', '.join(map(repr, STORED))}; got {precision!r}.")
    if not isinstance(teacher, Live):
        raise TypeError(
            f"record_hidden needs a live teacher; got {type(teacher).__name__}. Wrap a model: teachers.Live(model)."
        )
    path, head = recording_path(path), head or head_of(teacher.model)
    tensors = {n: x.detach() for n, x in (("weight", head.weight), ("bias", head.bias)) if x is not None}
    metadata = {"scale": repr(float(head.scale)), "cap": repr(None if head.cap is None else float(head.cap))}
    own = {"precision": precision, "head": _digest(tensors, metadata)}
    key = recording_key(CachedHidden.kind, batches, teacher, inputs, **own)

    def query(given: Any, ids: Tensor, mask: Tensor) -> Tensors:
        return {"states": _states(teacher, given, ids, mask, precision, head)}

    size, more = head.weight.shape[1] * STORED[precision][1].itemsize, {HEAD: (tensors, metadata)}
    record_shards(path, key, teacher, batches, inputs, query, bytes_per_position=size, more=more, quiet=quiet)
    return CachedHidden(path, batches=batches, teacher=teacher)


def head_of(model: nn.Module) -> Head:
    """Return the output embeddings of a transformers model, with the scale and the soft cap of its config.

    The tensors are the model's own parameters, so ``kernels.linear_loss`` trains those of a student.

    Raises:
        TypeError: for a model without output embeddings.
    """
    core, layer = _layer_of(model)
    config: Any = getattr(core, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, divisor, cap = (_number(config, n) for n in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
    bias, extra = layer.bias, getattr(core, "final_logits_bias", None)
    if isinstance(extra, Tensor):
        bias = extra.flatten() if bias is None else bias + extra.flatten()
    return Head(layer.weight, bias, scale=(scale or 1.0) / (divisor or 1.0), cap=cap)


def _layer_of(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    for core in model.modules():
        layer = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None  # pyright: ignore
        if isinstance(layer, nn.Linear):
            return core, layer
    raise TypeError(
        f"{type(model).__name__} has no head: its get_output_embeddings() returns no nn.Linear. transformers models "
        "with a language modeling head have one; for others record logits: teachers.record_top_k."
    )


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, x in tensors.items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


@torch.no_grad()
def _states(teacher: Live, inputs: Any, ids: Tensor, mask: Tensor, precision: str, head: Head) -> Tensor:
    """Return the hidden states at the positions of a mask, as they are stored; check the head."""
    with _head_inputs(teacher.model) as captured:
        output = teacher(inputs, ids.to(device_of(teacher)))
    if not captured:
        raise TypeError(
            f"the forward pass of {type(teacher.model).__name__} does not call its head: nothing to record."
        )
    mask = mask.to(captured[-1].device)
    states, text = captured[-1][mask], mask.nonzero()[:, 0].cpu()
    if len(states):
        one = text == text[0]  # a text is enough
        _check_head(head, teacher, states[one], output.logits[mask][one])
    stored = to_stored_precision(states, precision, 0, what="hidden states")
    return stored.cpu()


def _check_head(head: Head, teacher: Live, states: Tensor, logits: Tensor) -> None:
    got, expected = head(states), upcast_to_float32(logits)
    difference = (got - expected).abs().masked_fill(got == expected, 0.0)  # both are -inf for a forbidden token
    error, scale = float(difference.max()), float(expected.masked_fill(torch.isinf(expected), 0.0).abs().max())
    if not error <= max(1e-4, 8 * torch.finfo(states.dtype).eps) * scale:
        raise ValueError(
            f"the head of {type(teacher.model).__name__} does not reproduce its logits from the hidden states: the "
            f"largest difference is {error:.3g}, the largest logit {scale:.3g}. If the model scales, caps or shifts "
            "its logits, give record_hidden(..., head=teachers.outputs.Head(weight, bias, scale=..., cap=...))."
        )


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of the model's head."""
    captured: list[Tensor] = []
    hook = _layer_of(model)[1].register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        hook.remove()
