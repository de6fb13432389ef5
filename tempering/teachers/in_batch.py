"""Outputs of a teacher that are a column of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tempering.rows import TEACHER_OUTPUTS, upcast_to_float32
from tempering.teachers.base import Teacher, key_digest
from tempering.utils.tensors import map_tensors


class InBatch(Teacher):
    """Read the teacher's outputs from the batch, a mapping, where they are "teacher_outputs".

    They are what the teacher's model would return for the batch: logits (N, C), or (B, L, V) of texts, position i being
    of token i + 1 in causal models, padded as the texts are. The data must not be augmented or cut after they were
    computed. Splits that are scored need them too.

    Args:
        name: of the teacher, in the identity of a run; what the column holds is compared with the data.
    """

    reads_outputs = True

    def __init__(self, name: str = "in the batch") -> None:
        self.name = name
        self.identity = key_digest({"teacher": name})

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        outputs = inputs.get(TEACHER_OUTPUTS) if isinstance(inputs, Mapping) else None
        if outputs is None:
            raise ValueError(
                'InBatch needs batches that are mappings with "teacher_outputs", also those of scored splits; this one '
                'has none. Rename the column: dataset.rename_column("teacher_logits", "teacher_outputs"), or return '
                '{"inputs": x, "labels": y, "teacher_outputs": logits} from the data set.'
            )
        return map_tensors(outputs, lambda x: upcast_to_float32(x.detach()))
