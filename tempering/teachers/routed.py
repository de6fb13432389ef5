"""Routed teachers: one of several teachers answers each sample, by its domain."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tempering.rows import TEACHER_OUTPUTS
from tempering.teachers.base import Columns, key_digest
from tempering.teachers.combined import CombinedTeacher, Teachers, dense_logits
from tempering.teachers.outputs import Sparse
from tempering.utils.tensors import on_host, tensor_bytes, to_device

Route = Callable[[Any, Tensor | None], Any]  # (inputs, sample ids) -> a teacher's name or number per sample


class Routed(CombinedTeacher):
    """Several teachers, of which one answers each sample, such as one per domain; only that teacher runs on it.

    ``Routed({"math": a, "code": b}, by="domain")`` lets a answer the samples whose "domain" is "math", or 0, the number
    of the teacher in this order. The classes are the same for all; outputs may be dense logits or, of all teachers,
    ``Sparse``. A teacher that answers a whole batch returns what it would alone, to the bit; of a part of a batch its
    outputs may differ by rounding, as those of another batch size do.

    Args:
        teachers: name -> module (wrapped in ``Live``) or teacher; those of a sequence are named "0", "1", ...
        by: what picks the teacher. A text: a column of batches that are mappings, of names or numbers, which neither
            model sees. A tensor (samples,): the number of the teacher, by sample id. A function (inputs, ids) -> names
            or numbers of the batch's samples.

    Raises:
        ValueError: while running, for a sample whose teacher is missing, naming it; for outputs of different shapes or
            kinds, naming the teachers; for batches without the column or ids.
    """

    def __init__(self, teachers: Teachers, *, by: str | Int[Tensor, " samples"] | Route) -> None:
        super().__init__(teachers)
        if isinstance(by, Tensor) and (by.ndim != 1 or by.is_floating_point() or by.dtype == torch.bool):
            raise ValueError(f"Routed needs by=(samples,), integers; got {by.dtype} {tuple(by.shape)}.")
        if not isinstance(by, str | Tensor) and not callable(by):
            raise TypeError(f"Routed needs by= a column's name, a tensor or a function; got {type(by).__name__}.")
        self.by = by.cpu().long() if isinstance(by, Tensor) else by
        if isinstance(self.by, Tensor):
            self._numbers(self.by)
            rule = hashlib.sha256(tensor_bytes(self.by)).hexdigest()
        else:
            rule = self.by if isinstance(self.by, str) else getattr(self.by, "__qualname__", type(self.by).__name__)
        self.identity = key_digest({"routed": {n: part.identity for n, part in self.parts.items()}, "by": rule})

    @property
    def columns(self) -> tuple[str, ...]:
        own = (self.by,) if isinstance(self.by, str) else ()
        return tuple(dict.fromkeys((*own, *super().columns)))

    def routes(self, inputs: Any, ids: Tensor | None) -> Int[Tensor, " B"]:
        """Return the number of each sample's teacher, on the CPU."""
        if isinstance(self.by, Tensor):
            if ids is None:
                raise ValueError(
                    "Routed with by=tensor picks the teacher by sample id, and the batch has none. Yield (x, y, id), "
                    "as data.Batches does, or give by= the name of a column."
                )
            rows = on_host(ids).cpu()
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.by):
                raise ValueError(
                    f"Routed has the teachers of samples 0 to {len(self.by) - 1}, and the batch has ids "
                    f"{int(rows.min())} to {int(rows.max())}."
                )
            return self.by[rows]
        if not isinstance(self.by, str):
            return self._numbers(self.by(inputs, ids))
        source = inputs.columns if isinstance(inputs, Columns) else inputs
        if not isinstance(source, Mapping) or self.by not in source:
            raise ValueError(
                f"Routed picks the teacher by the column {self.by!r}, which the batch does not have. Batches are then "
                f"mappings with {self.by!r}, a name or number of a teacher per sample; in transformers' Trainer the "
                "data collator must keep it."
            )
        return self._numbers(source[self.by])

    def _numbers(self, values: Any) -> Int[Tensor, " B"]:
        """Return names or numbers of teachers as numbers, on the CPU."""
        names = list(self.parts)
        if isinstance(values, Tensor):
            values = on_host(values).cpu()
            known = (values >= 0) & (values < len(names)) if values.ndim == 1 else torch.zeros(1, dtype=torch.bool)
            if bool(known.all()) and not values.is_floating_point():
                return values.long()
            values = values.tolist()
        if isinstance(values, Sequence) and not isinstance(values, str):
            numbers = {**{i: i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
            wrong = next(((i, v) for i, v in enumerate(values) if isinstance(v, list) or v not in numbers), None)
            if wrong is None:
                return torch.tensor([numbers[v] for v in values], dtype=torch.long)
            raise ValueError(
                f"Routed has no teacher {wrong[1]!r}, which sample {wrong[0]} of the batch needs; its teachers are "
                f"{', '.join(f'{name!r} ({i})' for i, name in enumerate(names))}. Add it: teachers={{"
                f"{wrong[1]!r}: ...}}, or leave such samples out."
            )
        raise ValueError(f"Routed needs a teacher's name or number per sample; got {type(values).__name__}.")

    def owners(self, inputs: Any, ids: Tensor | None, output: Any) -> Any:
        numbers = self.routes(inputs, ids)

        def like(x: Tensor) -> Tensor:
            return to_device(numbers, x.device).to(x.dtype).view(-1, *[1] * (x.ndim - 1)).expand_as(x)

        output = dense_logits(output)
        if isinstance(output, Sparse):
            return dataclasses.replace(output, logp=like(output.logp), tail_logp=like(output.tail_logp))
        return like(output)

    def _answer(self, inputs: Any, ids: Tensor | None, *, grad: bool) -> Any:
        route = self.routes(inputs, ids)
        if isinstance(inputs, Mapping) and self.by in inputs:
            inputs = {name: x for name, x in inputs.items() if name != self.by}
        names = list(self.parts)
        _check_length(route, inputs, ids)
        used = route.unique().tolist() or [0]  # of an empty batch
        if len(used) == 1:
            return self._query(names[used[0]], inputs, ids, grad=grad)
        if isinstance(inputs, Mapping):  # logits of a generated batch are of the whole batch
            inputs = {name: x for name, x in inputs.items() if name != TEACHER_OUTPUTS or self.reads_outputs}
        outputs, order = dict[str, Any](), list[Tensor]()
        for number in used:
            index = (route == number).nonzero().flatten()
            chosen = None if ids is None else _select(ids, index, len(route))
            outputs[names[number]] = self._query(names[number], _select(inputs, index, len(route)), chosen, grad=grad)
            order.append(index)
        return self._joined({name: dense_logits(x) for name, x in outputs.items()}, torch.cat(order).argsort())

    def _joined(self, outputs: dict[str, Any], order: Tensor) -> Any:
        """Return the outputs of the teachers, for their samples, as one output in the batch's order."""
        (first, one), *others = outputs.items()
        kind = Sparse if isinstance(one, Sparse) else Tensor
        for name, output in others:
            same = isinstance(output, kind) and isinstance(one, kind)
            if not same or (kind is Tensor and cast(Tensor, output).shape[1:] != cast(Tensor, one).shape[1:]):
                raise ValueError(
                    f"Routed joins logits of one shape; {self._said(first, one)} and {self._said(name, output)}. All "
                    "need the same classes in the same order (of a padded vocabulary too). To mix a remote or top-k "
                    "teacher with live ones, wrap these: teachers.TopKTeacher(teacher, top=...)."
                )
        if not isinstance(one, Sparse):
            return torch.cat(list(outputs.values())).index_select(0, to_device(order, one.device))
        width = max(sparse.ids.shape[-1] for sparse in outputs.values())
        padded: list[Sparse] = [_padded(sparse, width) for sparse in outputs.values()]
        stored = [torch.ones_like(s.tail_logp, dtype=torch.bool) if s.stored is None else s.stored for s in padded]
        index = to_device(order, one.logp.device)
        fields = (
            torch.cat([getattr(s, f) for s in padded]).index_select(0, index) for f in ("ids", "logp", "tail_logp")
        )
        whole = all(sparse.stored is None for sparse in padded)
        return Sparse(*fields, stored=None if whole else torch.cat(stored).index_select(0, index))


def _padded(sparse: Sparse, width: int) -> Sparse:
    """Return the outputs with K = width, the last slots empty."""
    more = (0, width - sparse.ids.shape[-1])
    pad = torch.nn.functional.pad
    return dataclasses.replace(sparse, ids=pad(sparse.ids, more), logp=pad(sparse.logp, more, value=-torch.inf))


def _check_length(route: Tensor, inputs: Any, ids: Tensor | None) -> None:
    """Check that there is a teacher per sample, so far as the number of samples is known.

    Raises:
        ValueError: for another number.
    """
    given = inputs.inputs if isinstance(inputs, Columns) else inputs
    sizes = [len(x) for x in tree_leaves(given if ids is None else ids) if isinstance(x, Tensor) and x.ndim]
    if sizes and len(route) not in sizes:
        raise ValueError(
            f"Routed needs a teacher per sample; by= gives {len(route)} for a batch of {sizes[0]} samples. Cut the "
            "column as the batch is cut; a function returns one name or number per sample."
        )


def _select(value: Any, index: Tensor, size: int) -> Any:
    """Return some samples of inputs: of every tensor and list in them, which have ``size`` of them.

    Raises:
        ValueError: for a tensor of another length, whose samples are not known.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) != size:
            raise ValueError(
                f"Routed splits a batch of {size} samples among teachers, and one of the inputs is "
                f"{tuple(value.shape)}: its first dimension must be the samples. Make batches of one domain each."
            )
        return value.index_select(0, to_device(index, value.device)) if value.ndim else value
    if isinstance(value, Mapping):
        return {name: _select(x, index, size) for name, x in value.items()}
    if isinstance(value, list) and len(value) == size:
        return [value[i] for i in index.tolist()]
    if isinstance(value, tuple):
        parts = [_select(x, index, size) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
