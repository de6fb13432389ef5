"""Where two models look: the maps that Grad-CAM makes of each, by Captum, compared image by image."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tempering.audits.base import Finding, as_function
from tempering.audits.intervals import average
from tempering.utils.hooks import FeatureExtractor

NAME = "gradcam_correlation"
MISSING = 'Grad-CAM was left out: it needs Captum, pip install "tempering[explanation]".'
NO_MAPS = "Grad-CAM was left out: it needs a convolution in both models whose map has several places; got {}."


def looks_alike(
    models: Mapping[str, nn.Module], layers: Mapping[str, tuple[str, str]], x: Tensor, y: Tensor, *, batch: int
) -> Finding:
    """Correlation over the places of both models' maps of the label's class, mean over images.

    The maps are those of the last of ``layers`` that answers maps in both, else of the last convolution that each has;
    the coarser is enlarged to the finer. A value of None says why there is none.
    """
    if find_spec("captum") is None:
        return Finding(NAME, "both", None, MISSING)
    names = _last_maps(models, layers, x[:1]) if x.ndim == 4 and x.is_floating_point() else None
    if names is None:
        return Finding(NAME, "both", None, NO_MAPS.format(f"inputs {tuple(x.shape)}"))
    sides = [(model, side, name) for (side, model), name in zip(models.items(), names, strict=True)]
    maps = [torch.cat([gradcam(*of, a, b) for a, b in _parts(x, y, batch)]) for of in sides]
    if min(m[0].numel() for m in maps) < 2:
        return Finding(NAME, "both", None, NO_MAPS.format(f"{names[0]} and {names[1]} with one place"))
    meaning = (
        f"Correlation over the places of an image between the two models' Grad-CAM maps of the label's class, at "
        f"{names[0]} of the student and {names[1]} of the teacher, mean over images: whether both look at the same "
        "places. Unrelated models are near 0; an image for which a map is flat counts as 0."
    )
    return average(NAME, "both", correlated(*maps), meaning)


def gradcam(model: nn.Module, side: str, name: str, x: Tensor, y: Int[Tensor, " N"]) -> Float[Tensor, "N height width"]:
    """The map of class ``y`` at the module ``name``, 0 or more, on the CPU.

    Reference: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, arXiv:1610.02391; computed by Captum.
    """
    from captum.attr import LayerGradCam  # pyright: ignore[reportMissingImports]

    answer, layer = as_function(model, side), dict(model.named_modules())[name]
    device = next((p.device for p in model.parameters()), x.device)
    # the weights are frozen here, so the way back has to begin at the inputs
    leaf = x.detach().to(device).requires_grad_()
    with torch.enable_grad():
        found: Any = LayerGradCam(answer, layer).attribute(leaf, target=y.to(device), relu_attributions=True)
    return found.detach()[:, 0].cpu().double()


def correlated(a: Float[Tensor, "N h w"], b: Float[Tensor, "N H W"]) -> Float[Tensor, " N"]:
    """Correlation over places of each image's two maps, (N,), 0 where one is flat."""
    size = [max(p, q) for p, q in zip(a.shape[1:], b.shape[1:], strict=True)]
    flat = []
    for m in (a, b):
        m = m if list(m.shape[1:]) == size else interpolate(m[:, None], size=size, mode="bilinear")[:, 0]
        m = m.flatten(1) / m.flatten(1).amax(1, keepdim=True).clamp_min(1e-300)
        middle = m - m.mean(1, keepdim=True)
        # what is left of a flat map is rounding
        flat.append(middle * (middle.abs().amax(1, keepdim=True) > 1e-9))
    top, below = (flat[0] * flat[1]).sum(1), flat[0].norm(dim=1) * flat[1].norm(dim=1)
    return torch.where(below > 0, top / below.clamp_min(1e-300), 0.0).clamp(-1, 1)


def _last_maps(
    models: Mapping[str, nn.Module], layers: Mapping[str, tuple[str, str]], x: Tensor
) -> tuple[str, str] | None:
    """The modules whose maps are compared, the student's and the teacher's."""
    pairs = list(layers.values())
    shapes = []
    for i, (side, model) in enumerate(models.items()):
        with FeatureExtractor(model, [pair[i] for pair in pairs]) as taps, torch.no_grad():
            as_function(model, side)(x)
            shapes.append([taps[pair[i]].ndim for pair in pairs])
    for pair, dims in zip(reversed(pairs), reversed(list(zip(*shapes, strict=True))), strict=True):
        if dims == (4, 4):
            return pair
    last = [[n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][-1:] for model in models.values()]
    return (last[0][0], last[1][0]) if all(last) else None


def _parts(x: Tensor, y: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(batch), y.split(batch), strict=True))
