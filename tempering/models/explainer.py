"""KDExplainer's student: a hierarchical mixture of experts whose routing is free parameters, so that it can be read."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tempering.models.layers import conv, row_entropy

SHARPNESS = 0.5  # p = softmax(alpha / 0.5), as released
START = 10.0  # temperature of the routing in the first epoch, as released


class Routing(nn.Module):
    """Each child's mixture of its parents, (N, parents, ...) -> (N, children, ...), whatever the input is.

    a_i = softmax(log p_i / t) with p_i = softmax(alpha_i / 0.5) and t the ``temperature``, a buffer; t = 0 is hard
    routing, one-hot at the largest. Though the released code calls it so, no Gumbel noise is added.
    """

    temperature: Tensor

    def __init__(self, children: int, parents: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(children, parents))
        self.register_buffer("temperature", torch.tensor(START))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.alpha)
        self.temperature.fill_(START)

    @torch.no_grad()
    def anneal(self, temperature: float) -> None:
        """Set the temperature; what is hard stays hard."""
        self.temperature.copy_((self.temperature > 0) * temperature)

    @torch.no_grad()
    def harden(self) -> None:
        """Route each child from its first parent alone, and learn no more."""
        self.temperature.zero_()
        self.alpha.requires_grad_(False)

    def attends(self, temperature: float | Tensor | None = None) -> Float[Tensor, "children parents"]:
        """What each child takes of each parent, rows that add up to 1, in float32 at least."""
        t = torch.as_tensor(self.temperature if temperature is None else temperature, device=self.alpha.device)
        alpha = self.alpha if self.alpha.dtype == torch.float64 else self.alpha.float()
        soft = (alpha / (SHARPNESS * torch.where(t > 0, t, 1.0).to(alpha.dtype))).softmax(-1)
        return torch.where(t > 0, soft, one_hot(alpha.argmax(-1), alpha.shape[-1]).to(alpha.dtype))

    def attention_entropy(self) -> Float[Tensor, ""]:
        """Mean entropy of the children's rows in nats, (), in [0, log parents]."""
        return row_entropy(self.attends()).mean()

    def forward(self, x: Tensor) -> Tensor:
        return (self.attends().to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])


class Each(nn.Module):
    """A linear layer for each of ``count``, (count, N, wide_in) -> (count, N, wide_out)."""

    def __init__(self, count: int, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, wide_in, wide_out))
        self.bias = nn.Parameter(torch.empty(count, 1, wide_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.weight.shape[1])  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Leaves(nn.Module):
    """A small perceptron for each class, (N, classes, wide) -> (N, classes); of several answers the largest counts."""

    def __init__(self, classes: int, wide: int, hidden: int, dropout: float, answers: int) -> None:
        super().__init__()
        inner = [Each(classes, wide, hidden), nn.ReLU(), nn.Dropout(dropout)]
        inner += [Each(classes, hidden, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*inner, Each(classes, hidden, answers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).amax(-1).transpose(0, 1)


class Explainer(nn.Module):
    """Levels of experts, (N, channels, H, W) -> (N, classes): what each class is told by can be read off the routing.

    Every expert of the first level sees the image, every other one a mixture of the level before, and every class is a
    leaf on a mixture of the last. ``methods.Explainer`` anneals the routing; under other methods it stays soft. Then
    ``restart`` keeps the tree alone. ``stages`` are the levels; a level's output has its experts' maps side by side.

    Args:
        classes, channels: of the answers and of the images.
        experts: of each level.
        inner: maps within an expert.
        widths: maps that an expert of each level gives, half as wide and as high as it got them.
        side: to which the last level's maps are averaged; 7 enlarges the 4 x 4 of CIFAR, as released.
        hidden, dropout: of the leaves.
        answers: logits of a leaf, of which the largest is the class's: 1 in the released "ce" head, 2 in "nce".

    Reference: Xue et al., "KDExplainer", 2021, arXiv:2105.04181; sizes of the first author's code for CIFAR. The first
    weights are torch's own.
    """

    stages: list[str]

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 3,
        experts: tuple[int, ...] = (2, 4, 8),
        inner: int = 64,
        widths: tuple[int, ...] = (64, 64, 32),
        side: int = 7,
        hidden: int = 128,
        dropout: float = 0.15,
        answers: int = 1,
    ) -> None:
        super().__init__()
        if len(experts) != len(widths) or not experts:
            raise ValueError(f"Explainer needs a width for each level; got experts={experts} and widths={widths}.")
        self.stages = [f"stage{i}" for i in range(1, len(experts) + 1)]
        self.experts = experts
        wide_in = channels
        for number, (name, count, wide) in enumerate(zip(self.stages, experts, widths, strict=True)):
            first = conv(wide_in * (count if number else 1), count * inner, groups=count if number else 1)
            parts = [first, nn.BatchNorm2d(count * inner), nn.ReLU(), conv(count * inner, count * wide, groups=count)]
            self.add_module(name, nn.Sequential(*parts, nn.BatchNorm2d(count * wide), nn.ReLU(), nn.MaxPool2d(2)))
            wide_in = wide
        children = dict(zip([*self.stages[1:], "head"], itertools.pairwise((*experts, classes)), strict=True))
        self.routes = nn.ModuleDict({name: Routing(own, parents) for name, (parents, own) in children.items()})
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.head = Leaves(classes, wide_in * side * side, hidden, dropout, answers)

    def forward(self, x: Tensor) -> Tensor:
        for number, name in enumerate(self.stages):
            x = getattr(self, name)(self._mixed(x, name).flatten(1, 2) if number else x)
        return self.head(self._mixed(self.pool(x), "head"))

    def _mixed(self, x: Tensor, child: str) -> Tensor:
        """What the children of that level get, (N, children, ...)."""
        route = self.routings()[child]
        return route(x.unflatten(1, (route.alpha.shape[1], -1)))

    def routings(self) -> dict[str, Routing]:
        """The routing into each level, shallow to deep: "stage2", ..., and "head" for the classes."""
        return {name: route for name, route in self.routes.items() if isinstance(route, Routing)}

    def harden(self) -> Explainer:
        """The same net with the tree fixed: each child hears its first parent alone, and the routing learns no more."""
        for route in self.routings().values():
            route.harden()
        return self

    @torch.no_grad()
    def tree(self) -> list[dict[str, Any]]:
        """The concept tree, plain enough for JSON: a dict for each level that is routed, shallow to deep.

        "level" is the children's, "parents" how many the level above has, "parent" each child's first, "attention" its
        rows (children, parents) at the routing's "temperature", "entropy" theirs in nats, in [0, log parents].
        "entropy_unannealed" is that at temperature 1, which does not fall by the schedule alone.
        """
        levels = []
        for name, route in self.routings().items():
            now, own = route.attends().double(), route.attends(1.0).double()
            levels.append(
                {
                    "level": "classes" if name == "head" else name,
                    "parents": now.shape[1],
                    "parent": route.alpha.argmax(-1).tolist(),
                    "temperature": float(route.temperature),
                    "attention": now.tolist(),
                    "entropy": row_entropy(now).tolist(),
                    "entropy_unannealed": row_entropy(own).tolist(),
                }
            )
        return levels


def restart(net: nn.Module) -> Explainer:
    """The second stage's net, in place: the tree is fixed, and all weights but the routing's are drawn anew.

    Raises:
        ValueError: for a net that is no Explainer.

    Reference: the first author's code, "stage 2". It then trains with SGD of rate 0.05, halved every 30 of 300 epochs.
    """
    if not isinstance(net, Explainer):
        raise ValueError(f'only an Explainer has a tree to keep; got {type(net).__name__}. Build "explainer_small".')
    for module in net.modules():
        if not isinstance(module, Routing) and callable(again := getattr(module, "reset_parameters", None)):
            again()
    return net.harden()


def adam(
    groups: list[dict[str, Any]], *, net: nn.Module, lr: float = 0.05, routing: float = 0.01, weight_decay: float = 5e-4
) -> torch.optim.Adam:
    """The first stage's optimizer: Adam with a rate of its own for the routing, as released.

    ``distill(optimizer=partial(adam, net=net))`` with ``rate`` as its schedule.
    """
    own = {id(m.alpha) for m in net.modules() if isinstance(m, Routing)}
    first, *others = groups
    kept = [p for p in first["params"] if id(p) not in own]
    routed = [p for p in first["params"] if id(p) in own]
    parts = [{"params": kept}, {"params": routed, "lr": routing}, *others]
    return torch.optim.Adam([group for group in parts if group["params"]], lr=lr, weight_decay=weight_decay)


def rate(progress: float) -> float:
    """The first stage's schedule: a quarter and a half in the first two of 300 epochs, then linear.

    The code also holds the routing still in these two; it comes down every second epoch and here at every step.
    """
    return 0.25 if progress < 1 / 300 else 0.5 if progress < 2 / 300 else 1.0 - progress / 1.03093


def halving(progress: float) -> float:
    """The second stage's schedule: a half after every 30 of 300 epochs."""
    return 0.5 ** int(10 * progress)


def optimizer_and_schedule(net: nn.Module, lr: float, otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """How to train ``net``: an Explainer as its code does, its first or its second stage; ``otherwise`` for others.

    Args:
        net: the network; an Explainer after ``restart`` is in its second stage.
        lr: learning rate of the first stage.
        otherwise: (optimizer, schedule) of other networks; the second stage has its optimizer.
    """
    if not isinstance(net, Explainer):
        return otherwise
    if all(float(route.temperature) == 0 for route in net.routings().values()):
        return otherwise[0], halving
    return partial(adam, net=net, lr=lr), rate


def _explainer(sizes: dict[str, Any], classes: int, channels: int) -> nn.Module:
    return Explainer(classes=classes, channels=channels, **sizes)


SMALL = {"inner": 16, "widths": (16, 16, 8), "side": 4, "hidden": 16}
DIGITS = {"experts": (2, 4), "inner": 8, "widths": (8, 8), "side": 2, "hidden": 16}
NETS = {
    "explainer": partial(_explainer, {}),
    "explainer_small": partial(_explainer, SMALL),
    "explainer_digits": partial(_explainer, DIGITS),
}
