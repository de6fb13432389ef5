"""Build a network by name, and load its weights from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.models.zoo import MODELS
from tempering.utils.registry import lookup
from tempering.utils.tensors import read_weights

COUNTER = "num_batches_tracked"  # of batch norms: absent in old files, and not used in eval mode


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
    net: Any = _build(name, classes, channels, pretrained)
    if getattr(net, "built", None) is None or parted(name)[0]:
        net.built = {"kind": "build", "name": name, "classes": classes, "channels": channels}
    return net


def _build(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
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


class Loaded(NamedTuple):
    """What was loaded from a file.

    Attributes:
        path: of the file.
        source: the key under which its weights were, and their prefix; "" for plain weights.
        renamed: name in the file -> name in the net, where they differ.
        tensors: number of tensors.
        absent: counters of batch norms that the file does not have; they keep their values.
    """

    path: Path
    source: str
    renamed: dict[str, str]
    tensors: int
    absent: int

    @property
    def line(self) -> str:
        """What was mapped, in one line."""
        first = next(iter(self.renamed.items()), None)
        parts = [f"{self.tensors} tensors{self.source}"]
        parts += [f"{len(self.renamed)} renamed, such as {first[0]} to {first[1]}"] if first else []
        parts += [f"{self.absent} counters of batch norms kept"] if self.absent else []
        return f"weights from {self.path}: {'; '.join(parts)}"


def load(net: nn.Module, path: str | Path) -> nn.Module:
    """Load all weights of ``net`` from a file, in place, and return it; see ``load_checkpoint``."""
    load_checkpoint(net, path)
    return net


def load_checkpoint(net: nn.Module, path: str | Path) -> Loaded:
    """Load all weights of ``net`` from a file, in place.

    Args:
        net: the network.
        path: a safetensors file, or one of torch.save (.pth, .pt, .bin, .ckpt, .tar), which is read with
            ``weights_only=True``: plain weights, or under a key such as "model" or "state_dict". Names are those of
            the net, or of the same net in mdistiller and RepDistiller; a common prefix such as "module." is removed.

    Floats of another precision are converted; integers for floats are refused, as are weights that are NaN.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a corrupt file, or weights of another network, naming the first differences.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}. A finished run leaves student.safetensors.")
    state, source = net.state_dict(), ""
    weights = read_weights(path) if path.suffix == ".safetensors" else {}
    names = {name: name for name in state}
    if weights.keys() != state.keys():  # of another project
        from tempering.models.external_weights import resolve

        weights, names, source = resolve(net, state, path)
    _check(net, path, state, weights, names)
    for theirs, own in sorted((theirs, own) for own, theirs in names.items()):
        _check_values(path, theirs, weights[theirs], state[own])
    renamed = {theirs: own for own, theirs in names.items() if theirs != own}
    absent = state.keys() - names.keys()
    net.load_state_dict({own: weights[names[own]] if own in names else state[own] for own in state})
    return Loaded(path, source, renamed, len(names), len(absent))


def _check(
    net: nn.Module, path: Path, state: Mapping[str, Tensor], weights: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    missing = sorted(name for name in state if name not in names and not name.endswith(COUNTER))
    extra = sorted(weights.keys() - set(names.values()))
    other = [own for own, theirs in names.items() if state[own].shape != weights[theirs].shape]
    if not (missing or extra or other):
        return
    described = {own: own if own == names[own] else f"{names[own]} ({own} in the net)" for own in other}
    differences = [
        *(f"{name} is missing" for name in missing[:2]),
        *(f"{name} is not in the net" for name in extra[:2]),
        *(
            f"{described[own]} is {tuple(weights[names[own]].shape)} and should be {tuple(state[own].shape)}"
            for own in other[:2]
        ),
    ]
    raise ValueError(f"{path} does not hold the weights of this {type(net).__name__}: {'; '.join(differences)}.")


def _check_values(path: Path, name: str, value: Tensor, wanted: Tensor) -> None:
    """Refuse integers for floats, and weights that are NaN; floats of another precision are converted."""
    if value.is_floating_point() != wanted.is_floating_point():
        raise ValueError(
            f"{path}: {name} is {value.dtype} and should be {wanted.dtype}. Convert the file if this is meant."
        )
    if value.is_floating_point() and value.float().isnan().any():
        raise ValueError(f"{path}: {name} has values that are NaN, so its training diverged. Use another file.")
