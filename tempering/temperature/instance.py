"""Reinforcement-learned temperatures: an agent sees how sure both sides are of a row and sets its temperature."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature._mixed import Mix, MixUpLoader, ranked
from tempering.temperature._ppo import Agent, Form, Path, normals, squashed
from tempering.temperature.base import AdaptivePolicy, Temperatures, check_positive, constant
from tempering.utils.search_space import Fraction, Temperature

WAITING = 5  # columns of a path that waits for its reward: the state, the action, its log-density


class Instance(AdaptivePolicy):
    """T = low + (high - low) sigmoid(x), x from the agent's Gaussian, one temperature for both sides of a row, (N, 1).

    The agent sees the student's and the teacher's confidence (largest probability) and the student's margin (largest
    less second). In training x is drawn; in eval mode it is the mean. Up to ``warmup`` every row has ``tau``. The agent
    improves in the last ``span`` of every ``period`` of the run, after each step, from that step's rows: its path.

    - "ppo": the path's reward comes late, with the next step's rows: by how much the training accuracy rose, times the
      published scale. A return predictor redistributes it over the rows; then PPO, clipped ratio, and GAE.
    - "bandit": the cheap control. Each row's reward is by how much its own cross entropy fell, for which the engine
      runs the student once more (in a span alone); rows do not lead to each other.
    - "published": "ppo" with the formulas of the released code where that differs: the margin is to the second
      *smallest* probability; the density is the Gaussian's at the squashed action; the reward is the rise of accuracy
      up to the path's own step, which its temperatures cannot have caused; the path's end is bootstrapped by the
      critic; the return predictor is linear and without memory, its loss the square of a mean, its correction another a
      row; states are masked by a detector whose cross entropy is always 0. There the redistributed rewards come too
      late for the advantages; here they are used, as the paper has it.

    Draws depend on torch's seed, the steps learnt and the row's place among the rows that have weight, not on a
    generator: the same again for a resumed run, and none is taken from the student's. A batch is one path, hence
    ``relational``. Rows of weight 0 are no part of it; without labels "ppo" and "published" see no reward and stay.

    Args:
        tau: before the agent takes over.
        form: how it learns.
        low, high: the range; nearer to ``low`` than a thousandth of it no row gets.
        warmup, period, span: shares of the run; the released code's are 19, 20 and 1 of 240 epochs.
        clip: PPO's, of the ratio.
        rounds: steps of critic and actor an update.
        gamma, trace: discount, and lambda of GAE.
        actor_lr, critic_lr: of Adam.
        switches, waves: shares of the run at which the reward's scale drops (10, 5, 2, 1), and the half periods of its
            cosine before and after the first; for ImageNet the released ones are (30, 60, 90) and (75, 30) of 120.
        mix: efficient exploration: the share of the training set, 0.1 as published and at most 0.2, whose images a span
            sees mixed: samples near the end of the ranking by mean student entropy become 1 to 0.7 of one near its
            start. Needs batches that answer ``at(ids)`` (tempering.data.Batches) and a live teacher. The label is that
            of the larger part; with "published", of the smaller. It begins one step into a span. 0 for none.
        seed: of the agent's weights.

    Reference: Zhang et al., "Instance Temperature Knowledge Distillation", 2024, arXiv:2407.00115; hyper-parameters
    and scale of its released code.
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
        tau: Annotated[float, Temperature()] = 4.0,
        *,
        form: Form = "ppo",
        low: float = 0.0,
        high: float = 10.0,
        warmup: Annotated[float, Fraction()] = 19 / 240,
        period: float = 20 / 240,
        span: float = 1 / 240,
        clip: float = 0.2,
        rounds: int = 5,
        gamma: float = 0.99,
        trace: float = 0.95,
        actor_lr: float = 1e-4,
        critic_lr: float = 1e-3,
        switches: tuple[float, ...] = (150 / 240, 210 / 240, 1.0),
        waves: tuple[float, ...] = (75 / 240, 30 / 240),
        mix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive("Instance", tau=tau, high=high, period=period, clip=clip, actor_lr=actor_lr, critic_lr=critic_lr)
        self.tau, self.low, self.high, self.clip, self.rounds = tau, low, high, clip, rounds
        self.warmup, self.period, self.span = warmup, period, span
        self.gamma, self.trace, self.actor_lr, self.critic_lr = gamma, trace, actor_lr, critic_lr
        self.switches, self.waves, self.mix, self.seed = tuple(switches), tuple(waves), mix, seed
        self.form: Form = form
        self._validate()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.agent = Agent(
                form,
                low=low,
                high=high,
                clip=clip,
                rounds=rounds,
                gamma=gamma,
                trace=trace,
                actor_lr=actor_lr,
                critic_lr=critic_lr,
            )
        self.register_buffer("accuracy", torch.tensor(-1.0))  # of the step before; -1 where none was
        self.register_buffer("waiting", torch.zeros(0, 0))  # (n, WAITING): the path of the step before; (0, 0) for none
        self.register_buffer("entropy", torch.zeros(0))  # summed, a sample; what ``wrap_batches`` makes room for
        self.register_buffer("times", torch.zeros(0))  # how often it was summed
        for name in ("steps", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(()))
        self.seen: _Seen | None = None
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
                "Instance needs 0 < span <= period <= 1, shares of the run (1 of 240 epochs is span=1/240); got "
                f"span={self.span!r} and period={self.period!r}."
            )
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"Instance needs rounds >= 1, an integer; got {self.rounds!r}.")
        if len(self.switches) != 3 or len(self.waves) != 2 or min(self.waves) <= 0.0:
            raise ValueError(f"Instance needs three switches and two waves > 0; got {self.switches} and {self.waves}.")

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        self.seen = None
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
                self.seen = _Seen(path, rows, kept, progress, acts and self.improves(progress))
            T = squashed(x, low=self.low, high=self.high).unsqueeze(1) if acts else constant(self.tau, state)
            return Temperatures(T, T)

    def improves(self, progress: float) -> bool:
        """Whether the agent learns at that share of the run: in the last ``span`` of a ``period``."""
        periods = progress / self.period
        return math.ceil(periods - 1e-6) - periods < self.span / self.period - 1e-6

    @property
    def needs_reward(self) -> bool:
        return self.form == "bandit" and self.seen is not None and self.seen.improving

    @torch.no_grad()
    def update(self, reward: Float[Tensor, " N"] | None) -> None:
        """Take what the last call's rows brought and improve; "bandit" alone looks at ``reward``.

        Raises:
            ValueError: for a reward that is not one of those rows'.
        """
        seen, self.seen = self.seen, None
        if seen is None:
            return
        with torch.autocast(self.accuracy.device.type, enabled=False):
            if self.form == "bandit":
                self._learn_rows(seen, reward)
            else:
                self._learn_path(seen)
        self._remember(seen)
        self.steps += 1
        self.progress.fill_(seen.progress)

    def report(self) -> dict[str, Tensor]:
        """Updates of the agent so far, and the deviation of its Gaussian."""
        deviation = (self.agent.actor.net.log_std.sum() - 0.5).exp()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        return {"updates": self.updates.clone(), "deviation": deviation.detach()}

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """The batches, mixed in spans where ``mix`` says so.

        Raises:
            ValueError: where they cannot be.
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
                f"Instance(mix={self.mix}) shows images that are in no cache, and {type(teacher).__name__} answers "
                "from one. Use teachers.Live(model), or mix=0."
            )
        size = int(batches.rows)  # pyright: ignore[reportAttributeAccessIssue]
        self.entropy, self.times = self.entropy.new_zeros(size), self.times.new_zeros(size)
        return MixUpLoader(batches, self.mixes, larger=self.form != "published")

    def mixes(self) -> Mix | None:
        """Which samples the next batch shows mixed; None outside a span."""
        if not self.improves(float(self.progress)):
            return None
        if self.mixture is None:
            self.mixture = ranked(self.entropy, self.times, self.mix)
        return self.mixture

    def _noise(self, kept: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The steps' draws, by place among the rows that are kept."""
        key = torch.initial_seed() % 2**62
        return normals(kept.cumsum(0), self.steps + key)

    def _learn_rows(self, seen: _Seen, reward: Tensor | None) -> None:
        if not seen.improving or reward is None:
            return
        if reward.shape != seen.kept.shape:
            raise ValueError(
                f"Instance.learn() needs the reward of each row of the last call, ({len(seen.kept)},); got "
                f"{tuple(reward.shape)}."
            )
        told = seen.kept & seen.labeled & reward.isfinite()
        self._improve(self._taken(seen.path, told), reward[told].to(self.accuracy.dtype))

    def _learn_path(self, seen: _Seen) -> None:
        """Reward the path that waits with the accuracy that has come since, and let this one wait."""
        accuracy = seen.accuracy(self.accuracy)
        rise = scale(seen.progress, self.switches, self.waves) * (accuracy - self.accuracy)
        mine = self._taken(seen.path, seen.kept) if seen.improving else None
        paid = mine if self.form == "published" else self._unpacked()
        if paid is not None and bool(self.accuracy >= 0.0):
            self._improve(paid, rise)
        self.waiting = self.waiting.new_zeros(0, 0)
        if mine is not None and self.form == "ppo":
            self.waiting = torch.cat((mine.state, mine.x.unsqueeze(1), mine.log_density.unsqueeze(1)), 1)
        self.accuracy.copy_(accuracy)

    def _improve(self, path: Path, reward: Tensor) -> None:
        if len(path.x):
            self.agent.improve(path, reward)
            self.updates += 1

    def _taken(self, path: Path, kept: Bool[Tensor, " N"]) -> Path:
        return Path(*(part[kept].to(self.accuracy.dtype) for part in path))

    def _unpacked(self) -> Path | None:
        if not self.waiting.shape[1]:
            return None
        return Path(self.waiting[:, :3], self.waiting[:, 3], self.waiting[:, 4])

    def _remember(self, seen: _Seen) -> None:
        """Sum the student's entropies by sample, in steps whose images are as they come."""
        if not len(self.entropy) or seen.ids is None or seen.improving or self.improves(float(self.progress)):
            return
        logp = seen.student.log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)[seen.kept]
        ids = seen.ids[seen.kept]
        self.entropy.index_add_(0, ids, entropy.to(self.entropy.dtype))
        self.times.index_add_(0, ids, torch.ones_like(ids, dtype=self.times.dtype))
        self.mixture = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the sizes of these depend on what was seen
        for owner, name in ((self, "waiting"), (self, "entropy"), (self, "times"), (self.agent, "kept")):
            stored = state_dict.get(prefix + ("" if owner is self else "agent.") + name)
            if stored is not None:
                setattr(owner, name, getattr(owner, name).new_zeros(stored.shape))
        self.seen = self.mixture = None
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Seen:
    """What the last call leaves for ``update``: the path of all rows, which of them count, and what they were."""

    def __init__(self, path: Path, rows: Rows, kept: Bool[Tensor, " N"], progress: float, improving: bool) -> None:
        self.path, self.kept, self.progress, self.improving, self.ids = path, kept, progress, improving, rows.ids
        self.student = upcast_to_float32(rows.student.detach())
        self.target = rows.target
        self.labeled = torch.zeros_like(kept) if rows.target is None else rows.target >= 0

    def accuracy(self, before: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Of the kept rows that have a label; ``before`` where there are none."""
        if self.target is None or not self.student.numel():
            return before
        counted = self.kept & self.labeled
        right = ((self.student.argmax(-1) == self.target) & counted).sum()
        return torch.where(counted.any(), right / counted.sum(), before).to(before.dtype)


def observed(rows: Rows, kept: Bool[Tensor, " N"], *, published: bool = False) -> Float[Tensor, "N 3"]:
    """The agent's states: confidence of the student and of the teacher, and the student's margin, each in [0, 1].

    The margin is to the second largest probability, 0 where there is none; ``published``: to the second smallest.
    """
    masked, (student, teacher) = [], (upcast_to_float32(rows.student.detach()), upcast_to_float32(rows.teacher))
    for z in (student, teacher):
        z = z.masked_fill(~kept.unsqueeze(1), 0.0)
        masked.append(z.masked_fill(torch.isneginf(z).all(-1, keepdim=True), 0.0))
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    p, q = (z.to(dtype).softmax(-1) for z in masked)
    first = p.amax(-1)
    second = torch.zeros_like(first)
    if p.shape[1] > 1 and published:
        second = p.masked_fill(torch.isneginf(masked[0]), torch.inf).kthvalue(2).values
        second = torch.where(second.isfinite(), second, 0.0)
    elif p.shape[1] > 1:
        second = p.topk(2).values[:, 1]
    return torch.stack((first, q.amax(-1), first - second), 1)


def scale(progress: float, switches: tuple[float, ...], waves: tuple[float, ...]) -> float:
    """What a rise of accuracy is multiplied by: 20 at first, lower in steps and waves, and 1 at the end."""
    for before, by, wave in zip(switches, (10.0, 5.0, 2.0), (waves[0], waves[1], waves[1]), strict=True):
        if progress < before - 1e-9:
            return by * (0.5 * math.cos(math.pi * progress / wave) + 1.5)
    return 1.0
