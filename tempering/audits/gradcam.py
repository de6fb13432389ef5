"""Compare the Grad-CAM maps of two models, computed by Captum, image by image."""

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
NO_MAPS = "Grad-CAM was left out: it needs a convolution in both models whose map has several positions; got {}."


def looks_alike(
    models: Mapping[str, nn.Module], layers: Mapping[str, tuple[str, str]], x: Tensor, y: Tensor, *, batch: int
) -> Finding:
    """Return the spatial correlation of both models' maps of the label's class, mean over images.

    Uses the last of ``layers`` that outputs maps in both models, else the last convolution of each; the coarser map is
    upsampled to the finer. If the value is None, its meaning gives the reason.
    """
    if find_spec("captum") is None:
        return Finding(NAME, "both", None, MISSING)
    names = _last_maps(models, layers, x[:1]) if x.ndim == 4 and x.is_floating_point() else None
    if names is None:
        return Finding(NAME, "both", None, NO_MAPS.format(f"inputs {tuple(x.shape)}"))
    sides = [(model, side, name) for (side, model), name in zip(models.items(), names, strict=True)]
    maps = [torch.cat([gradcam(*layer, a, b) for a, b in _parts(x, y, batch)]) for layer in sides]
    if min(m[0].numel() for m in maps) < 2:
        return Finding(NAME, "both", None, NO_MAPS.format(f"{names[0]} and {names[1]} with one position"))
    meaning = (
        f"Spatial correlation between the two models' Grad-CAM maps of the label's class, at {names[0]} of the student "
        f"and {names[1]} of the teacher, mean over images: whether both use the same regions. Unrelated models are "
        "near 0; an image with a constant map counts as 0."
    )
    return average(NAME, "both", correlated(*maps), meaning)


def gradcam(model: nn.Module, side: str, name: str, x: Tensor, y: Int[Tensor, " N"]) -> Float[Tensor, "N height width"]:
    """Compute the map of class ``y`` at the module ``name``, non-negative, on the CPU.

    Reference: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, arXiv:1610.02391; computed by Captum.
    """
    from captum.attr import LayerGradCam  # pyright: ignore[reportMissingImports]

    forward, layer = as_function(model, side), dict(model.named_modules())[name]
    device = next((p.device for p in model.parameters()), x.device)
    # the weights are frozen, so the inputs must require the gradient
    leaf = x.detach().to(device).requires_grad_()
    with torch.enable_grad():
        attribution: Any = LayerGradCam(forward, layer).attribute(leaf, target=y.to(device), relu_attributions=True)
    return attribution.detach()[:, 0].cpu().double()


def correlated(a: Float[Tensor, "N h w"], b: Float[Tensor, "N H W"]) -> Float[Tensor, " N"]:
    """Return the spatial correlation of each image's two maps, (N,), 0 where one is constant."""
    size = [max(p, q) for p, q in zip(a.shape[1:], b.shape[1:], strict=True)]
    flat = []
    for m in (a, b):
        m = m if list(m.shape[1:]) == size else interpolate(m[:, None], size=size, mode="bilinear")[:, 0]
        m = m.flatten(1) / m.flatten(1).amax(1, keepdim=True).clamp_min(1e-300)
        centered = m - m.mean(1, keepdim=True)
        # a centered constant map holds rounding errors only
        flat.append(centered * (centered.abs().amax(1, keepdim=True) > 1e-9))
    numerator, denominator = (flat[0] * flat[1]).sum(1), flat[0].norm(dim=1) * flat[1].norm(dim=1)
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-300), 0.0).clamp(-1, 1)


def _last_maps(
    models: Mapping[str, nn.Module], layers: Mapping[str, tuple[str, str]], x: Tensor
) -> tuple[str, str] | None:
    """Return the names of the modules whose maps are compared, (student's, teacher's)."""
    pairs = list(layers.values())
    shapes = []
    for i, (side, model) in enumerate(models.items()):
        with FeatureExtractor(model, [pair[i] for pair in pairs]) as extractor, torch.no_grad():
            as_function(model, side)(x)
            shapes.append([extractor[pair[i]].ndim for pair in pairs])
    for pair, dims in zip(reversed(pairs), reversed(list(zip(*shapes, strict=True))), strict=True):
        if dims == (4, 4):
            return pair
    last = [[n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][-1:] for model in models.values()]
    return (last[0][0], last[1][0]) if all(last) else None


def _parts(x: Tensor, y: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(batch), y.split(batch), strict=True))
