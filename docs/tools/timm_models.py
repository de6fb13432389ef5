"""Write the table of timm's families in docs/models.md: which of them KD and feature methods train.

Usage: ``nice python -m docs.tools.timm_models .``, about ten minutes on one core. Of every family of timm (a module of
``timm.models``) the net with the fewest parameters is built without weights, as student and as teacher, and takes two
steps on four images with each method.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from docs.tools.tables import reason, table, write_between
from tempering import distill
from tempering.methods import AT, KD, PKT
from tempering.methods.base import Method
from tempering.models.external_detectors import torchvision
from tempering.tasks import Classification

CLASSES, IMAGES, SIZES = 4, 4, (32, 64, 128)
MOST = 100e6  # parameters of a net that is tried
# in the names of nets that are not the smallest
LARGE = re.compile("base|large|huge|giant|xl|so400m|so150m|_(?:384|448|512)|[1-9][0-9]2(?![0-9])")
TRAINS = "trains"
HEAD = ("family", "net", "parameters", "image", "feature", "shape", "KD", "AT", "PKT")


class Row(NamedTuple):
    """A line of the table: sizes, the feature's module and shape, and what came of each method."""

    family: str
    net: str
    parameters: str
    image: str
    feature: str
    shape: str
    kd: str
    at: str
    pkt: str


def load() -> Any:
    """Import timm; torchvision, which it imports, may be built for another torch."""
    torchvision()
    import timm  # pyright: ignore[reportMissingImports]

    return timm


def smallest(family: str) -> str:
    """The family's net with the fewest parameters, of those that classify one image."""
    timm, counts = load(), dict[str, int]()
    names = timm.list_models(module=family)
    for name in [name for name in names if not LARGE.search(name)] or names:
        try:
            counts[name] = parameters(name)
        except Exception:  # some nets cannot be built without weights or on the meta device
            continue
    return min(counts, key=lambda name: counts[name])


def parameters(name: str) -> int:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(p.numel() for p in load().create_model(name, num_classes=CLASSES).parameters())


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The net with random weights, and images of the smallest size that it takes.

    Raises:
        Exception: the net's own error for its default size, if it takes none of the sizes.
    """
    timm, error = load(), Exception("")
    for size in (*SIZES, None):
        for options in ({"img_size": size}, {}) if size else ({},):
            torch.manual_seed(0)
            try:
                net = timm.create_model(name, num_classes=CLASSES, **options)
                _, height, width = net.pretrained_cfg["input_size"] if size is None else (3, size, size)
                images = torch.randn(IMAGES, 3, height, width, generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    net.train()(images)
                    net.eval()(images)
                return net.train(), images
            except Exception as caught:  # a net's own, for a size or an argument that it does not take
                error = caught
    raise error


def last_feature(net: Any) -> str:
    """The module of the deepest feature, as timm names it; the last child with parameters but the head otherwise."""
    modules = dict(net.named_modules())
    infos = getattr(net, "feature_info", None)
    for info in reversed(list(infos) if infos is not None else []):
        if (name := info["module"]) in modules:
            return name
    heads = ("head", "fc", "classifier", "head_dist", "norm", "fc_norm", "head_drop")
    children = [n for n, m in net.named_children() if n not in heads and any(True for _ in m.parameters())]
    name, module = children[-1], modules[children[-1]]
    while isinstance(module, nn.ModuleList):  # has no forward of its own
        name, module = f"{name}.{len(module) - 1}", module[-1]
    return name


def tried(method: Method, net: nn.Module, images: Tensor, labels: Tensor, features: dict[str, tuple[str, str]]) -> str:
    """Two steps of the net with this method: "trains", or why not."""
    student, teacher = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.9)
    before = [p.detach().clone() for p in student.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distill(
                student, teacher, [(images, labels)], method=method, task=Classification(features=features), steps=2,
                quiet=True, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3),
            )  # fmt: skip
    except Exception as error:  # is what the table is about
        return reason(error)
    moved = any(not torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
    return TRAINS if moved else "no weight moves"


def row(family: str, name: str) -> Row:
    """Try a net with KD, AT and PKT; PKT takes features of any shape, and is left out where AT trains."""
    if (count := parameters(name)) > MOST:
        return Row(family, name, f"{count / 1e6:.0f} M", "", "", "", *["not tried: too large"] * 3)
    try:
        net, images = build(name)
    except Exception as error:  # its own
        return Row(family, name, "", "", "", "", *[f"not built: {reason(error)}"] * 3)
    feature = last_feature(net)
    shapes: list[Any] = []
    with torch.no_grad():
        hook = net.get_submodule(feature).register_forward_hook(lambda module, args, output: shapes.append(output))
        net.eval()(images)
        hook.remove()
    net.train()
    shape = tuple(shapes[-1].shape) if shapes and isinstance(shapes[-1], Tensor) else type(shapes[-1:]).__name__
    labels, pair = torch.arange(IMAGES) % CLASSES, {"last": (feature, feature)}
    kd, at = tried(KD(), net, images, labels, {}), tried(AT(), net, images, labels, pair)
    pkt = tried(PKT(), net, images, labels, pair) if at != TRAINS else "-"
    millions = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
    return Row(family, name, millions, str(images.shape[-1]), feature, str(shape), kd, at, pkt)


def summary(rows: list[Row]) -> str:
    """The numbers of families that train."""
    kd, at = sum(r.kd == TRAINS for r in rows), sum(r.at == TRAINS for r in rows)
    either = sum(TRAINS in (r.at, r.pkt) for r in rows)
    return (
        f"Of {len(rows)} families of timm {load().__version__}, KD trains {kd}, AT {at}, and AT or PKT {either}. "
        "The others are refused before training, with the reason in the table."
    )


def main(root: Path) -> int:
    """Write the table under ``root``."""
    torch.set_num_threads(1)
    rows = list[Row]()
    for family in load().list_modules():
        rows.append(row(family, smallest(family)))
        print(*rows[-1], sep=" | ", flush=True)
        write_between(root / "docs" / "models.md", "timm", f"{summary(rows)}\n\n{table(HEAD, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
