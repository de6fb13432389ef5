"""A small proximal policy optimization (PPO): actor with a squashed Gaussian, critic and reward redistribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Form = Literal["ppo", "bandit", "published"]
KEPT = 64  # newest paths that the return predictor is trained on
FLOOR = 1e-3  # minimum of the squashed action in [0, 1], so that no temperature is 0
STEP = -7046029254386353131  # increment of splitmix64, 0x9E3779B97F4A7C15 as a signed integer


class Path(NamedTuple):
    """One trajectory with one step per row: states (n, 3), actions before squashing (n,), log-densities (n,)."""

    state: Float[Tensor, "n 3"]
    x: Float[Tensor, " n"]
    log_density: Float[Tensor, " n"]


class Agent(nn.Module):
    """Actor, critic and reward redistribution, updated from one path at a time; all state is in parameters and buffers.

    - "ppo": a path has one reward, at its end. A return predictor redistributes it over the rows; then PPO with the
      clipped ratio and generalized advantages. The path ends there, so nothing is bootstrapped.
    - "bandit": each row has its own reward, and no row leads to another: the advantage is the reward minus the critic.
    - "published": as "ppo", with the formulas of the released code (see ``Instance``).
    """

    kept: Tensor

    def __init__(
        self,
        form: Form,
        *,
        low: float,
        high: float,
        clip: float,
        rounds: int,
        gamma: float,
        trace: float,
        actor_lr: float,
        critic_lr: float,
    ) -> None:
        super().__init__()
        self.form: Form = form
        self.low, self.high, self.clip, self.rounds, self.gamma, self.trace = low, high, clip, rounds, gamma, trace
        self.actor = Learned(Actor(), lr=actor_lr, max_norm=2.0)
        self.critic = Learned(Layers(3, 256, 256, 1), lr=critic_lr, max_norm=2.0)
        plain = form == "published"  # the released predictor has no activation function
        self.predictor = None if form == "bandit" else Learned(Layers(4, 16, 1, linear=plain), lr=1e-3)
        self.detector = Learned(Layers(3, 16, 1, linear=True), lr=1e-3) if plain else None
        # rows of the last paths, for the predictor: path number, path reward, state, action in [0, 1]
        self.register_buffer("kept", torch.zeros(0, 6))

    def acted(self, state: Float[Tensor, "N 3"], noise: Float[Tensor, " N"] | None) -> tuple[Tensor, Tensor]:
        """Return actions before squashing and their log-densities, (N,) each; without noise the mean action."""
        mu, log_std = self.actor(state)
        x = mu if noise is None else mu + log_std.exp() * noise
        return x, self._log_density(x, mu, log_std)

    def improve(self, path: Path, reward: Float[Tensor, ""] | Float[Tensor, " n"]) -> None:
        """Update from one path: its reward at the end, (), or for "bandit" the reward of each row, (n,)."""
        if not len(path.x):
            return
        state = path.state
        values = self.critic(state).squeeze(-1)
        if self.form == "bandit":
            self._fit(state, path, reward - values, reward)
            return
        last_value = values[-1:].sum() if self.form == "published" else values.new_zeros(())
        rewards = torch.zeros_like(values)
        rewards[-1:] = reward
        if self.form == "published":
            returns = gae(rewards, values, last_value, gamma=self.gamma, trace=self.trace)[1]
            rewards = self._published_rewards(path, returns)
            state = state * self._mask(state)
        else:
            rewards = self._rewards(path, reward)
        advantages, returns = gae(rewards, values, last_value, gamma=self.gamma, trace=self.trace)
        self._fit(state, path, advantages, returns)

    def _log_density(self, x: Tensor, mu: Tensor, log_std: Tensor) -> Tensor:
        density = published_log_density if self.form == "published" else log_density
        return density(x, mu, log_std, low=self.low, high=self.high)

    def _rewards(self, path: Path, reward: Tensor) -> Tensor:
        """Redistribute the reward over the rows of this path, (n,), by a predictor trained on the last paths."""
        assert self.predictor is not None
        predictor, inputs = self.predictor, torch.cat((path.state, path.x.sigmoid().unsqueeze(1)), 1)
        path_number = self.kept[-1, :1] + 1.0 if len(self.kept) else reward.new_zeros(1)
        tags = torch.cat((path_number % 2**20, reward.reshape(1))).expand(len(inputs), 2)
        kept = torch.cat((self.kept, torch.cat((tags, inputs), 1)))
        numbers = kept[:, 0]
        _, index, lengths = cast(
            tuple[Tensor, Tensor, Tensor],
            numbers.unique_consecutive(return_inverse=True, return_counts=True),  # pyright: ignore[reportUnknownMemberType]
        )
        self.kept, lengths = kept[index >= len(lengths) - KEPT], lengths[-KEPT:]
        returns, rows = self.kept[:, 1], self.kept[:, 2:]
        for _ in range(9):
            predictor.descend(lambda: prediction_loss(predictor(rows).squeeze(-1), returns, lengths))
        return redistributed(predictor(inputs).squeeze(-1), reward)

    def _published_rewards(self, path: Path, returns: Tensor) -> Tensor:
        assert self.predictor is not None
        T = squashed(path.x, low=self.low, high=self.high)
        predictor, inputs = self.predictor, torch.cat((path.state, T.unsqueeze(1)), 1)
        for _ in range(9):
            predictor.descend(lambda: published_prediction_loss(predictor(inputs).squeeze(-1), returns[-1]))
        return published_redistributed(predictor(inputs).squeeze(-1), returns)

    def _mask(self, state: Tensor) -> Tensor:
        """The released detector of critical states, (n, 1) in [0, 1].

        Its cross entropy is over a single class and thus always 0: only the penalty on the mask trains it.
        """
        assert self.detector is not None
        detector = self.detector
        for _ in range(10):
            detector.descend(lambda: 5e-3 * detector(state).sigmoid().sum())
        return detector(state).sigmoid()

    def _fit(self, state: Tensor, path: Path, advantages: Tensor, returns: Tensor) -> None:
        """Take ``rounds`` steps of the critic towards the returns, then of the actor on its clipped objective."""
        advantages = advantages - advantages.mean()
        spread = advantages.square().mean().sqrt()
        advantages = advantages / torch.where(spread > 0, spread, 1.0)

        def loss() -> Tensor:
            ratio = (self._log_density(path.x, *self.actor(state)) - path.log_density).exp()
            clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
            return -torch.minimum(ratio * advantages, clipped * advantages).mean()

        for _ in range(self.rounds):
            self.critic.descend(lambda: (self.critic(state).squeeze(-1) - returns).square().mean())
        for _ in range(self.rounds):
            self.actor.descend(loss)


class Learned(nn.Module):
    """A net trained by its own Adam, whose moments are buffers and thus in the state dict.

    Its parameters require no gradient outside ``descend``: they are in no optimizer's groups, and outputs have none.
    """

    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, net: nn.Module, *, lr: float, max_norm: float = math.inf) -> None:
        super().__init__()
        self.net, self.lr, self.max_norm = net.requires_grad_(False), lr, max_norm
        size = sum(p.numel() for p in net.parameters())
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        return self.net(x)

    @torch.no_grad()
    def descend(self, loss: Callable[[], Tensor]) -> None:
        """Take one step of Adam on ``loss``, with the gradient's norm clipped to ``max_norm``."""
        parameters = list(self.net.parameters())
        self.net.requires_grad_(True)
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(), parameters)
        finally:
            self.net.requires_grad_(False)
        gradient = torch.cat([g.flatten() for g in gradients])
        norm = cast(Tensor, gradient.norm())  # pyright: ignore[reportUnknownMemberType]
        gradient = gradient * (self.max_norm / norm).clamp(max=1.0)
        self.steps += 1
        self.mean.lerp_(gradient, 1.0 - 0.9)
        self.square.lerp_(gradient.square(), 1.0 - 0.999)
        root = (self.square / (1.0 - 0.999**self.steps)).sqrt() + 1e-8
        step = self.lr / (1.0 - 0.9**self.steps) * self.mean / root
        for p, change in zip(parameters, torch.split(step, [p.numel() for p in parameters]), strict=True):
            p.sub_(change.view_as(p))


class Layers(nn.Module):
    """Linear layers of these widths with ReLU between them unless ``linear``; computed in the dtype of the input."""

    def __init__(self, *widths: int, linear: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x.relu() if i and not self.linear else x
            x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return x


class Actor(nn.Module):
    """Map a state (N, 3) to the mean of the Gaussian, in [-1, 1], (N,), and its log standard deviation, ().

    As released: the log standard deviation is a sum of ten parameters, which makes its steps ten times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = Layers(3, 256, 256, 1)
        self.log_std = nn.Parameter(torch.zeros(10))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(state).squeeze(-1).tanh(), self.log_std.to(state.dtype).sum() - 0.5


def squashed(x: Float[Tensor, " N"], *, low: float, high: float) -> Float[Tensor, " N"]:
    """low + (high - low) sigmoid(x), (N,); the sigmoid is clamped to at least 0.001."""
    return low + (high - low) * x.sigmoid().clamp_min(FLOOR)


def log_density(
    x: Float[Tensor, " N"], mu: Float[Tensor, " N"], log_std: Float[Tensor, ""], *, low: float, high: float
) -> Float[Tensor, " N"]:
    """The log-density of the squashed action at sigmoid(x), (N,): the Gaussian's at x minus log |d action / d x|."""
    return _gaussian(x, mu, log_std) - F.logsigmoid(x) - F.logsigmoid(-x) - math.log(high - low)


def published_log_density(
    x: Float[Tensor, " N"], mu: Float[Tensor, " N"], log_std: Float[Tensor, ""], *, low: float, high: float
) -> Float[Tensor, " N"]:
    """The log-density used by the released code, (N,): the Gaussian's at the squashed action."""
    return _gaussian(squashed(x, low=low, high=high), mu, log_std, 1e-8)


def _gaussian(x: Tensor, mu: Tensor, log_std: Tensor, eps: float = 0.0) -> Tensor:
    return -0.5 * ((x - mu) / (log_std.exp() + eps)).square() - log_std - 0.5 * math.log(2.0 * math.pi)


def gae(
    rewards: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    last: Float[Tensor, ""],
    *,
    gamma: float,
    trace: float,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Generalized advantages and discounted returns, (n,) each; ``last`` is the value after the last step.

    Reference: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016,
    arXiv:1506.02438, equation 16.
    """
    next_values = torch.cat((values[1:], last.reshape(1)))[: len(values)]
    discount = gamma ** torch.arange(len(values), 0, -1, device=values.device, dtype=values.dtype)
    advantages = discounted(rewards + gamma * next_values - values, gamma * trace)
    return advantages, discounted(rewards, gamma) + last * discount


def discounted(x: Float[Tensor, " n"], factor: float) -> Float[Tensor, " n"]:
    """sum over j >= i of factor^(j - i) x_j, (n,), in log2(n) doublings."""
    reach = 1
    while reach < len(x):
        x = x + factor**reach * F.pad(x[reach:], (0, reach))
        reach *= 2
    return x


def prediction_loss(
    worth: Float[Tensor, " m"], returns: Float[Tensor, " m"], lengths: Int[Tensor, " k"]
) -> Float[Tensor, ""]:
    """The loss of the return predictor on k concatenated paths, ().

    The mean ``worth`` of a path's rows predicts its return, and with half the weight so does the mean of each prefix.
    """
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    summed, count = worth.cumsum(0), torch.arange(1, len(worth) + 1, device=worth.device) - start
    errors = ((summed - (summed - worth)[start]) / count - returns).square()
    return errors[lengths.cumsum(0) - 1].mean() + 0.5 * errors.mean()


def redistributed(worth: Float[Tensor, " n"], reward: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    """Redistribute a path's reward over its rows, (n,); their sum is the reward.

    The predicted return of the first i rows is the sum of their ``worth`` over n; each row gets the difference that it
    makes, plus an equal share of the error of the last prediction.
    """
    return (worth - worth.mean() + reward) / len(worth)


def published_redistributed(predicted: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The released code's redistribution, (n,): the first return, then differences of consecutive predictions.

    The added error differs per row, since it is that of the row's own return.
    """
    steps = torch.cat((returns[:1], predicted.diff()))
    return steps + (returns - steps.sum()) / len(steps)


def published_prediction_loss(predicted: Float[Tensor, " n"], final: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The released return predictor's loss on a path, (): the last error's and, with half the weight, the mean error's.

    It is the square of a mean, not the mean of squares. The released trainer treats each row as its own path.
    """
    return (predicted[-1] - final).square() + 0.5 * (predicted - final).mean().square()


def normals(positions: Int[Tensor, " N"], key: Int[Tensor, ""]) -> Float[Tensor, " N"]:
    """Standard normal numbers, (N,) in float32, each a function of its position and the key only (splitmix64)."""
    word = _finalize(_finalize(key) + positions * STEP)
    uniform = (((word >> 40) & 0xFFFFFF).float() + 0.5) / 2**24
    return cast(Tensor, torch.special.ndtri(uniform))  # pyright: ignore[reportUnknownMemberType]


def _finalize(word: Tensor) -> Tensor:
    """splitmix64's finalizer; torch's >> keeps the sign, hence the masks."""
    word = (word ^ ((word >> 30) & (2**34 - 1))) * -4658895280553007687
    word = (word ^ ((word >> 27) & (2**37 - 1))) * -7723592293110705685
    return word ^ ((word >> 31) & (2**33 - 1))
