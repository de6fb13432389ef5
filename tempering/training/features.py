"""Extract features of student and teacher, paired by name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from tempering.teachers.base import Teacher
    from tempering.utils.hooks import FeatureExtractor


def extracting(features: PairedFeatures | None) -> AbstractContextManager[object]:
    """Return the context in which features are extracted; one without effect for None."""
    return nullcontext() if features is None else features


def reset_compiled() -> None:
    """Drop code that torch.compile made for models without hooks, or with others: it would not run these.

    For the start of a run or a pass, not for every step: compiled models and losses are compiled again.
    """
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


class PairedFeatures:
    """Features that both models computed in their last forward passes, by the names that the task gives them.

    A context manager, which holds the hooks on both models.
    """

    def __init__(
        self, student: FeatureExtractor, teacher: FeatureExtractor, names: Mapping[str, tuple[str, str]]
    ) -> None:
        self.student, self.teacher, self.names = student, teacher, names

    @classmethod
    def from_models(
        cls, student: nn.Module, teacher: Teacher | None, names: Mapping[str, tuple[str, str]]
    ) -> PairedFeatures | None:
        """Find the modules of both models; entering the context registers the hooks.

        Args:
            names: name -> (the student's module, the teacher's module).

        Returns:
            None if no features are named.

        Raises:
            ValueError: for a teacher without a live module, which has no features.
        """
        if not names:
            return None
        from tempering.utils.hooks import FeatureExtractor

        if teacher is None or teacher.model is None:
            source = "no teacher" if teacher is None else type(teacher).__name__
            raise ValueError(
                f"the task compares the features {', '.join(names)}, but {source} has features. Give the live model: "
                "teachers.Live(model)."
            )
        reset_compiled()
        sides = [
            FeatureExtractor(m, [pair[i] for pair in names.values()]) for i, m in enumerate((student, teacher.model))
        ]
        return cls(sides[0], sides[1], names)

    def __enter__(self) -> Self:
        self.student.__enter__()
        self.teacher.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.student.__exit__()
        self.teacher.__exit__()

    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name -> (student's, teacher's) features of the last forward passes; the teacher's are detached."""
        return {name: (self.student[s], self.teacher[t].detach()) for name, (s, t) in self.names.items()}
