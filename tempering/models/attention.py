"""Add attention over blocks of a convolution's input maps, after KDExplainer's Virtual Attention Module.

No code of that module was released and its equations are not known here: this follows the description in the abstract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tempering.models.layers import row_entropy
from tempering.utils.registry import suggest

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BlockAttention(nn.Module):
    """Multiply a weight (out, in, ...) by M A, an attention over M blocks of neighboring input maps.

    A_om is the attention of output map o to block m, A = softmax(alpha / T) by rows. alpha is initialized to 0, so that
    M A is initially 1.
    """

    block: Tensor
    row: Tensor

    def __init__(self, weight: Tensor, *, blocks: int, temperature: float, share: int) -> None:
        super().__init__()
        out, maps = weight.shape[:2]
        self.blocks, self.temperature, self.share = blocks, temperature, share
        self.alpha = nn.Parameter(torch.zeros(-(-out // share), blocks, dtype=weight.dtype, device=weight.device))
        block, row = torch.arange(maps) * blocks // maps, torch.arange(out) // share
        self.register_buffer("block", block.to(weight.device), persistent=False)
        self.register_buffer("row", row.to(weight.device), persistent=False)

    def attends(self) -> Float[Tensor, "rows blocks"]:
        """Return the attention A, whose rows add up to 1, in float32 at least."""
        alpha = self.alpha if self.alpha.dtype == torch.float64 else self.alpha.float()
        return (alpha / self.temperature).softmax(-1)

    def attention_entropy(self) -> Float[Tensor, ""]:
        """Return the mean entropy of the rows in nats, (), in [0, log blocks]."""
        return row_entropy(self.attends()).mean()

    def forward(self, weight: Tensor) -> Tensor:
        scale = (self.blocks * self.attends())[self.row][:, self.block]
        return weight * scale.to(weight.dtype).reshape(*scale.shape, *[1] * (weight.ndim - 2))


def attend(
    net: nn.Module, *, blocks: int = 4, temperature: float = 1.0, share: int = 1, skip: Sequence[str] | None = None
) -> nn.Module:
    """Add attention to the dense convolutions of ``net``, in place; initially its outputs do not change.

    y_o = sum over blocks m of M A_om sum over maps c of block m of W_oc x_c, as a parametrization of each weight W. A
    does not depend on x, so ``merge_attention`` can merge it into the weights, without any cost at inference. Depthwise
    and grouped convolutions, those with fewer input maps than blocks, and linear layers are not changed.

    Args:
        net: any model with convolutions.
        blocks: M, the number of consecutive blocks into which the input maps are divided as evenly as possible. The
            paper tunes it for each network, but its values are not known; 4 is our default.
        temperature: T, shared by all layers. The paper's value is not known; 1 is our default.
        share: number of output maps that share a row of A; default: 1, a row for each output map.
        skip: names of modules to skip, with all their submodules; None: the first convolution, the stem.

    Returns:
        ``net``.

    Raises:
        ValueError: for invalid sizes, an unknown module name, or if no convolution is left.

    Reference: reconstruction after Xue et al., "KDExplainer", 2021, arXiv:2105.04181, without access to its equations.
    The factor M, which keeps the scale, is our addition.
    """
    if blocks < 2 or share < 1 or not 0.0 < temperature < float("inf"):
        raise ValueError(
            "attend() needs blocks >= 2, share >= 1 and a temperature > 0; got "
            f"blocks={blocks}, share={share}, temperature={temperature}."
        )
    layers = {name: m for name, m in net.named_modules() if isinstance(m, CONVOLUTIONS)}
    skip = tuple(layers)[:1] if skip is None else skip
    for name in skip:
        if name not in (known := [n for n, _ in net.named_modules() if n]):
            raise ValueError(f"the net has no module {name!r} to skip.{suggest(name, known)}")
    selected = [
        layer
        for name, layer in layers.items()
        if layer.groups == 1
        and layer.in_channels >= blocks
        and not any(name == s or name.startswith(f"{s}.") for s in skip)
    ]
    if any(_attention_of(layer) for layer in layers.values()):
        raise ValueError("the net has attention already; call merge_attention(net) first.")
    if not selected:
        raise ValueError(
            f"{type(net).__name__} has no dense convolution of {blocks} or more input maps outside {list(skip)}, so "
            "there is nothing to attend to. Try fewer blocks."
        )
    for layer in selected:
        attention = BlockAttention(layer.weight, blocks=blocks, temperature=temperature, share=share)
        parametrize.register_parametrization(layer, "weight", attention)
    return net


def merge_attention(net: nn.Module) -> nn.Module:
    """Merge the attention into the weights of ``net``, in place, and return it; its outputs do not change."""
    for layer in [m for m in net.modules() if _attention_of(m)]:
        # a deep copy shares the class that torch made for the layer, and the removal deletes the weight from that class
        kind = type(layer)
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))  # pyright: ignore[reportAttributeAccessIssue]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return net


def entropies(net: nn.Module) -> dict[str, Float[Tensor, ""]]:
    """Return layer name -> mean entropy of its attention in nats, (), in [0, log blocks]; differentiable."""
    return {name: attention.attention_entropy() for name, attention in _named_attentions(net)}


def entropy(net: nn.Module) -> Float[Tensor, ""]:
    """Return the mean of ``entropies`` over the layers in nats, (), a term of ``methods.Explainer(entropy=...)``.

    Raises:
        ValueError: for a net without attention.
    """
    values = list(entropies(net).values())
    if not values:
        raise ValueError(f"{type(net).__name__} has no attention. Add it: models.attention.attend(net, blocks=4).")
    return torch.stack(values).mean()


def _named_attentions(net: nn.Module) -> Iterator[tuple[str, BlockAttention]]:
    for name, module in net.named_modules():
        if (attention := _attention_of(module)) is not None:
            yield name, attention


def _attention_of(module: nn.Module) -> BlockAttention | None:
    """Return the attention on a layer's weight, or None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    parts = module.get_submodule("parametrizations.weight").children()
    return next((part for part in parts if isinstance(part, BlockAttention)), None)
