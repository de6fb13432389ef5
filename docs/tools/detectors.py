"""Write the table of detectors in docs/detection.md: every one of torchvision and transformers, exact or refused.

Usage: ``nice python -m docs.tools.detectors .``, about two minutes on one core. A detector that is supported is built
small, without weights, and its losses of one image are compared with those of the library's own forward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from docs.tools.tables import reason, table, write_between
from tempering.models.boxes import centered
from tempering.models.external_detectors import LAYERS_FIRST, TRANSFORMERS, TransformersDetector, detector, torchvision

CLASSES, SIZE = 3, 64
HEAD = ("detector", "supported", "largest difference of the losses to the library's, relative, or reason")


def sample(size: int = SIZE, needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (1, 3, H, W) in [0, 1], and its two boxes, with masks or 17 keypoints where they are needed."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, size, size, generator=generator)
    boxes = torch.tensor([[4.0, 6, 40, 50], [20, 10, 60, 30]]) * size / SIZE
    target = {"boxes": boxes, "labels": torch.tensor([0, 2])}
    if "masks" in needs:
        target["masks"] = torch.rand(2, size, size, generator=generator) > 0.5
    if "keypoints" in needs:
        points = torch.rand(2, 17, 2, generator=generator) * size
        target["keypoints"] = torch.cat((points, torch.ones(2, 17, 1)), -1)
    return images, target


def torchvision_row(name: str) -> tuple[str, str, str]:
    """Compare the losses with torchvision's own forward, which does not resize an image of this size."""
    torch.manual_seed(0)
    try:
        net: Any = detector(f"torchvision:{name}", classes=CLASSES)
    except (TypeError, ValueError) as error:
        return f"torchvision:{name}", "refused", reason(error)
    size = net.image_size or SIZE
    images, target = sample(size, net.needs)
    own = net.eval().model
    said = sum(float(loss.detach()) for loss in net({"images": images, "targets": [target]}).losses.values())
    own.transform.min_size, own.transform.max_size = (size,), size
    counts_background = net.family == "two-stage" or net.is_ssd
    target = {name: x.clone() for name, x in target.items()} | {"labels": target["labels"] + int(counts_background)}
    for part in (own, getattr(own, "rpn", own), getattr(own, "roi_heads", own)):
        part.training = True  # of the detector alone: normalization stays as it is
    torch.manual_seed(0)  # with which anchors and proposals are sampled in eval mode
    losses = own([images[0]], [target])
    return f"torchvision:{name}", "yes", _difference(said, sum(float(loss.detach()) for loss in losses.values()))


def transformers_row(kind: str) -> tuple[str, str, str]:
    """Compare the losses with those that the model of transformers returns."""
    if kind not in TRANSFORMERS:
        try:
            detector(f"transformers:{kind}", classes=CLASSES)
        except (TypeError, ValueError) as error:
            return f"transformers:{kind}", "refused", reason(error)
        return f"transformers:{kind}", "no", "built, and not in the list"
    model = tiny(kind).eval()
    if hasattr(model.config, "num_denoising"):
        model.config.num_denoising = 0  # denoising queries depend on the other images of a batch
    net = TransformersDetector(copy.deepcopy(model)).eval()
    images, target = sample()
    said = sum(float(loss.detach()) for loss in net({"images": images, "targets": [target]}).losses.values())
    own = model(
        net.normalized(images), labels=[{"class_labels": target["labels"], "boxes": centered(target["boxes"] / SIZE)}]
    )
    return f"transformers:{kind}", "yes", _difference(said, float(own.loss.detach()))


def _difference(said: float, own: float) -> str:
    relative = abs(said - own) / abs(own)
    return f"{relative:.0e}" if relative else "0"


def tiny(kind: str) -> Any:
    """A transformers detector of under half a million parameters."""
    import transformers

    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 96], "depths": [1] * 4, "layer_type": "basic"}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads |= {"d_model": 32, "decoder_layers": 2, "num_queries": 20, "num_labels": CLASSES}
    if kind in LAYERS_FIRST:
        stages = ["stage2", "stage3", "stage4"] if kind == "deformable_detr" else ["stage4"]
        backbone = transformers.ResNetConfig(**sizes, out_features=stages)
        own = {"use_timm_backbone": False, "backbone": None, "encoder_layers": 1, "auxiliary_loss": True}
        if kind == "deformable_detr":
            heads["d_model"] = 64  # its 32 groups of channels normalize maps of one position
        name = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}[kind]
        config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **own, **heads)
        return getattr(transformers, f"{name}ForObjectDetection")(config)
    backbone = transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    own = {"encoder_in_channels": [32, 64, 96], "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    own |= {"anchor_image_size": None, "backbone_config": backbone}
    name = {"d_fine": "DFine", "rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2"}[kind]
    config = getattr(transformers, f"{name}Config")(**own, **heads)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def kinds() -> list[str]:
    """The architectures of transformers that detect objects."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    return list(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)


def main(root: Path) -> int:
    """Write the table under ``root``."""
    torch.set_num_threads(1)
    library = torchvision()
    import transformers
    from torchvision import models  # pyright: ignore[reportMissingImports]

    rows = [torchvision_row(name) for name in models.list_models(module=models.detection)]
    rows += [transformers_row(kind) for kind in kinds()]
    for row in rows:
        print(*row, sep=" | ")
    versions = f"torchvision {library.__version__.split('+')[0]} and transformers {transformers.__version__}"
    text = f"All detectors of {versions}; losses of one image, in eval mode.\n\n{table(HEAD, rows)}"
    write_between(root / "docs" / "detection.md", "detectors", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
