"""Compute losses in chunks of rows, for blocks with many logits."""

from __future__ import annotations

from torch import Tensor

from tempering.methods.base import BlockLoss, Chunking, Method
from tempering.rows import Rows

MIN_LOGITS = 2**22  # of the student, from which on chunks save memory and cost no time


def chunking_for(method: Method, chunks: bool | None = None) -> Chunking | None:
    """Select how to compute the method's losses in chunks; None: not in chunks.

    Args:
        chunks: True for ``kernels.chunked`` always, which raises a ValueError for a method or rows that it cannot
            compute; False for never; None for blocks of 2^22 logits or more, if every row's terms depend on that row
            alone and no policy adapts after the step.
    """
    if chunks is None:
        independent = not (method.owns_step or method.is_batch_dependent() or method.adaptive_policies())
        return Chunking(chunked_loss, MIN_LOGITS) if independent else None
    return Chunking(chunked_loss, 0, always=True) if chunks else None


def chunked_loss(method: Method, rows: Rows, progress: float, normalizer: Tensor | float | None) -> BlockLoss:
    """Compute the loss of a block in chunks, with its gradient, in the memory of a few rows."""
    # imported here because it loads torch's compilers
    from tempering.kernels.chunked import chunked

    loss, terms, path = chunked(method, rows, progress, normalizer=normalizer)
    return BlockLoss(rows, loss, terms, path)
