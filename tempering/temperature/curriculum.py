"""CTKD: a temperature that is learned against the student, by a reversed gradient that grows over the first epochs."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive, check_run_fraction
from tempering.utils.search_space import Temperature

Form = Literal["global", "instance"]
AT_BOUND = 0.01  # a temperature within this share of [low, high] from its end sits at the bound
LOOK = 256  # on a device every so many calls: a look at the temperature waits for it


class Curriculum(Policy):
    """T = low + (high - low) sigmoid(raw), the same for both sides: (1, 1) where global, (N, 1) where by instance.

    It learns through the loss: its gradient is multiplied by lambda, which goes from ``lambda_first`` to
    ``lambda_last`` along half a cosine over the first ``over`` of the run. Below zero the temperature climbs the loss
    that the student descends; ``lambda_last=1.0`` makes it descend too. The optimizer must have ``raw`` (or the net):
    take ``method.param_groups()``, as the engine does.

    Args:
        tau: the temperature that methods soften plainly at; the learned one does not start there.
        form: "global", one number; "instance", a net of two layers from both sides' logits, sized by ``setup``.
        low: lower bound.
        high: upper bound; the released t_start and t_end are 1 and 20, which is [1, 21].
        initial: ``raw`` at the start, or the bias of the net's last layer. The released 1.0 is T = 15.6.
        lambda_first: what the gradient is multiplied by at the start.
        lambda_last: and at the end of the curriculum.
        over: the curriculum's share of the run; published: 10 of 240 epochs (5 of 120 on ImageNet).
        weight_decay: of ``raw`` or the net alone. None leaves them the optimizer's own as the released code does
            (5e-4), which pulls ``raw`` to 0 and so T to the middle of the range; 0.0 for none.
        hidden: width of the instance net; the published one is not known.
        centered: take the mean off the logits that the net sees, so that a shift of them changes nothing.
        attached: let the student's gradient flow through the net's input too, reversed as it is.

    Warns once when the temperature, or most rows', sits at a bound: there it is a static one. On standardized logits it
    always falls to the lower bound. ``report`` counts the temperatures that do.

    Reference: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv:2211.16231. The instance
    net is not in the released code; its input is what its snippet says, without the 1e-7 that it adds to the teacher.
    """

    paper = "arXiv:2211.16231"

    def __init__(
        self,
        tau: Annotated[float, Temperature()] = 4.0,
        *,
        form: Form = "global",
        low: float = 1.0,
        high: float = 21.0,
        initial: float = 1.0,
        lambda_first: float = 0.0,
        lambda_last: float = -1.0,
        over: float = 10 / 240,
        weight_decay: float | None = None,
        hidden: int = 64,
        centered: bool = True,
        attached: bool = False,
    ) -> None:
        super().__init__()
        check_positive("Curriculum", tau=tau, low=low, high=high)
        check_run_fraction("Curriculum", over=over)
        if form not in ("global", "instance"):
            raise ValueError(f"Curriculum needs form 'global' or 'instance'; got {form!r}.")
        if low >= high:
            raise ValueError(f"Curriculum needs low < high, the bounds of T; got low={low!r} and high={high!r}.")
        if not all(map(math.isfinite, (initial, lambda_first, lambda_last))):
            raise ValueError(
                "Curriculum needs finite initial, lambda_first and lambda_last; "
                f"got {initial!r}, {lambda_first!r} and {lambda_last!r}."
            )
        if weight_decay is not None and not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"Curriculum needs weight_decay >= 0, or None for the optimizer's; got {weight_decay!r}.")
        if hidden < 1:
            raise ValueError(f"Curriculum needs hidden >= 1; got {hidden!r}.")
        self.form: Form = form
        self.tau, self.low, self.high, self.initial = tau, low, high, initial
        self.lambda_first, self.lambda_last, self.over = lambda_first, lambda_last, over
        self.weight_decay, self.hidden, self.centered = weight_decay, hidden, centered
        self.by_class = form == "instance"
        self.attached = attached
        self.shift_invariant = centered or form == "global"
        self.raw = nn.Parameter(torch.full((1, 1), float(initial))) if form == "global" else None
        self.net: nn.Sequential | None = None
        self.counts: dict[str, Tensor] = {}
        self.warned, self.calls = False, 0

    def setup(self, rows: Rows) -> None:
        """Make the instance net for these classes, unless there is one."""
        both = 2 * rows.student.shape[1]
        if self.form == "global" or (self.net is not None and self.net[0].in_features == both):
            return
        net = nn.Sequential(nn.Linear(both, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        nn.init.constant_(net[2].bias, self.initial)  # pyright: ignore[reportArgumentType]
        self.net = net.to(upcast_to_float32(rows.student))

    def lambda_at(self, progress: float) -> float:
        """What the temperature's gradient is multiplied by at that share of the run."""
        done = 1.0 if self.over <= 0.0 else min(progress / self.over, 1.0)
        return self.lambda_last + (self.lambda_first - self.lambda_last) * 0.5 * (1.0 + math.cos(math.pi * done))

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        with torch.autocast(rows.student.device.type, enabled=False):
            raw = self._raw(rows)
            # the value is raw to the last bit; the gradient is multiplied by lambda
            raw = raw.detach() + self.lambda_at(progress) * (raw - raw.detach())
            where = raw.sigmoid()
            T = self.low + (self.high - self.low) * where
        self._look(where.detach(), rows)
        return Temperatures(T, T)

    def param_groups(self) -> list[dict[str, Any]]:
        if self.weight_decay is None:
            return []
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": self.weight_decay}]

    def report(self) -> dict[str, Tensor]:
        """Temperatures of the last call (one, or a row's each) that sit at a bound."""
        return dict(self.counts)

    def _raw(self, rows: Rows) -> Float[Tensor, "#N 1"]:
        if self.raw is not None:
            return self.raw.to(upcast_to_float32(rows.student))
        if self.net is None or self.net[0].in_features != 2 * rows.student.shape[1]:
            made = "has no size yet" if self.net is None else f"is made for {self.net[0].in_features // 2} classes"  # pyright: ignore
            raise RuntimeError(
                f"Curriculum(form='instance'): its net {made}, and Rows(name={rows.name!r}) has "
                f"{rows.student.shape[1]} classes. Call method.setup(rows) with a first block of rows, before the "
                "optimizer is made."
            )
        student = rows.student if self.attached else rows.student.detach()
        x = torch.cat((self._seen(rows.teacher), self._seen(student)), 1)
        if rows.weight is not None:
            x = torch.where((rows.weight > 0).unsqueeze(1), x, 0.0)
        first, last = self.net[0], self.net[2]
        for i, layer in enumerate((first, last)):
            x = F.linear(x.relu() if i else x, layer.weight.to(x), layer.bias.to(x))  # pyright: ignore
        return x

    def _seen(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """One side's logits as the net sees them: masked classes are 0."""
        z = upcast_to_float32(logits)
        gone = torch.isneginf(z)
        z = z.masked_fill(gone, 0.0)
        if self.centered:
            z = z - z.sum(1, keepdim=True) / (~gone).sum(1, keepdim=True).clamp_min(1)
        return z.masked_fill(gone, 0.0)

    def _look(self, where: Float[Tensor, "#N 1"], rows: Rows) -> None:
        """Count the temperatures at a bound, and say once when most of them are."""
        counted = torch.ones_like(where, dtype=torch.bool)
        if self.form == "instance" and rows.weight is not None:
            counted = (rows.weight > 0).unsqueeze(1)
        stuck = counted & ((where < AT_BOUND) | (where > 1.0 - AT_BOUND))
        self.counts = {"at_bound": stuck.sum()}
        self.calls += 1
        if self.warned or not self.training or (where.device.type != "cpu" and self.calls % LOOK):
            return
        if 2 * int(stuck.sum()) <= int(counted.sum()):
            return
        self.warned = True
        T = self.low + (self.high - self.low) * float(where[counted].median())
        warnings.warn(
            f"Curriculum's temperature sits at a bound, T = {T:.4g} of [{self.low:g}, {self.high:g}], where it is a "
            "static one. On standardized logits it always falls to the lower bound. Use Static, or move low and high.",
            stacklevel=5,
        )
