"""What a task is: how a batch becomes inputs, how outputs become rows, and how a student is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tempering.rows import Rows


class Task(ABC):
    """A kind of problem. The engine knows nothing of images or tokens; it asks its task.

    ``features`` names features for methods that look inside: name -> (student's module, teacher's module). The engine
    taps them and adds them to the last block of rows. ``comparable`` says whether a class is the same one on both
    sides.
    """

    features: Mapping[str, tuple[str, str]] = {}
    comparable: bool = True
    remember: bool = True  # whether the teacher's answers on the scored splits are small enough to be kept

    def prepare_model(self, model: nn.Module) -> None:
        """See each model of a run before it is asked, to let it take what ``inputs`` gives."""
        return

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        """The student's inputs, the teacher's (the two views may differ), and sample ids (N,) where there are some."""

    @abstractmethod
    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        """The blocks of rows that two outputs make; a teacher of None means that no teacher takes part."""

    @abstractmethod
    def row_weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Block name -> the weight of its rows in this batch, known before the forward.

        With it a loss divides by the weight of the whole optimizer step, so micro-batches and ranks add up.
        """

    @abstractmethod
    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: Callable[[Any, Tensor | None], Any] | None = None
    ) -> dict[str, float]:
        """How good the student is on these batches: metric -> value."""

    def headline(self) -> tuple[str, bool]:
        """The metric by which the best epoch is chosen, and whether higher is better."""
        return "accuracy", True

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: Callable[[Any, Tensor | None], Any] | None = None,
        temperatures: Callable[[Rows], Any] | None = None,
    ) -> dict[str, Any]:
        """What the report shows beyond scores, JSON-able; {} where a task has nothing to say.

        "scores" in it join the last epoch's of this split: metrics of the finished student that are too dear for more.
        """
        return {}
