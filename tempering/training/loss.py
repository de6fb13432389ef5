"""From blocks of rows to their losses: the plain way, or by chunks where the rows are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tempering.methods.base import Method, asked
from tempering.rows import Rows, total

MANY = 2**22  # logits of one side from which on chunks save memory and cost no time


class Loss(NamedTuple):
    """A block's loss, (), its terms, {name: (N,)}, and the ``Path`` of ``kernels`` that ran, None for the plain way."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    path: Any = None


def losses_of(
    method: Method,
    blocks: Sequence[Rows],
    progress: float,
    mass: Mapping[str, Tensor | float] | None = None,
    *,
    chunks: bool | None = None,
) -> list[Loss]:
    """The loss of each block: its rows' terms over ``mass``, the weight of the whole step by the block's name.

    Args:
        chunks: True for ``kernels.chunked``, whose gradient is made on the way; False for the plain way; None for
            chunks where there are 2^22 logits and more, and the method allows it.

    Raises:
        ValueError: with chunks=True, for a method or rows that cannot be taken in chunks.
    """
    apart = chunks if chunks is not None else not (method.is_relational() or method.learners())

    def one(rows: Rows, progress: float) -> Loss:
        whole = (mass or {}).get(rows.name)
        if apart and (chunks or (rows.student.numel() >= MANY and rows.hard is None)):
            # here, since it loads torch's compilers
            from tempering.kernels.chunked import chunked

            return Loss(*chunked(method, rows, progress, rows_in_batch=whole))
        terms = method(rows, progress)
        return Loss(total(terms, rows, rows_in_batch=whole), terms)

    return asked(one, blocks, progress)


def path_of(found: Sequence[Loss]) -> dict[str, Any]:
    """What the records say of the path, {"path": ...}; nothing for the plain way."""
    ran = [x.path._asdict() for x in found if x.path is not None]
    return {"path": ran[-1]} if ran else {}
