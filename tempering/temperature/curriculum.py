"""CTKD: a learned temperature, trained against the student by gradient reversal with a curriculum."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.device import check_memory
from tempering.utils.search_space import RUN_FRACTION, Positive, Tau

Form = Literal["global", "instance"]
AT_BOUND = 0.01  # a temperature within this fraction of [low, high] from its end is at the bound
CHECK_INTERVAL = 256  # calls between checks on a device, since reading the temperature synchronizes


class Curriculum(Policy):
    """T = low + (high - low) sigmoid(raw), equal for both sides: (1, 1) if global, (N, 1) if per instance.

    Trained by the loss: its gradient is multiplied by lambda, which goes from ``lambda_first`` to ``lambda_last`` along
    half a cosine over the first ``run_fraction`` of the run. With a negative lambda the temperature maximizes the loss
    that the student minimizes; ``lambda_last=1.0`` makes it minimize the loss too. The optimizer must include ``raw``
    (or the net): use ``method.param_groups()``, as the trainer does.

    Args:
        tau: reference temperature for methods with a plain softened term; the learned temperature does not start there.
        form: "global", one parameter; "instance", a two-layer net on the logits of both sides, created by ``setup``.
        low: lower bound.
        high: upper bound; the released t_start and t_end are 1 and 20, which is [1, 21].
        initial: initial ``raw``, or initial bias of the net's last layer. The released 1.0 is T = 15.6.
        lambda_first: factor of the gradient at the start.
        lambda_last: factor of the gradient at the end of the curriculum.
        run_fraction: length of the curriculum as a fraction of the run; published: 10 of 240 epochs (5 of 120 on
            ImageNet).
        weight_decay: weight decay of ``raw`` or the net only. None uses the optimizer's, as the released code does
            (5e-4), which pulls ``raw`` to 0 and thus T to the middle of the range; 0.0 for none.
        hidden: width of the instance net; the published width is not known.
        centered: subtract the mean from the logits that enter the net, so that it is invariant to a shift of them.
        differentiable: let the student's gradient flow through the net's input too, reversed likewise.

    Warns once if the temperature, or most rows' temperatures, is at a bound, where it is constant. On standardized
    logits it always falls to the lower bound. ``report`` counts the temperatures at a bound.

    Reference: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv:2211.16231. The instance
    net is not in the released code; its input follows the paper's snippet, without the 1e-7 added to the teacher.
    """

    paper = "arXiv:2211.16231"

    def __init__(
        self,
        tau: Tau = 4.0,
        *,
        form: Form = "global",
        low: Positive = 1.0,
        high: Positive = 21.0,
        initial: float = 1.0,
        lambda_first: float = 0.0,
        lambda_last: float = -1.0,
        run_fraction: Annotated[float, RUN_FRACTION] = 10 / 240,
        weight_decay: float | None = None,
        hidden: int = 64,
        centered: bool = True,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        if form not in ("global", "instance"):
            raise ValueError(f"Curriculum needs form 'global' or 'instance'; got {form!r}.")
        if low >= high:
            raise ValueError(f"Curriculum needs low < high, the bounds of T; got low={low!r} and high={high!r}.")
        if weight_decay is not None and not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"Curriculum needs weight_decay >= 0, or None for the optimizer's; got {weight_decay!r}.")
        if hidden < 1:
            raise ValueError(f"Curriculum needs hidden >= 1; got {hidden!r}.")
        self.form: Form = form
        self.tau, self.low, self.high, self.initial = tau, low, high, initial
        self.lambda_first, self.lambda_last, self.run_fraction = lambda_first, lambda_last, run_fraction
        self.weight_decay, self.hidden, self.centered = weight_decay, hidden, centered
        self.by_class = form == "instance"
        self.differentiable = differentiable
        self.shift_invariant = centered or form == "global"
        self.raw = nn.Parameter(torch.full((1, 1), float(initial))) if form == "global" else None
        self.net: nn.Sequential | None = None
        self.counts: dict[str, Tensor] = {}
        self.warned, self.calls = False, 0

    def setup(self, rows: Rows) -> None:
        """Create the instance net for this number of classes, unless it exists."""
        inputs = 2 * rows.student.shape[1]
        if self.form == "global" or (self.net is not None and self.net[0].in_features == inputs):
            return
        check_memory(f"Curriculum(hidden={self.hidden})", 4 * (inputs + 2) * self.hidden, "Use a smaller width.")
        net = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        nn.init.constant_(net[2].bias, self.initial)  # pyright: ignore[reportArgumentType]
        self.net = net.to(upcast_to_float32(rows.student))

    def lambda_at(self, progress: float) -> float:
        """The factor of the temperature's gradient at this fraction of the run."""
        fraction = 1.0 if self.run_fraction <= 0.0 else min(progress / self.run_fraction, 1.0)
        return self.lambda_last + (self.lambda_first - self.lambda_last) * 0.5 * (1.0 + math.cos(math.pi * fraction))

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        with torch.autocast(rows.student.device.type, enabled=False):
            raw = self._raw(rows)
            # the value is raw to the bit; the gradient is multiplied by lambda
            raw = raw.detach() + self.lambda_at(progress) * (raw - raw.detach())
            position = raw.sigmoid()
            T = self.low + (self.high - self.low) * position
        self._count_at_bound(position.detach(), rows)
        return Temperatures(T, T)

    def param_groups(self) -> list[dict[str, Any]]:
        if self.weight_decay is None:
            return []
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": self.weight_decay}]

    def report(self) -> dict[str, Tensor]:
        """The number of temperatures of the last call (one, or one per row) at a bound."""
        return dict(self.counts)

    def _raw(self, rows: Rows) -> Float[Tensor, "#N 1"]:
        if self.raw is not None:
            return self.raw.to(upcast_to_float32(rows.student))
        if self.net is None or self.net[0].in_features != 2 * rows.student.shape[1]:
            state = "has no size yet" if self.net is None else f"is made for {self.net[0].in_features // 2} classes"  # pyright: ignore
            raise RuntimeError(
                f"Curriculum(form='instance'): its net {state}, and Rows(name={rows.name!r}) has "
                f"{rows.student.shape[1]} classes. Call method.setup(rows) with a first block of rows, before the "
                "optimizer is made."
            )
        student = rows.student if self.differentiable else rows.student.detach()
        x = torch.cat((self._net_input(rows.teacher), self._net_input(student)), 1)
        if rows.weight is not None:
            x = torch.where((rows.weight > 0).unsqueeze(1), x, 0.0)
        first, last = self.net[0], self.net[2]
        for i, layer in enumerate((first, last)):
            x = F.linear(x.relu() if i else x, layer.weight.to(x), layer.bias.to(x))  # pyright: ignore
        return x

    def _net_input(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """One side's logits as input of the net: masked classes are 0."""
        z = upcast_to_float32(logits)
        is_masked = torch.isneginf(z)
        z = z.masked_fill(is_masked, 0.0)
        if self.centered:
            z = z - z.sum(1, keepdim=True) / (~is_masked).sum(1, keepdim=True).clamp_min(1)
        return z.masked_fill(is_masked, 0.0)

    def _count_at_bound(self, position: Float[Tensor, "#N 1"], rows: Rows) -> None:
        """Count the temperatures at a bound, and warn once if most are."""
        has_weight = torch.ones_like(position, dtype=torch.bool)
        if self.form == "instance" and rows.weight is not None:
            has_weight = (rows.weight > 0).unsqueeze(1)
        at_bound = has_weight & ((position < AT_BOUND) | (position > 1.0 - AT_BOUND))
        self.counts = {"at_bound": at_bound.sum()}
        self.calls += 1
        if self.warned or not self.training or (position.device.type != "cpu" and self.calls % CHECK_INTERVAL):
            return
        if 2 * int(at_bound.sum()) <= int(has_weight.sum()):
            return
        self.warned = True
        T = self.low + (self.high - self.low) * float(position[has_weight].median())
        warnings.warn(
            f"Curriculum's temperature is at a bound, T = {T:.4g} of [{self.low:g}, {self.high:g}], where it is "
            "constant. On standardized logits it always falls to the lower bound. Use Static, or move low and high.",
            stacklevel=5,
        )
