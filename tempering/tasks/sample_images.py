"""Encode images with boxes for a record."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from torch import Tensor

WIDTH = 256  # most pixels of a side


def picture(image: Tensor, sides: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Encode an image (3, H, W) in [0, 1]: base64 JPEG, its size, and each side's boxes [x, y, x, y, label, score].

    Raises:
        ImportError: without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images of detections are written by Pillow: pip install 'tempering[detection]'") from error
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    resized = Image.fromarray(pixels)
    scale = min(1.0, WIDTH / max(resized.size))
    resized = resized.resize((max(1, round(resized.width * scale)), max(1, round(resized.height * scale))))
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=75)
    return {
        "jpeg": base64.b64encode(file.getvalue()).decode(),
        "width": resized.width,
        "height": resized.height,
        "boxes": {side: _boxes(detections, scale) for side, detections in sides.items()},
    }


def _boxes(detections: Mapping[str, Tensor], scale: float) -> list[list[float]]:
    scores = detections["scores"].tolist() if "scores" in detections else [1.0] * len(detections["labels"])
    rows = zip(detections["boxes"].tolist(), detections["labels"].tolist(), scores, strict=True)
    return [[*(round(x * scale, 1) for x in box), label, round(score, 3)] for box, label, score in rows]
