"""torchdistill: losses on logits and features of its mid-level losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers import Library
from tempering.conformance import Promises
from tempering.conformance.definitions import kl

LIBRARY = Library("torchdistill", "1.1.5", absent=("torchvision",))
WHERE = {"student_module_path": "s", "student_module_io": "output"}
WHERE |= {"teacher_module_path": "t", "teacher_module_io": "output"}


def losses() -> Any:
    from torchdistill.losses import mid_level

    return mid_level


def sides(student: Any, teacher: Any) -> Any:
    return {"s": {"output": student}}, {"t": {"output": teacher}}


def on_logits(name: str, promises: Promises, documented: str, unsaid: tuple[str, ...] = (), **arguments: Any) -> None:
    shown = ", ".join(f"{k}={v}" for k, v in arguments.items())

    @LIBRARY.loss(
        f"losses.mid_level.{name}" + (f", {shown}" if shown else ""),
        kind="logits",
        promises=promises,
        documented=documented,
        unsaid=unsaid,
    )
    def make() -> Any:
        def loss(student: Any, teacher: Any, temperature: float = 1.0) -> Any:
            targets = torch.zeros(len(student), dtype=torch.long)
            key = "tau" if name.startswith("DIST") else "temperature"
            made = getattr(losses(), name)(**WHERE, **arguments, **{key: temperature})
            return made(*sides(student, teacher), targets)

        return loss


def standardized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    def z(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

    return kl(z(student), z(teacher), temperature)


FORMULA = "alpha CE + (1 - alpha) tau^2 KL"
on_logits(
    "KDLoss",
    Promises(definition="kl", temperature_squared=True, reduction="mean"),
    f"{FORMULA}, here with alpha 0.",
    alpha=0.0,
)
on_logits(
    "LogitStdKDLoss",
    Promises(definition=standardized, identifies_teacher=False, reduction="mean"),
    "Knowledge distillation with standardized logits.",
    alpha=0.0,
)
on_logits(
    "DISTLoss",
    Promises(batch_dependent=True, identifies_teacher=False, divergence=True),
    "Pearson distances of the probabilities over classes and over the batch, of the paper of DIST; a "
    "correlation with something constant is undefined, and nearly so at the largest temperatures.",
    ("slope", "zero at agreement", "stationary at agreement"),
)


def on_features(
    name: str, documented: str, shape: tuple[int, ...] = (4,), promises: Any = None, **arguments: Any
) -> None:
    @LIBRARY.loss(
        f"losses.mid_level.{name}",
        kind="features",
        promises=Promises(feature_shape=shape, batch_dependent=True, identifies_teacher=False, **(promises or {})),
        documented=documented,
    )
    def make() -> Any:
        made = getattr(losses(), name)(**arguments)
        return lambda student, teacher: made(*sides(student, teacher))


on_features("PKTLoss", "Divergence of the conditional probabilities of cosine similarities in a batch.", **WHERE)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    grams = [torch.nn.functional.normalize(x @ x.T, dim=1) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().mean()


on_features(
    "SPKDLoss",
    "Similarity-preserving distillation, citing its paper: mean squared difference of L2-normalized similarities.",
    promises={"definition": similarity_preserving},
    student_output_path="s",
    teacher_output_path="t",
    reduction="batchmean",
)
PAIR = {"pair": {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}, "weight": 1}}
on_features("ATLoss", "Distance of normalized maps of mean squared activations.", (3, 2, 2), at_pairs=PAIR, mode="code")
on_features(
    "RKDLoss",
    "Distances and angles between the samples of a batch.",
    student_output_path="s",
    teacher_output_path="t",
    dist_factor=1.0,
    angle_factor=1.0,
    reduction="mean",
)
