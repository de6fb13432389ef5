"""Instance temperatures by reinforcement learning: an agent sets each row's temperature from both sides' confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.rows import Rows, class_labels, upcast_to_float32
from tempering.temperature._mixed import Mix, MixUpLoader, ranked
from tempering.temperature._ppo import Actor, Agent, Form, Path, normals, squashed
from tempering.temperature.base import AdaptivePolicy, Temperatures, constant
from tempering.utils.search_space import Positive, RunFraction, Tau

WAITING = 5  # columns of a stored path: the state, the action, its log-density


class Instance(AdaptivePolicy):
    """T = low + (high - low) sigmoid(x), x from the agent's Gaussian, one temperature per row for both sides, (N, 1).

    The agent's state is the student's and the teacher's confidence (largest probability) and the student's margin
    (largest minus second largest). In training x is sampled; in eval mode it is the mean. Up to ``warmup`` every row
    has ``tau``. The agent is updated in the last ``span`` of every ``period`` of the run, after each step, from that
    step's rows: its path.

    - "ppo": the path's reward is computed one step later: the increase of the training accuracy on the next step's
      rows, times the published scale. A return predictor redistributes it over the rows; then PPO with clipped ratio
      and GAE.
    - "bandit": a simple baseline. Each row's reward is the decrease of its own cross entropy by the step, for which the
      trainer runs the student twice more, in eval mode before and after it (in a span only); rows do not lead to each
      other.
    - "published": "ppo" with the formulas of the released code where they differ: the margin is to the second
      *smallest* probability; the density is the Gaussian's at the squashed action; the reward is the increase of
      accuracy up to the path's own step, which its temperatures cannot have caused; the path's end is bootstrapped by
      the critic; the return predictor is linear and without memory, its loss the square of a mean, its correction
      different per row; states are masked by a detector whose cross entropy is always 0. There the redistributed
      rewards are computed too late for the advantages; here they are used, as in the paper.

    Samples depend on torch's seed, the number of steps and the row's position among the rows that have weight, not on a
    generator: a resumed run gets the same samples, and the student's generator is not advanced. A batch is one path,
    hence ``relational``. Rows of weight 0 are not part of it; without labels "ppo" and "published" get no reward and
    are not updated.

    Args:
        tau: temperature during the warmup.
        form: training algorithm of the agent.
        low, high: the range; the lowest temperature is a thousandth of the range above ``low``.
        warmup, period, span: fractions of the run; the released code uses 19, 20 and 1 of 240 epochs.
        clip: clipping range of PPO's ratio.
        rounds: steps of critic and actor per update.
        gamma, trace: discount, and lambda of GAE.
        actor_lr, critic_lr: learning rates of Adam.
        switches, waves: fractions of the run at which the reward's scale drops (10, 5, 2, 1), and the half periods of
            its cosine before and after the first; for ImageNet the released ones are (30, 60, 90) and (75, 30) of 120.
        mix: efficient exploration: the fraction of the training set, 0.1 as published and at most 0.2, whose images are
            mixed during a span: a sample near the end of the ranking by mean student entropy becomes a mixture with a
            share of 1 to 0.7 of one near its start. Needs batches with ``gather(ids)`` (tempering.data.Batches) and a
            live teacher. The label is that of the larger part; with "published", of the smaller. Starts one step into a
            span. 0 for none.
        seed: seed of the agent's weights.

    Reference: Zhang et al., "Instance Temperature Knowledge Distillation", 2024, arXiv:2407.00115; hyper-parameters and
    scale of its released code.
    """

    paper = "arXiv:2407.00115"
    relational = True

    accuracy: Tensor
    waiting: Tensor
    entropy: Tensor
    times: Tensor
    steps: Tensor
    updates: Tensor
    progress: Tensor

    def __init__(
        self,
        tau: Tau = 4.0,
        *,
        form: Form = "ppo",
        low: float = 0.0,
        high: Positive = 10.0,
        warmup: RunFraction = 19 / 240,
        period: Positive = 20 / 240,
        span: float = 1 / 240,
        clip: Positive = 0.2,
        rounds: int = 5,
        gamma: float = 0.99,
        trace: float = 0.95,
        actor_lr: Positive = 1e-4,
        critic_lr: Positive = 1e-3,
        switches: tuple[float, ...] = (150 / 240, 210 / 240, 1.0),
        waves: tuple[float, ...] = (75 / 240, 30 / 240),
        mix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tau, self.low, self.high, self.clip, self.rounds = tau, low, high, clip, rounds
        self.warmup, self.period, self.span = warmup, period, span
        self.gamma, self.trace, self.actor_lr, self.critic_lr = gamma, trace, actor_lr, critic_lr
        self.switches, self.waves, self.mix, self.seed = tuple(switches), tuple(waves), mix, seed
        self.form: Form = form
        self._validate()
        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
            torch.default_generator.manual_seed(seed)
            rates = {"actor_lr": actor_lr, "critic_lr": critic_lr}
            self.agent = Agent(form, low=low, high=high, clip=clip, rounds=rounds, gamma=gamma, trace=trace, **rates)
        self.register_buffer("accuracy", torch.tensor(-1.0))  # of the previous step; -1 before the first
        self.register_buffer("waiting", torch.zeros(0, 0))  # (n, WAITING): the path of the previous step, or (0, 0)
        self.register_buffer("entropy", torch.zeros(0))  # summed per sample; sized by ``wrap_batches``
        self.register_buffer("times", torch.zeros(0))  # number of summed values per sample
        for name in ("steps", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(()))
        self.last_call: _LastCall | None = None
        self.mixture: Mix | None = None

    def _validate(self) -> None:
        if self.form not in ("ppo", "bandit", "published"):
            raise ValueError(f"Instance needs form 'ppo', 'bandit' or 'published'; got {self.form!r}.")
        if not 0.0 <= self.low < self.high < math.inf:
            raise ValueError(f"Instance needs 0 <= low < high; got low={self.low!r} and high={self.high!r}.")
        for name, low, high in (("warmup", 0, 1), ("gamma", 0, 1), ("trace", 0, 1), ("mix", 0, 0.2)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Instance needs {name} in [{low}, {high}]; got {getattr(self, name)!r}.")
        if not 0.0 < self.span <= self.period <= 1.0:
            raise ValueError(
                "Instance needs 0 < span <= period <= 1, fractions of the run (1 of 240 epochs is span=1/240); got "
                f"span={self.span!r} and period={self.period!r}."
            )
        if not isinstance(self.rounds, int) or self.rounds < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"Instance needs rounds >= 1, an integer; got {self.rounds!r}.")
        if len(self.switches) != 3 or len(self.waves) != 2 or min(self.waves) <= 0.0:
            raise ValueError(f"Instance needs three switches and two waves > 0; got {self.switches} and {self.waves}.")

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        self.last_call = None
        with torch.autocast(rows.student.device.type, enabled=False):
            kept = torch.ones(len(rows), dtype=torch.bool, device=rows.student.device)
            if rows.weight is not None:
                kept = rows.weight > 0
            state = observed(rows, kept, published=self.form == "published")
            noise = self._noise(kept).to(state.dtype) if self.training else None
            x, density = self.agent.acted(state, noise)
            acts = progress > self.warmup
            if self.training:
                path = Path(state, x, density)
                self.last_call = _LastCall(path, rows, kept, progress, acts and self.improves(progress))
            T = squashed(x, low=self.low, high=self.high).unsqueeze(1) if acts else constant(self.tau, state)
            return Temperatures(T, T)

    def improves(self, progress: float) -> bool:
        """Whether the agent is updated at this fraction of the run: in the last ``span`` of a ``period``."""
        periods = progress / self.period
        return math.ceil(periods - 1e-6) - periods < self.span / self.period - 1e-6

    @property
    def needs_reward(self) -> bool:
        return self.form == "bandit" and self.last_call is not None and self.last_call.improving

    @torch.no_grad()
    def update(self, reward: Float[Tensor, " N"] | None) -> None:
        """Update the agent with the rewards of the last call's rows; only "bandit" uses ``reward``.

        Raises:
            ValueError: for a reward whose shape does not match those rows.
        """
        call, self.last_call = self.last_call, None
        if call is None:
            return
        with torch.autocast(self.accuracy.device.type, enabled=False):
            if self.form == "bandit":
                self._learn_rows(call, reward)
            else:
                self._learn_path(call)
        self._remember(call)
        self.steps += 1
        self.progress.fill_(call.progress)

    def report(self) -> dict[str, Tensor]:
        """The number of updates of the agent, and the standard deviation of its Gaussian."""
        actor = self.agent.actor.net
        assert isinstance(actor, Actor)
        deviation = (actor.log_std.sum() - 0.5).exp()
        return {"updates": self.updates.clone(), "deviation": deviation.detach()}

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """Return the batches, with mixed images in spans if ``mix`` is set.

        Raises:
            ValueError: for batches that cannot be mixed, or a teacher that cannot predict mixed images.
        """
        if not self.mix:
            return batches
        if not hasattr(batches, "gather") or not hasattr(batches, "rows"):
            raise ValueError(
                f"Instance(mix={self.mix}) mixes images by their ids, and {type(batches).__name__} cannot look them "
                "up. Use tempering.data.Batches, or mix=0."
            )
        if getattr(teacher, "model", None) is None:
            raise ValueError(
                f"Instance(mix={self.mix}) shows images that are in no cache, and {type(teacher).__name__} reads "
                "its outputs from one. Use teachers.Live(model), or mix=0."
            )
        size = int(cast(Any, batches).rows)
        self.entropy, self.times = self.entropy.new_zeros(size), self.times.new_zeros(size)
        return MixUpLoader(batches, self.mixes, larger=self.form != "published")

    def mixes(self) -> Mix | None:
        """The mixture for the next batch; None outside a span."""
        if not self.improves(float(self.progress)):
            return None
        if self.mixture is None:
            self.mixture = ranked(self.entropy, self.times, self.mix)
        return self.mixture

    def _noise(self, kept: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Standard normal noise of this step, by position among the rows that have weight."""
        key = torch.initial_seed() % 2**62
        return normals(kept.cumsum(0), self.steps + key)

    def _learn_rows(self, call: _LastCall, reward: Tensor | None) -> None:
        if not call.improving or reward is None:
            return
        if reward.shape != call.kept.shape:
            raise ValueError(
                f"Instance.update() needs the reward of each row of the last call, ({len(call.kept)},); got "
                f"{tuple(reward.shape)}."
            )
        has_reward = call.kept & call.labeled & reward.isfinite()
        self._improve(self._select(call.path, has_reward), reward[has_reward].to(self.accuracy.dtype))

    def _learn_path(self, call: _LastCall) -> None:
        """Reward the stored path with the increase of accuracy since, and store this step's path."""
        accuracy = call.accuracy(self.accuracy)
        reward = scale(call.progress, self.switches, self.waves) * (accuracy - self.accuracy)
        new_path = self._select(call.path, call.kept) if call.improving else None
        path = new_path if self.form == "published" else self._stored_path()
        if path is not None and bool(self.accuracy >= 0.0):
            self._improve(path, reward)
        self.waiting = self.waiting.new_zeros(0, 0)
        if new_path is not None and self.form == "ppo":
            self.waiting = torch.cat((new_path.state, new_path.x.unsqueeze(1), new_path.log_density.unsqueeze(1)), 1)
        self.accuracy.copy_(accuracy)

    def _improve(self, path: Path, reward: Tensor) -> None:
        if len(path.x):
            self.agent.improve(path, reward)
            self.updates += 1

    def _select(self, path: Path, kept: Bool[Tensor, " N"]) -> Path:
        return Path(*(part[kept].to(self.accuracy.dtype) for part in path))

    def _stored_path(self) -> Path | None:
        if not self.waiting.shape[1]:
            return None
        return Path(self.waiting[:, :3], self.waiting[:, 3], self.waiting[:, 4])

    def _remember(self, call: _LastCall) -> None:
        """Sum the student's entropies per sample, in steps without mixed images."""
        if not len(self.entropy) or call.ids is None or call.improving or self.improves(float(self.progress)):
            return
        logp = call.student.log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)[call.kept]
        ids = call.ids[call.kept]
        self.entropy.index_add_(0, ids, entropy.to(self.entropy.dtype))
        self.times.index_add_(0, ids, torch.ones_like(ids, dtype=self.times.dtype))
        self.mixture = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the sizes of these buffers depend on the data
        for owner, name in ((self, "waiting"), (self, "entropy"), (self, "times"), (self.agent, "kept")):
            stored = state_dict.get(prefix + ("" if owner is self else "agent.") + name)
            if stored is not None:
                setattr(owner, name, getattr(owner, name).new_zeros(stored.shape))
        self.last_call = self.mixture = None
        super()._load_from_state_dict(state_dict, prefix, *rest)  # pyright: ignore[reportUnknownMemberType]


class _LastCall:
    """State of the last call for ``update``: the path of all rows, which rows have weight, and their targets."""

    def __init__(self, path: Path, rows: Rows, kept: Bool[Tensor, " N"], progress: float, improving: bool) -> None:
        self.path, self.kept, self.progress, self.improving, self.ids = path, kept, progress, improving, rows.ids
        self.student = upcast_to_float32(rows.student.detach())
        self.target = None if rows.target is None else class_labels(rows.target)
        self.labeled = torch.zeros_like(kept) if self.target is None else self.target >= 0

    def accuracy(self, before: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The accuracy on rows with weight and label; ``before`` if there are none."""
        if self.target is None or not self.student.numel():
            return before
        has_label = self.kept & self.labeled
        correct = ((self.student.argmax(-1) == self.target) & has_label).sum()
        return torch.where(has_label.any(), correct / has_label.sum(), before).to(before.dtype)


def observed(rows: Rows, kept: Bool[Tensor, " N"], *, published: bool = False) -> Float[Tensor, "N 3"]:
    """The agent's states, (N, 3): confidence of student and teacher, and the student's margin, each in [0, 1].

    The margin is to the second largest probability, 0 if there is none; ``published``: to the second smallest.
    """
    student, teacher = upcast_to_float32(rows.student.detach()), upcast_to_float32(rows.teacher)
    masked: list[Tensor] = []
    for z in (student, teacher):
        z = z.masked_fill(~kept.unsqueeze(1), 0.0)
        masked.append(z.masked_fill(torch.isneginf(z).all(-1, keepdim=True), 0.0))
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    p, q = (z.to(dtype).softmax(-1) for z in masked)
    largest = p.amax(-1)
    second = torch.zeros_like(largest)
    if p.shape[1] > 1 and published:
        second = p.masked_fill(torch.isneginf(masked[0]), torch.inf).kthvalue(2).values
        second = torch.where(second.isfinite(), second, 0.0)
    elif p.shape[1] > 1:
        second = p.topk(2).values[:, 1]
    return torch.stack((largest, q.amax(-1), largest - second), 1)


def scale(progress: float, switches: tuple[float, ...], waves: tuple[float, ...]) -> float:
    """The factor of an increase of accuracy: 20 at first, lower in steps and waves, and 1 at the end."""
    for switch, factor, wave in zip(switches, (10.0, 5.0, 2.0), (waves[0], waves[1], waves[1]), strict=True):
        if progress < switch - 1e-9:
            return factor * (0.5 * math.cos(math.pi * progress / wave) + 1.5)
    return 1.0
