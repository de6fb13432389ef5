"""What a temperature policy is: rows in, a temperature for each side of each row out."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32


class Temperatures(NamedTuple):
    """A temperature for each side, (N, 1) or (1, 1), positive.

    ``factor`` is for policies that scale their divergence by something else than the product (they say so).
    """

    student: Float[Tensor, "#N 1"]
    teacher: Float[Tensor, "#N 1"]
    factor: Float[Tensor, "#N 1"] | None = None

    @property
    def scale(self) -> Float[Tensor, " #N"]:
        """What a softened divergence is multiplied by: T_s * T_t, (N,) or (1,); Hinton's T^2 where they agree."""
        product = self.student * self.teacher if self.factor is None else self.factor
        return product.squeeze(-1)

    def times(self, by: float) -> Temperatures:
        """Both sides multiplied by ``by``, and so the scale by its square."""
        return Temperatures(self.student * by, self.teacher * by, None if self.factor is None else self.factor * by**2)

    def detached(self) -> Temperatures:
        """The same, cut from the graph."""
        return Temperatures(*(None if x is None else x.detach() for x in self))  # pyright: ignore[reportArgumentType]


class Policy(nn.Module, ABC):
    """A way to set the temperature. It sees rows and the progress of the run in [0, 1], never epochs.

    ``tau`` is the reference temperature a policy moves around; methods that also soften plainly use it.
    """

    paper: ClassVar[str]  # citation, such as "arXiv:2404.12711"
    relational: ClassVar[bool] = False  # whether a row's temperature depends on the other rows of its block
    tau: float
    shift_invariant: bool = True  # whether a constant added to a row's logits leaves its temperatures alone
    by_class: bool = False  # whether it is made for one number of classes, and tells them apart
    last: Temperatures | None = None  # what the last call answered, detached; the engine logs it

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        """The temperatures of these rows."""

    def __call__(self, rows: Rows, progress: float = 1.0) -> Temperatures:
        temperatures: Temperatures = super().__call__(rows, progress)
        self.last = temperatures.detached()
        return temperatures

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        """The temperatures round another reference: multiplied by tau / self.tau, where a policy knows no better."""
        return self(rows, progress).times(tau / self.tau)

    def reference_at(self, progress: float) -> float:
        """The reference temperature at that share of the run; only a schedule moves it."""
        return self.tau

    def setup(self, rows: Rows) -> None:
        """See one block of rows before the optimizer is made, to size what the policy trains."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of parameters that want options of their own; the rest share one group."""
        return []

    def report(self) -> dict[str, Tensor]:
        """Counts the policy wants logged, {name: ()}, of the last call; such as rows that fell back."""
        return {}

    def hyperparameters(self) -> dict[str, object]:
        """Constructor arguments by name, as records write them."""
        return hyperparameters(self)

    @classmethod
    def example(cls) -> Self:
        """One of it, as the contract tests make it; overridden where the constructor needs arguments."""
        return cls()


class AdaptivePolicy(Policy):
    """A policy that is told, after the step, what the step did."""

    @property
    def needs_reward(self) -> bool:
        """Whether it wants the rows' rewards of this step: for those the engine runs the student a second time."""
        return True

    @abstractmethod
    def update(self, reward: Float[Tensor, " N"] | None) -> None:
        """Take the rows' rewards (by how much the student's loss on each fell) and improve.

        Called after every step; None where the rewards are not wanted, or there are no labels to tell them by.
        """

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """The training batches, for a policy that has a say in them."""
        return batches


def hyperparameters(module: nn.Module) -> dict[str, object]:
    """Constructor arguments of a method or a policy by name: each is kept as an attribute of its own name."""
    out: dict[str, object] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name)
        inner = getattr(value, "hyperparameters", None)
        out[name] = {"name": type(value).__name__, **inner()} if inner is not None else value
    return out


class PolicyWrapper(Policy):
    """A policy round another, which has the last word on what that answers: ``transform``.

    Args:
        policy: the other one; a bare number is refused.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = check_inner_policy(type(self).__name__, policy)
        self.tau = policy.tau
        self.shift_invariant, self.by_class = policy.shift_invariant, policy.by_class
        self.relational = policy.relational  # pyright: ignore[reportAttributeAccessIssue]
        self.counts: dict[str, Tensor] = {}

    @abstractmethod
    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        """What becomes of the policy's temperatures; ``counts`` is what ``report`` adds."""

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.transform(self.policy(rows, progress), rows)

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        return self.transform(self.policy.with_reference(tau, rows, progress), rows)

    def reference_at(self, progress: float) -> float:
        return self.policy.reference_at(progress)

    def report(self) -> dict[str, Tensor]:
        """What the policy reports, and the counts of the last call."""
        return {**self.policy.report(), **self.counts}


def check_positive(owner: str, **values: float) -> None:
    """Refuse a temperature-like argument that is not a positive, finite number."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{owner} needs {name} > 0 and finite; got {value!r}. Hinton's usual value is 4.0.")


def check_run_fraction(owner: str, **values: float) -> None:
    """Refuse a share of the run outside [0, 1]; epochs are a common slip."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"{owner} needs {name} in [0, 1], the share of the run (20 of 240 epochs is {name}=20/240); "
                f"got {value!r}."
            )


def check_inner_policy(owner: str, policy: object) -> Policy:
    """``policy`` itself, refused where it is none; a bare number is a common slip."""
    if isinstance(policy, Policy):
        return policy
    raise TypeError(f"{owner} goes round another policy, such as {owner}(Static(4.0), ...); got {policy!r}.")


def constant(value: float, like: Tensor) -> Float[Tensor, "1 1"]:
    """``value`` as a (1, 1) temperature on the device of ``like``, in float32 at least."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((1, 1), float(value), dtype=dtype, device=like.device)


@torch.no_grad()
def logsumexp_gap(rows: Rows, T: Temperatures) -> Float[Tensor, ""]:
    """Mean |logsumexp(u / T_t) - logsumexp(v / T_s)| of the centered logits, (): what DTKD sets out to close.

    Over the rows that have weight and a class left; 0 where there is none.
    """

    def sharpness(z: Tensor, temperature: Tensor) -> Tensor:
        z = upcast_to_float32(z)
        valid = ~torch.isneginf(z)
        mean = torch.where(valid, z, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)
        return torch.logsumexp((z - mean) / temperature, -1)

    student, teacher = sharpness(rows.student, T.student), sharpness(rows.teacher, T.teacher)
    counted = ~torch.isneginf(student) & ~torch.isneginf(teacher)
    if rows.weight is not None:
        counted &= rows.weight > 0
    return torch.where(counted, (teacher - student).abs(), 0.0).sum() / counted.sum().clamp_min(1)
