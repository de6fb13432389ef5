"""What our losses promise to tempering.conformance: methods, kernels, teachers' lists, the Hugging Face adapter.

A method promises all that its kind has, but for what its row of ``METHOD_PROMISES`` takes back, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tempering.conformance import Promises
from tempering.conformance.adapters import of_hidden_states, of_method, of_models
from tempering.conformance.promises import Kind
from tempering.integrations.huggingface import DistillMixin, Labeled
from tempering.kernels import chunked, linear_loss
from tempering.kernels.chunked import COPIES
from tempering.methods import DTKD, KD, METHODS, Divergence, Method, StepMethod
from tempering.methods.features.base import FeatureMethod
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.teachers.outputs import Sparse, to_top_k_plus_tail
from tempering.teachers.selection import count_samples
from tests.contract import block, copied

# it has no teacher; its rows are numbers; it matches queries, not maps
OTHERS = ("Supervised", "RegressionKD", "QueryKD")
Loss = tuple[Callable[..., Any], Kind, Promises]

ROWS = Promises(reduction="mean", ignored_rows=True, low_precision=True, masked_classes=True, shift_invariant=True)
# not the gradient of the value: temperatures and weights are constants (docs/decisions/004-detached-temperatures.md)
DETACHED = {"detached_scale": True}
# 0 for other students than the teacher's: correlations, ranks, differences of rows
NOT_UNIQUE = {"identifies_teacher": False}
METHOD_PROMISES: dict[str, dict[str, Any]] = {
    "Divergence": {"definition": "jsd"},
    # of rows that were not sampled
    "PolicyGradient": {"definition": "reverse_kl"},
    "CKD": {"shift_invariant": False} | NOT_UNIQUE,
    # its normalizer is a constant, and the negatives of an image are those of its place in the batch
    "CRD": {"row_order": False} | DETACHED,
    "CSKD": DETACHED,
    "DIST": NOT_UNIQUE,
    "DTKD": DETACHED,
    "LSKD": NOT_UNIQUE,
    # the first classes are those that both vocabularies have, and the others are compared by rank
    "HybridULD": {"class_order": False} | NOT_UNIQUE,
    "ULD": NOT_UNIQUE,
    # equal predictions are ranked by their index, as in its source
    "USKD": {"class_order": False},
    # the boxes of an image, and the random mask of a map, are those of its place in the batch
    "FGD": {"row_order": False},
    "MGD": {"row_order": False},
}


def of_features(method: FeatureMethod) -> Callable[[Tensor, Tensor], Tensor]:
    """A method of feature maps (N, 4, 3, 3) or of their means (N, 4), without its term on labels."""

    vectors = method.wants == "vectors"

    def adapted(student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        sides = student, teacher.detach()
        rows = block(max(n, 1), 3, dtype=student.dtype).select(slice(0, n))
        compared = {"pool": (sides[0].mean((2, 3)), sides[1].mean((2, 3)))} if vectors else {"map": sides}
        beside = {name: pair for name, pair in rows.features.items() if name != "map"}
        rows = rows.replace(features=compared | beside)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = copied(method)
            made.setup(rows)
            terms = made.to(student.dtype)(rows)
        return total({name: term for name, term in terms.items() if name != "hard"}, rows)

    return adapted


def methods() -> dict[str, Loss]:
    """Every method of rows of logits or of feature maps."""
    found: dict[str, Loss] = {}
    for name, kind in METHODS.items():
        if issubclass(kind, StepMethod) or name in OTHERS:  # the first run the models
            continue
        method = kind.example()
        own: dict[str, Any] = {"batch_dependent": method.is_batch_dependent(), "divergence": method.zero_when_equal}
        own |= METHOD_PROMISES.get(name, {})
        if isinstance(method, FeatureMethod):
            found[name] = of_features(method), "features", Promises(feature_shape=(4, 3, 3), **own)
        else:
            found[name] = of_method(method), "logits", replace(ROWS, **own)
    return found


def skew_kl(student: Tensor, teacher: Tensor, temperature: float, *, reverse: bool = False) -> Tensor:
    """KL of one side and 0.1 times it plus 0.9 times the other, (N,); 2402.03898."""
    q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))
    p, q = (q, p) if reverse else (p, q)
    return (p * (p.log() - (0.1 * p + 0.9 * q).log())).sum(-1)


DEFINED: dict[str, tuple[Method, Any]] = {
    "KD": (KD(soft=1.0, hard=0.0, temperature=4.0), "kl"),
    "KD, T = 0.5": (KD(soft=1.0, hard=0.0, temperature=0.5), "kl"),
    "kl": (Divergence(objective="kl", temperature=2.0), "kl"),
    "reverse_kl": (Divergence(objective="reverse_kl", temperature=2.0), "reverse_kl"),
    "jsd": (Divergence(objective="jsd", temperature=2.0), "jsd"),
    "jsd(0.1)": (Divergence(objective="jsd", beta=0.1), "jsd(0.1)"),
    "skew_kl": (Divergence(objective="skew_kl"), skew_kl),
    "skew_reverse_kl": (Divergence(objective="skew_reverse_kl"), partial(skew_kl, reverse=True)),
    "tvd": (Divergence(objective="tvd", temperature=2.0), "total_variation"),
}


def defined() -> dict[str, Loss]:
    """Methods with a definition, at several temperatures: plainly, in chunks, and from hidden states."""
    found: dict[str, Loss] = {}
    for name, (method, definition) in DEFINED.items():
        tau = method.temperature.tau  # pyright: ignore
        promises = Promises(
            **(vars(ROWS) | {"definition": definition, "temperature": tau, "temperature_squared": True})
        )
        found[name] = of_method(method), "logits", promises
    kl = Promises(**(vars(ROWS) | {"definition": "kl", "temperature": 4.0, "temperature_squared": True}))
    method = DEFINED["KD"][0]
    found["KD in chunks"] = partial(in_chunks, method), "logits", kl
    found["DTKD in chunks"] = partial(in_chunks, DTKD(hard=0.0)), "logits", replace(ROWS, detached_scale=True)
    # the hidden states are products of the logits with a head: minus infinity and bfloat16 do not survive them
    rounded = replace(kl, masked_classes=None, low_precision=None)
    found["KD from hidden states"] = of_hidden_states(partial(fused, method)), "logits", rounded
    return found


def in_chunks(
    method: Method,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    chunk_size: int = 2,
    normalizer: float | None = None,
) -> Tensor:
    """kernels.chunked, with this number of rows in a chunk."""
    rows = Rows(student, teacher.detach(), labels, weight=(labels != IGNORE_INDEX).float())
    memory = COPIES * chunk_size * student.shape[1] * 4
    return chunked(method, rows, normalizer=normalizer, memory=memory, compile=False).loss


def fused(
    method: Method, hidden: Tensor, head: Tensor, hidden_t: Tensor, head_t: Tensor, labels: Tensor, chunk_size: int = 2
) -> Tensor:
    """kernels.linear_loss."""
    memory = 2 * chunk_size * head.shape[0] * 4
    sides = hidden, head, hidden_t.detach(), head_t
    weight = (labels != IGNORE_INDEX).float()
    return linear_loss(method, *sides, target=labels, weight=weight, memory=memory, compile=False).loss


def of_list(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """KL to a cached list of the teacher's tokens and its tail, which may be empty."""
    rest = -torch.expm1(values.double().logsumexp(-1).clamp(max=0.0))
    tail = torch.where(rest > 1e-5, rest, 0.0).log().to(values.dtype)
    s, t, _ = to_top_k_plus_tail(student, Sparse(indices, values, tail))
    rows = Rows(s, t.detach())
    return total(KD(soft=1.0, hard=0.0, temperature=1.0)(rows), rows)


def of_samples(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """KL to tokens that were drawn from the teacher, each with its relative frequency."""
    s, t, _ = to_top_k_plus_tail(student, count_samples(indices, dtype=values.dtype))
    rows = Rows(s, t.detach())
    return total(KD(soft=1.0, hard=0.0, temperature=1.0)(rows), rows)


def lists() -> dict[str, Loss]:
    """Losses of the outputs of cached teachers."""
    kl = Promises(definition="kl", reduction="mean")
    return {
        "top-k and tail": (of_list, "top_k", replace(kl, tail="bucket")),
        "samples": (of_samples, "top_k", replace(kl, sampled=True)),
    }


class Trainer:
    """As much of transformers' Trainer as ``DistillMixin.compute_loss`` needs."""

    accelerator = SimpleNamespace(num_processes=1, reduce=lambda value, reduction: value)
    state = SimpleNamespace(max_steps=0, global_step=0)
    args = SimpleNamespace(device="cpu", gradient_accumulation_steps=1, label_smoothing_factor=0.0)
    label_names: tuple[str, ...] = ()
    compute_loss_func = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model


class KDTrainer(DistillMixin, Trainer):  # pyright: ignore
    pass


def adapters() -> dict[str, Loss]:
    """The Hugging Face trainer's loss, of classifiers' rows and of language models' tokens."""

    def compute(student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor]) -> Any:
        method = DEFINED["KD"][0]
        trainer = KDTrainer(student, teacher=teacher, method=method, task=Labeled(shift=True), selfcheck=False)
        return trainer.compute_loss(student, inputs)

    kl = replace(ROWS, definition="kl", temperature=4.0, temperature_squared=True, shift=1)
    return {"Hugging Face": (of_models(compute), "tokens", kl)}


LOSSES = methods() | defined() | lists() | adapters()
