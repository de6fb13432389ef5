"""Images with boxes as a record holds them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from torch import Tensor

WIDTH = 256  # pixels of a side, at most


def picture(image: Tensor, sides: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """An image (3, H, W) in [0, 1] as base64 JPEG, its size, and each side's boxes [x, y, x, y, label, score] in it.

    Raises:
        ImportError: without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures are written by Pillow: pip install 'tempering[detection]'") from error
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels)
    scale = min(1.0, WIDTH / max(made.size))
    made = made.resize((max(1, round(made.width * scale)), max(1, round(made.height * scale))))
    file = io.BytesIO()
    made.save(file, "JPEG", quality=75)
    return {
        "jpeg": base64.b64encode(file.getvalue()).decode(),
        "width": made.width,
        "height": made.height,
        "boxes": {side: _listed(said, scale) for side, said in sides.items()},
    }


def _listed(said: Mapping[str, Tensor], scale: float) -> list[list[float]]:
    scores = said["scores"].tolist() if "scores" in said else [1.0] * len(said["labels"])
    rows = zip(said["boxes"].tolist(), said["labels"].tolist(), scores, strict=True)
    return [[*(round(x * scale, 1) for x in box), label, round(score, 3)] for box, label, score in rows]
