"""Build a network by name."""

from __future__ import annotations

import re

import torch
from torch import nn

from tempering.models.zoo import MODELS
from tempering.utils.registry import lookup


def build(name: str, *, classes: int, channels: int = 3, pretrained: bool = False) -> nn.Module:
    """Build a network (N, channels, H, W) -> (N, classes) logits, initialized with torch's global random generator.

    Args:
        name: of the zoo, such as "resnet8x4" (not case-sensitive), or LIBRARY:NAME with timm, torchvision or
            transformers, such as "timm:resnet18" or "transformers:google/vit-base-patch16-224". The prefix "vam:" adds
            attention (``attention.attend``), "vam8:" with 8 blocks.
        classes: number of outputs.
        channels: of the images.
        pretrained: load the library's weights; the zoo has none.

    Raises:
        ValueError: for an unknown name, with the most similar one; or sizes below 1.
        ImportError: for a library that is not installed.
    """
    if classes < 1 or channels < 1:
        raise ValueError(f"a net needs classes >= 1 and channels >= 1; got classes={classes}, channels={channels}.")
    attention, name = parted(name)
    if attention:
        from tempering.models.attention import attend

        net = build(name, classes=classes, channels=channels, pretrained=pretrained)
        blocks = attention.removeprefix("vam")
        return attend(net, blocks=int(blocks)) if blocks else attend(net)
    library, colon, inner = name.partition(":")
    if colon:
        from tempering.models.external import LIBRARIES, from_library

        if library not in LIBRARIES:
            raise ValueError(f"nets of other libraries are {', '.join(f'{x}:NAME' for x in LIBRARIES)}; got {name!r}.")
        return from_library(library, inner, classes=classes, channels=channels, pretrained=pretrained)
    if pretrained:
        raise ValueError(f"the zoo has no weights of {name!r}; train it, or load(net, path) a safetensors file.")
    return lookup(name, MODELS, "net")(classes, channels)


def build_seeded(name: str, *, seed: int, classes: int, channels: int = 3, channels_last: bool = False) -> nn.Module:
    """``build`` with the initial weights of a seed, the same whatever was drawn before; optionally channels-last."""
    torch.manual_seed(seed)
    net = build(name, classes=classes, channels=channels)
    return net.to(memory_format=torch.channels_last) if channels_last else net  # pyright: ignore[reportCallIssue]


def stages(net: nn.Module) -> list[str]:
    """Return the names of the network's stages, shallow to deep; [] for a network that is not of the zoo."""
    return getattr(net, "stages", [])


def parted(name: str) -> tuple[str, str]:
    """Split a name into attention and network: ("vam8", "resnet8") for "vam8:resnet8", ("", name) without attention."""
    match = re.fullmatch(r"(vam\d*):(.*)", name, re.IGNORECASE)
    return ("", name) if match is None else (match[1].lower(), match[2])


def network_facts(name: str) -> dict[str, str]:
    """A network in records. One with attention is the same network when merged, so tables compare the two."""
    attention, plain = parted(name)
    return {"name": plain, "attention": attention} if attention else {"name": plain}
