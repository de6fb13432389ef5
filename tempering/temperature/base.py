"""Base classes of temperature policies, which map rows to one temperature per row and side."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32
from tempering.utils.search_space import CheckedArguments


class Temperatures(NamedTuple):
    """Positive temperatures of both sides, (N, 1) or (1, 1) each.

    ``factor`` replaces the product T_s * T_t in ``scale``, for policies that document a different scale.
    """

    student: Float[Tensor, "#N 1"]
    teacher: Float[Tensor, "#N 1"]
    factor: Float[Tensor, "#N 1"] | None = None

    @property
    def scale(self) -> Float[Tensor, " #N"]:
        """The factor of a softened divergence: T_s * T_t, (N,) or (1,); Hinton's T^2 if both are equal."""
        product = self.student * self.teacher if self.factor is None else self.factor
        return product.squeeze(-1)

    def times(self, by: float) -> Temperatures:
        """Multiply both sides by ``by``, and thus the scale by its square."""
        return Temperatures(self.student * by, self.teacher * by, None if self.factor is None else self.factor * by**2)

    def detached(self) -> Temperatures:
        """Return a copy detached from the graph."""
        return Temperatures(*(None if x is None else x.detach() for x in self))  # pyright: ignore[reportArgumentType]


class Policy(CheckedArguments, nn.Module, ABC):
    """Base class of temperature policies: a module that maps rows to temperatures.

    It gets the rows and the progress of the run in [0, 1], never epochs. ``tau`` is the reference temperature around
    which the policy moves; methods with a plain softened term use ``tau`` for it.
    """

    paper: ClassVar[str]  # citation, such as "arXiv:2404.12711"
    relational: bool = False  # whether temperatures depend on the other rows of the block
    tau: float
    shift_invariant: bool = True  # whether adding a constant to one row's logits keeps its temperatures
    by_class: bool = False  # whether it depends on the order and number of classes
    last: Temperatures | None = None  # detached output of the last call, for logging

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        """Return the temperatures of the rows; ``progress`` is the fraction of the run that is done."""

    def __call__(self, rows: Rows, progress: float = 1.0) -> Temperatures:
        temperatures: Temperatures = super().__call__(rows, progress)
        self.last = temperatures.detached()
        return temperatures

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        """Return the temperatures for another reference; default: scaled by tau / self.tau."""
        return self(rows, progress).times(tau / self.tau)

    def reference_at(self, progress: float) -> float:
        """Return the reference temperature at this fraction of the run; only schedules change it."""
        return self.tau

    def setup(self, rows: Rows) -> None:
        """Create parameters that depend on the shape of the rows; called once, before the optimizer is created."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups for parameters with options of their own; the others share one group."""
        return []

    def report(self) -> dict[str, Tensor]:
        """Return counts of the last call to log, {name: ()}, such as rows that fell back."""
        return {}

    def hyperparameters(self) -> dict[str, object]:
        """Return the constructor arguments by name, as written to records."""
        return hyperparameters(self)

    @classmethod
    def example(cls) -> Self:
        """Return an instance for the contract tests; override it if the constructor needs arguments."""
        return cls()


PolicyLike = Policy | float | None  # of an argument ``temperature``: a number is Static, None the method's default


class AdaptivePolicy(Policy):
    """A policy that is updated after every optimizer step."""

    @property
    def needs_reward(self) -> bool:
        """Whether ``update`` needs the rows' rewards of this step, for which the trainer runs the student again."""
        return True

    @abstractmethod
    def update(self, reward: Float[Tensor, " N"] | None) -> None:
        """Update the policy from the rows' rewards: the decrease of the student's loss in eval mode on each row.

        Called after every step; None if rewards are not needed, or if there are no labels to compute them from.
        """

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """Return the training batches, modified if the policy changes them."""
        return batches


def hyperparameters(module: nn.Module) -> dict[str, object]:
    """Return the constructor arguments of a method or policy by name; each is kept as an attribute of that name."""
    out: dict[str, object] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name)
        inner = getattr(value, "hyperparameters", None)
        out[name] = {"name": type(value).__name__, **inner()} if inner is not None else value
    return out


class PolicyWrapper(Policy):
    """A policy that changes the temperatures of another policy with ``transform``.

    Args:
        policy: the policy to wrap; a number raises TypeError.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = check_inner_policy(type(self).__name__, policy)
        self.tau = policy.tau
        self.shift_invariant, self.by_class = policy.shift_invariant, policy.by_class
        self.relational = policy.relational
        self.counts: dict[str, Tensor] = {}

    @abstractmethod
    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        """Return the changed temperatures; may set ``counts``, which ``report`` adds to its own."""

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.transform(self.policy(rows, progress), rows)

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        return self.transform(self.policy.with_reference(tau, rows, progress), rows)

    def reference_at(self, progress: float) -> float:
        return self.policy.reference_at(progress)

    def report(self) -> dict[str, Tensor]:
        """The counts of the wrapped policy and of the last call."""
        return {**self.policy.report(), **self.counts}


def check_inner_policy(owner: str, policy: object) -> Policy:
    """Return ``policy``; raise TypeError if it is not a policy, such as a number."""
    if isinstance(policy, Policy):
        return policy
    raise TypeError(f"{owner} wraps another policy, such as {owner}(Static(4.0), ...); got {policy!r}.")


MASK_AT = -9000.0  # the largest constant that is taken for a mask; half precision's is -65504
MASK_RATIO = 10.0  # how many times wider the gap above the masked logits is than the masked, or the others, lie apart


def mask_constants(z: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Replace logits that are masks in all but name, such as -1e4, -1e9 or finfo.min, by minus infinity.

    One rule for each row: logits of at most ``MASK_AT`` are masks if the gap between them and the others is
    ``MASK_RATIO`` times as wide as either group. The logits of a model, however large, hardly ever form two such
    groups. Rows without a mask keep their bits.
    """
    if not z.shape[-1]:
        return z
    z_detached = z.detach()
    low = (z_detached <= MASK_AT) & ~torch.isneginf(z_detached)
    if z.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(low.any()):
        return z
    bottom = z_detached.masked_fill(low | torch.isneginf(z_detached), torch.inf).amin(-1, keepdim=True)
    top = z_detached.masked_fill(low, -torch.inf).amax(-1, keepdim=True)
    low_top = z_detached.masked_fill(~low, -torch.inf).amax(-1, keepdim=True)
    low_bottom = z_detached.masked_fill(~low, torch.inf).amin(-1, keepdim=True)
    # halves, since the width of two groups at the ends of the type's range is not finite
    gap = 0.5 * bottom - 0.5 * low_top
    width = torch.maximum(0.5 * top - 0.5 * bottom, 0.5 * low_top - 0.5 * low_bottom)
    return z.masked_fill(low & torch.isfinite(gap) & (gap > MASK_RATIO * width), -torch.inf)


def constant(value: float, like: Tensor) -> Float[Tensor, "1 1"]:
    """Return ``value`` as a (1, 1) temperature on the device of ``like``, in at least float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((1, 1), float(value), dtype=dtype, device=like.device)


@torch.no_grad()
def logsumexp_gap(rows: Rows, T: Temperatures) -> Float[Tensor, ""]:
    """Mean |logsumexp(u / T_t) - logsumexp(v / T_s)| of the centered logits, (), which DTKD makes zero.

    Over rows that have weight and unmasked classes; 0 if there are none.
    """

    def sharpness(z: Tensor, temperature: Tensor) -> Tensor:
        z = mask_constants(upcast_to_float32(z))
        valid = ~torch.isneginf(z)
        mean = torch.where(valid, z, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)
        return torch.logsumexp((z - mean) / temperature, -1)

    student, teacher = sharpness(rows.student, T.student), sharpness(rows.teacher, T.teacher)
    counted = ~torch.isneginf(student) & ~torch.isneginf(teacher)
    if rows.weight is not None:
        counted &= rows.weight > 0
    return torch.where(counted, (teacher - student).abs(), 0.0).sum() / counted.sum().clamp_min(1)
