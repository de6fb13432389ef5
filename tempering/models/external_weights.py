"""Find a net's weights in files of other projects: the distillation literature's, and those of other libraries.

The nets of RepDistiller and mdistiller are those of the zoo with other names of their modules (``conv1``,
``layer1.0.bn2``, ``fc``); ``literature_names`` derives these names from the structure of a net.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.models.layers import Staged
from tempering.utils.tensors import read_weights

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # suffixes of torch.save's files
# keys under which trainers save the weights; timm's own loader, too, takes their average first
WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_state_dict", "net", "network")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and modules of training frameworks
HEADS = ("fc", "linear", "classifier", "classifier.0")
KINDS = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn"}


def resolve(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read a file and find the net's weights in it.

    Returns:
        The weights of the file, name in the net -> name in the file for those that are found, and where they were.
    """
    weights, source = _unwrap(path, _read_pickled(path)) if path.suffix in PICKLED else (read_weights(path), "")
    weights, prefix = _without_prefix(weights, state)
    return weights, _match(net, state, weights), source + (f", without {prefix!r}" if prefix else "")


def literature_names(net: nn.Module) -> dict[str, list[str]]:
    """Return module -> its names in the checkpoints of the literature, for a net of the zoo; {} for another."""
    if not isinstance(net, Staged):
        return {}
    seen: Counter[str] = Counter()
    names = {
        f"stem.{path}": [numbered, f"conv1.{path}", f"block0.{path}"] for path, numbered in _number(net.stem, seen)
    }
    if not names:  # of a wide ResNet, it is one convolution
        names["stem"], seen["conv"] = ["conv1"], 1
    for path, numbered in _number(net.pool, seen):
        names[f"pool.{path}"] = [numbered, f"conv2.{path}"]
    names["head"] = list(HEADS)
    group, position = -1, 0  # of a block in MobileNet's list of lists: a group begins where the shape changes
    for number, stage in enumerate(net.stages, 1):
        parts = dict(net.get_submodule(stage).named_children())
        pools = sum(isinstance(part, nn.MaxPool2d) for part in parts.values())  # apart in the literature's VGG
        for name, block in parts.items():
            path = f"{stage}.{name}"
            if type(block) in KINDS:
                names[path] = [f"block{number}.{int(name) - pools}"]
                continue
            group, position = (group, position + 1) if getattr(block, "same", False) else (group + 1, 0)
            for inner, numbered in _number(block, Counter()):
                ours, place = f"{path}.{inner}", inner.rpartition(".")[2]
                if inner.startswith("shortcut"):
                    own = [f"layer{number}.{name}.{side}.{place}" for side in ("downsample", "shortcut")]
                    names[ours] = [f"block{number}.layer.{name}.convShortcut"] if inner == "shortcut" else own
                else:
                    names[ours] = [f"{where}.{name}.{numbered}" for where in (f"layer{number}", f"block{number}.layer")]
                    names[ours].append(f"blocks.{group}.{position}.conv.{place}")
    return names


def _number(module: nn.Module, seen: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield the path of each convolution and norm, and its name by number, without shortcuts: conv1, bn1, conv2, ..."""
    for path, part in module.named_modules():
        if path and (kind := KINDS.get(cast("Any", type(part)))) is not None:
            seen[kind] += not path.startswith("shortcut")
            yield path, f"{kind}{seen[kind]}"


def _match(net: nn.Module, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name in the net -> name in the file, for those that are found."""
    literature, found = literature_names(net), dict[str, str]()
    for own in state:
        module, _, leaf = own.rpartition(".")
        candidates = [own, *(f"{name}.{leaf}" for name in literature.get(module, [])), own.removeprefix("model.")]
        if name := next((name for name in candidates if name in weights), None):
            found[own] = name
    return found


def _without_prefix(weights: dict[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove prefixes that all names of the file have, and not all of the net."""
    removed = ""
    while prefix := next(
        (p for p in PREFIXES if all(n.startswith(p) for n in weights) and not all(n.startswith(p) for n in state)), None
    ):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        removed += prefix
        if not weights:
            break
    return weights, removed


def _read_pickled(path: Path) -> Any:
    """Read a file of torch.save, without executing anything: tensors, plain containers and numbers alone."""
    import numpy as np

    # what trainers keep beside the weights: numpy's numbers as scores, and the parsed command line
    scalar: Any = np.float64(0).__reduce__()[0]  # the function that builds them
    types = [type(np.dtype(name)) for name in ("float32", "float64", "int64")]
    plain: list[Any] = [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *types]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by where a file is damaged or what it holds
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is not a file of weights that torch.load(weights_only=True) reads: {first} Save the weights "
            "alone, once and where you trust the file: torch.save(model.state_dict(), path)."
        ) from error


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Tensor], str]:
    """Return the weights in the content of a file of torch.save, and the key under which they were."""
    if _are_weights(content):
        return dict(content), ""
    keys = list(cast("Mapping[Any, Any]", content)) if isinstance(content, Mapping) else []
    if key := next((key for key in WRAPPERS if key in keys and _are_weights(content[key])), None):
        return dict(content[key]), f" under {key!r}"
    found = f"the keys {', '.join(map(str, keys[:6]))}" if keys else type(content).__name__
    raise ValueError(
        f"{path} holds {found}, and weights are expected there or under one of {', '.join(WRAPPERS)}. Save them alone: "
        "torch.save(model.state_dict(), path)."
    )


def _are_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())
