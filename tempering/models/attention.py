"""Attention over virtual blocks of a convolution's input maps, after KDExplainer's Virtual Attention Module.

No code of that module was released and its equations are not known here: this is a reading of what the abstract says.
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
    """A weight (out, in, ...) times M A over its input maps: of M blocks of neighboring maps, A_om is the share that
    output map o takes of block m, A = softmax(alpha / T) by rows. alpha begins at 0, so that M A begins at 1.
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
        """The shares A, rows that add up to 1, in float32 at least."""
        alpha = self.alpha if self.alpha.dtype == torch.float64 else self.alpha.float()
        return (alpha / self.temperature).softmax(-1)

    def attention_entropy(self) -> Float[Tensor, ""]:
        """Mean entropy of the rows in nats, (), in [0, log blocks]."""
        return row_entropy(self.attends()).mean()

    def forward(self, weight: Tensor) -> Tensor:
        scale = (self.blocks * self.attends())[self.row][:, self.block]
        return weight * scale.to(weight.dtype).reshape(*scale.shape, *[1] * (weight.ndim - 2))


def attend(
    net: nn.Module, *, blocks: int = 4, temperature: float = 1.0, share: int = 1, skip: Sequence[str] | None = None
) -> nn.Module:
    """``net`` itself, its dense convolutions attending to blocks of their input maps; its answers are what they were.

    y_o = sum over blocks m of M A_om sum over maps c of block m of W_oc x_c, as a parametrization of each weight W. A
    does not depend on x, so ``merge_attention`` puts it into the weights: nothing is left of it at run time. Depthwise
    and grouped convolutions, those with fewer maps than blocks, and linear layers are left as they are.

    Args:
        net: any model with convolutions.
        blocks: M, over which a convolution's input maps are dealt out in order, as evenly as it goes. The paper's
            sizes are not known; it is said that they are tuned for each net. 4 is ours.
        temperature: T, the same in all layers. The paper's is not known; 1 is ours.
        share: output maps that share one row of A. Ours is 1: each its own.
        skip: names of modules to leave out, with all inside them; None for the first convolution, the stem.

    Raises:
        ValueError: for sizes that there are not, a name that the net lacks, or where nothing is left to attend.

    Reference: reconstruction after Xue et al., "KDExplainer", 2021, arXiv:2105.04181, whose equations were not seen.
    The factor M, which keeps the scale, is ours.
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
    chosen = [
        layer
        for name, layer in layers.items()
        if layer.groups == 1
        and layer.in_channels >= blocks
        and not any(name == s or name.startswith(f"{s}.") for s in skip)
    ]
    if any(_blocks_of(layer) for layer in layers.values()):
        raise ValueError("the net attends already; fold(net) first.")
    if not chosen:
        raise ValueError(
            f"{type(net).__name__} has no dense convolution of {blocks} input maps or more outside {list(skip)}, so "
            "there is nothing to attend. Fewer blocks?"
        )
    for layer in chosen:
        made = BlockAttention(layer.weight, blocks=blocks, temperature=temperature, share=share)
        parametrize.register_parametrization(layer, "weight", made)
    return net


def merge_attention(net: nn.Module) -> nn.Module:
    """``net`` itself as it was before ``attend``, the attention multiplied into its weights: the same answers."""
    for layer in [m for m in net.modules() if _blocks_of(m)]:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return net


def entropies(net: nn.Module) -> dict[str, Float[Tensor, ""]]:
    """Mean entropy of each attending layer's rows in nats, by its name, (), in [0, log blocks]; with a gradient."""
    return {name: part.attention_entropy() for name, part in _attending(net)}


def entropy(net: nn.Module) -> Float[Tensor, ""]:
    """Mean over the attending layers of their rows' mean entropy in nats, (); ``methods.Explainer(entropy=...)`` weighs
    it.

    Raises:
        ValueError: for a net that attends nowhere.
    """
    found = list(entropies(net).values())
    if not found:
        raise ValueError(f"{type(net).__name__} attends nowhere. Wrap it: models.attention.attend(net, blocks=4).")
    return torch.stack(found).mean()


def _attending(net: nn.Module) -> Iterator[tuple[str, BlockAttention]]:
    for name, module in net.named_modules():
        if (found := _blocks_of(module)) is not None:
            yield name, found


def _blocks_of(module: nn.Module) -> BlockAttention | None:
    """The attention on a layer's weight; None where there is none."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    parts = module.get_submodule("parametrizations.weight").children()
    return next((part for part in parts if isinstance(part, BlockAttention)), None)
