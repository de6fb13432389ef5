"""Build KDExplainer's student, a hierarchical mixture of experts whose routing does not depend on the input."""

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
    """Mix parents for each child, (N, parents, ...) -> (N, children, ...), by weights independent of the input.

    a_i = softmax(log p_i / t) with p_i = softmax(alpha_i / 0.5) and t the ``temperature``, a buffer; t = 0 is hard
    routing, one-hot at the maximum. No Gumbel noise is added, despite the name in the released code.
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
        """Set the temperature; hard routing stays hard."""
        self.temperature.copy_((self.temperature > 0) * temperature)

    @torch.no_grad()
    def harden(self) -> None:
        """Route each child from its main parent only, and freeze the routing."""
        self.temperature.zero_()
        self.alpha.requires_grad_(False)

    def attends(self, temperature: float | Tensor | None = None) -> Float[Tensor, "children parents"]:
        """Return the weight of each parent for each child; rows add up to 1, in float32 at least."""
        t = torch.as_tensor(self.temperature if temperature is None else temperature, device=self.alpha.device)
        alpha = self.alpha if self.alpha.dtype == torch.float64 else self.alpha.float()
        soft = (alpha / (SHARPNESS * torch.where(t > 0, t, 1.0).to(alpha.dtype))).softmax(-1)
        return torch.where(t > 0, soft, one_hot(alpha.argmax(-1), alpha.shape[-1]).to(alpha.dtype))

    def attention_entropy(self) -> Float[Tensor, ""]:
        """Return the mean entropy of the children's rows in nats, (), in [0, log parents]."""
        return row_entropy(self.attends()).mean()

    def forward(self, x: Tensor) -> Tensor:
        return (self.attends().to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])


class Each(nn.Module):
    """Apply ``count`` separate linear layers, (count, N, wide_in) -> (count, N, wide_out)."""

    def __init__(self, count: int, in_channels: int, wide_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, in_channels, wide_out))
        self.bias = nn.Parameter(torch.empty(count, 1, wide_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.weight.shape[1])  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Leaves(nn.Module):
    """Apply an MLP per class, (N, classes, wide) -> (N, classes): the maximum of ``answers`` logits."""

    def __init__(self, classes: int, out_channels: int, hidden: int, dropout: float, answers: int) -> None:
        super().__init__()
        inner = [Each(classes, out_channels, hidden), nn.ReLU(), nn.Dropout(dropout)]
        inner += [Each(classes, hidden, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*inner, Each(classes, hidden, answers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).amax(-1).transpose(0, 1)


class Explainer(nn.Module):
    """Build levels of experts with a routing that explains each class, (N, channels, H, W) -> (N, classes).

    The input of the experts of the first level is the image, that of all others a mixture of the previous level; every
    class is a leaf with a mixture of the last level as its input. ``methods.Explainer`` anneals the routing; with other
    methods it stays soft. Afterwards, ``restart`` keeps only the tree. ``stages`` are the levels; the output of a level
    is the concatenation of its experts' maps.

    Args:
        classes: number of classes.
        channels: of the images.
        experts: number of experts of each level.
        inner: hidden maps of an expert.
        widths: output maps of an expert of each level, at half the height and width of its input.
        side: height and width to which the last level's maps are average pooled; 7 enlarges CIFAR's 4 x 4, as released.
        hidden, dropout: of the leaves.
        answers: logits of a leaf, whose maximum is that of the class: 1 in the released "ce" head, 2 in "nce".

    Raises:
        ValueError: for another number of widths than of levels, or no levels.

    Reference: Xue et al., "KDExplainer", 2021, arXiv:2105.04181; sizes of the first author's code for CIFAR. Weights
    are initialized by torch's defaults.
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
        in_channels = channels
        for number, (name, count, out_channels) in enumerate(zip(self.stages, experts, widths, strict=True)):
            first = conv(in_channels * (count if number else 1), count * inner, groups=count if number else 1)
            parts = [
                first,
                nn.BatchNorm2d(count * inner),
                nn.ReLU(),
                conv(count * inner, count * out_channels, groups=count),
            ]
            self.add_module(
                name, nn.Sequential(*parts, nn.BatchNorm2d(count * out_channels), nn.ReLU(), nn.MaxPool2d(2))
            )
            in_channels = out_channels
        children = dict(zip([*self.stages[1:], "head"], itertools.pairwise((*experts, classes)), strict=True))
        self.routes = nn.ModuleDict({name: Routing(own, parents) for name, (parents, own) in children.items()})
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.head = Leaves(classes, in_channels * side * side, hidden, dropout, answers)

    def forward(self, x: Tensor) -> Tensor:
        for number, name in enumerate(self.stages):
            x = getattr(self, name)(self._mix(x, name).flatten(1, 2) if number else x)
        return self.head(self._mix(self.pool(x), "head"))

    def _mix(self, x: Tensor, child: str) -> Tensor:
        """Return the inputs of the children of a level, (N, children, ...)."""
        route = self.routings()[child]
        return route(x.unflatten(1, (route.alpha.shape[1], -1)))

    def routings(self) -> dict[str, Routing]:
        """Return the routing into each level, shallow to deep: "stage2", ..., and "head" for the classes."""
        return {name: route for name, route in self.routes.items() if isinstance(route, Routing)}

    def harden(self) -> Explainer:
        """Route each child from its main parent only, freeze the routing, in place, and return the model."""
        for route in self.routings().values():
            route.harden()
        return self

    @torch.no_grad()
    def tree(self) -> list[dict[str, Any]]:
        """Return the concept tree, JSON-able: a dict for each level with routing, shallow to deep.

        "level": that of the children; "parents": number of parents; "parent": each child's main parent; "attention":
        weights (children, parents) at the routing's "temperature"; "entropy": that of each row in nats, in
        [0, log parents]; "entropy_unannealed": that at temperature 1, on which annealing has no effect.
        """
        levels = []
        for name, route in self.routings().items():
            current, unannealed = route.attends().double(), route.attends(1.0).double()
            levels.append(
                {
                    "level": "classes" if name == "head" else name,
                    "parents": current.shape[1],
                    "parent": route.alpha.argmax(-1).tolist(),
                    "temperature": float(route.temperature),
                    "attention": current.tolist(),
                    "entropy": row_entropy(current).tolist(),
                    "entropy_unannealed": row_entropy(unannealed).tolist(),
                }
            )
        return levels


def restart(net: nn.Module) -> Explainer:
    """Prepare the model for the second stage, in place: fix the tree and reinitialize all weights but the routing.

    Raises:
        ValueError: for a model that is not an Explainer.

    Reference: the first author's code, "stage 2", which then trains with SGD, learning rate 0.05, halved every 30 of
    300 epochs.
    """
    if not isinstance(net, Explainer):
        raise ValueError(f'only an Explainer has a tree to keep; got {type(net).__name__}. Build "explainer_small".')
    for module in net.modules():
        if not isinstance(module, Routing) and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return net.harden()


def adam(
    groups: list[dict[str, Any]], *, net: nn.Module, lr: float = 0.05, routing: float = 0.01, weight_decay: float = 5e-4
) -> torch.optim.Adam:
    """Build the first stage's optimizer: Adam with a separate learning rate for the routing, as released.

    Use it as ``distill(optimizer=partial(adam, net=net))``, with ``rate`` as the schedule.
    """
    routing_ids = {id(m.alpha) for m in net.modules() if isinstance(m, Routing)}
    first, *others = groups
    kept = [p for p in first["params"] if id(p) not in routing_ids]
    routed = [p for p in first["params"] if id(p) in routing_ids]
    parts = [{"params": kept}, {"params": routed, "lr": routing}, *others]
    return torch.optim.Adam([group for group in parts if group["params"]], lr=lr, weight_decay=weight_decay)


def rate(progress: float) -> float:
    """Return the learning rate factor of the first stage: 1/4, 1/2 in the first two of 300 epochs, then linear decay.

    Differences to the released code: it also freezes the routing in these two epochs, and decays every second epoch,
    not at every step.
    """
    return 0.25 if progress < 1 / 300 else 0.5 if progress < 2 / 300 else 1.0 - progress / 1.03093


def halving(progress: float) -> float:
    """Return the learning rate factor of the second stage: halved every 30 of 300 epochs."""
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
